"""Which precision to compute in: bfloat16 only where the processor does it natively, and only while the metric is unharmed."""

from __future__ import annotations

import platform
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from formarium.errors import BadInput

if TYPE_CHECKING:
    from formarium.model import Model

FABRIC = {"float32": "32-true", "bfloat16": "bf16-mixed"}  # what Lightning Fabric calls them
HARM = 0.005  # of the headline metric: a larger loss on held-out data sends "auto" back to float32
CHECKED = 512  # held-out samples that decide
_NAMES = {
    **dict.fromkeys(("float32", "fp32", "32", "32-true"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16", "bf16-mixed"), "bfloat16"),
}


def resolve(precision: str, device: str = "cpu") -> str:
    """ "float32" or "bfloat16" for what a user asked for ("auto" included). BadInput for anything else."""
    if precision == "auto":
        return "bfloat16" if has_native_bf16(device) else "float32"
    if precision not in _NAMES:
        raise BadInput("precision", expected="auto, float32 or bfloat16", got=repr(precision))
    return _NAMES[precision]


def resolve_for(model: Model, precision: str) -> str:
    """The same for one model: where its own run was better off in float32, or was never checked in bfloat16, "auto" is float32."""
    if precision == "auto" and getattr(model, "precision", None) == "float32":
        return "float32"
    return resolve(precision, model.device.type)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context that computes in a resolved precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


@cache
def has_native_bf16(device: str = "cpu") -> bool:
    """Whether matrix products in bfloat16 run in hardware, and run faster than in float32.

    The hardware: AVX-512 BF16 or AMX on x86, BF16 on Arm, any GPU that says so. Elsewhere PyTorch emulates them, tens of times slower.
    """
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and _says_bf16() and matmul_seconds(torch.bfloat16) < matmul_seconds(torch.float32)


def _says_bf16() -> bool:
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"  # older ones fail the timing
    info = Path("/proc/cpuinfo")
    return info.exists() and bool({"avx512_bf16", "amx_bf16", "bf16"} & {*info.read_text(encoding="utf-8").split()})


@cache
def matmul_seconds(dtype: torch.dtype, n: int = 512) -> float:
    """Of one matrix product on the CPU, the best of a few."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best

"""Which precision to compute in: bfloat16 only where the processor does it natively, and only while the metric is unharmed."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from formarium.errors import BadInput

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
HARM = 0.005  # of the headline metric: a larger loss on held-out data sends "auto" back to float32


@cache
def has_native_bf16(device: str = "cpu") -> bool:
    """Whether matrix products in bfloat16 run in hardware: AVX-512 BF16 or AMX on x86, BF16 on Arm, any GPU that says so.

    Elsewhere PyTorch emulates them, tens of times slower than float32.
    """
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    if platform.system() == "Linux":
        words = {*Path("/proc/cpuinfo").read_text(encoding="utf-8").split()}
        return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    return False


def resolve(precision: str, device: str = "cpu") -> str:
    """ "float32" or "bfloat16" for what a user asked for ("auto" included). BadInput for anything else."""
    names = {"32": "float32", "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}
    if precision == "auto":
        return "bfloat16" if has_native_bf16(device) else "float32"
    if precision not in names:
        raise BadInput("precision", expected="auto, float32 or bfloat16", got=repr(precision))
    return names[precision]


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context that computes in a resolved precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")

"""Exact products of int8 matrices. Which way is fast depends on the processor; the result never does.

- `torch._int_mm` on GPUs, and on CPUs that multiply bytes (AVX-512 VNNI, AMX). On others it is a scalar loop, some forty times
  slower than float32.
- `Packed`, on x86 CPUs that lack these: FBGEMM's kernel, which is exact there only while one side keeps to 7 bits without a sign. So the
  left side is split into its positive and its negative part, one below the other, and their products are subtracted.
- float32 anywhere else: sums of up to 1024 products of codes stay below 2^24, where float32 counts without rounding.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_EXACT = 1024  # 1024 * 127^2 < 2^24
_SLAB = 1 << 19  # codes turned into float at a time: what a core's cache holds
_ROWS = 512  # rows a call of FBGEMM's kernel gets


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for int8 [m, k] and int8 [n, k], with entries of -127 to 127: int32 [m, n]."""
    if multiplies_bytes(a.device):
        return integer_product(a, b)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT):
        total += float_product(a[:, start : start + _EXACT].float(), b[:, start : start + _EXACT]).to(torch.int32)
    return total


def multiplies_bytes(device: torch.device) -> bool:
    """Whether `torch._int_mm` is fast there."""
    return device.type == "cuda" or (device.type == "cpu" and _cpu_multiplies_bytes())


@cache
def _cpu_multiplies_bytes() -> bool:
    flags = ("_is_avx512_vnni_supported", "_is_vnni_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, f, bool)()) for f in flags)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm`, padded with zeros to the sizes that a GPU's kernel takes: more than 16 rows, multiples of 8 otherwise."""
    m, n, k = a.shape[0], b.shape[0], a.shape[1]
    if a.device.type == "cuda" and (m <= 16 or k % 8 or n % 8):
        a, b = pad_product(a, b)
    return torch._int_mm(a, b.t())[:m, :n]


def pad_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros around both sides, which change no entry of the product."""
    k = -a.shape[1] % 8
    return F.pad(a, (0, k, 0, max(0, 17 - a.shape[0]))), F.pad(b, (0, k, 0, -b.shape[0] % 8))


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T for codes in float32 [m, k] and int8 [n, k]: float32 [m, n], exact while its sums stay below 2^24 (always while k <= 1024)."""
    rows = max(1, _SLAB // max(1, b.shape[1]))
    if b.shape[0] <= rows or torch.compiler.is_compiling():
        return a @ b.float().t()
    out = a.new_empty(a.shape[0], b.shape[0])
    for start in range(0, b.shape[0], rows):
        torch.mm(a, b[start : start + rows].float().t(), out=out[:, start : start + rows])
    return out


class Packed:
    """An int8 matrix [n, k] in the layout of FBGEMM's kernel: the same bytes in another order, and nothing beside them."""

    def __init__(self, codes: Tensor):
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"  # which kernel's layout it gets is a global choice
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # quantised tensors are to go from torch's own API; this one lives for a moment
                self._params = torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(codes, 1.0, 0), None)
        finally:
            torch.backends.quantized.engine = engine
        self.shape = codes.shape

    @staticmethod
    @cache
    def available() -> bool:
        """Whether this machine has the kernel, and nothing better."""
        return "fbgemm" in torch.backends.quantized.supported_engines and not _cpu_multiplies_bytes()

    def unpack(self) -> Tensor:
        """The matrix, int8 [n, k]. Slow: for saving and for training, not for every step."""
        return torch.ops.quantized.linear_unpack(self._params)[0].int_repr()

    def product(self, a: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """a b^T for codes in float32 [m, k]: float32 [m, n]; and b's columns of those indices, float32 [columns, n].

        The kernel takes float32 and quantises it itself, by the smallest and largest entry: with 0 and 127 among them, its step is 1.
        """
        if len(a) > _ROWS:
            out, found = a.new_empty(len(a), self.shape[0]), None
            for start in range(0, len(a), _ROWS):
                part, found = self.product(a[start : start + _ROWS], columns)
                out[start : start + _ROWS] = part
            return out, found
        m, some = len(a), columns is not None and len(columns) > 0
        reader = a.new_zeros(len(columns) if some else 1, a.shape[1])  # type: ignore[arg-type]
        if some:
            reader[torch.arange(len(reader)), columns] = 127  # a row of zeros and one entry reads a column out
        else:
            reader[0, 0] = 127  # no other row need have one
        out = torch.ops.quantized.linear_dynamic(torch.cat((a, -a, reader)).relu_(), self._params, True)
        return out[:m].sub_(out[m : 2 * m]), out[2 * m :] / 127 if some else None

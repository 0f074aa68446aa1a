"""Vector-wise int8 with outlier decomposition (Dettmers et al., NeurIPS 2022, arXiv 2208.07339).

Every row of the input (a token) and every row of the weight (an output) has a scale of its own, its largest magnitude c:

    q = round(127 v / c)     y = (q_x q_w^T) c_x c_w / 127^2 + bias

The integer product is exact. Input features with an entry of magnitude `threshold` or more would widen their rows' scales and drown
all else: these few columns are left out of it and multiplied in floating point, with the weight's columns read back from int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.nn.ops.int8_product import Packed, float_product, integer_product, multiplies_bytes

UNIT = 1 / 127**2  # what a product of two codes is worth, in units of the two scales
_TINY = 1e-30  # keeps a row of zeros from dividing by zero


def quantize_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """x: float [rows, columns] -> codes int8 [rows, columns], scales float32 [rows], outlier columns int64 [k] (None at threshold 0).

    Outlier columns have an entry of magnitude >= threshold; their codes are 0, and such entries don't count for the scales.
    """
    codes, scale, outliers = _rounded(x, threshold)[:3]
    if outliers is None and threshold > 0:
        outliers = torch.empty(0, dtype=torch.int64, device=x.device)
    return codes.to(torch.int8), scale, outliers


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes int8 [rows, columns] and scales float32 [rows] -> values of that dtype, off by at most scale / 254 each."""
    return (codes * (scale * (1 / 127)).unsqueeze(1)).to(dtype)


def _rounded(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """`quantize_rows` with its codes still in float32, None where there are no outliers, and the largest magnitude of all.

    That is looked at first: mostly it is below the threshold, and no column need be searched. It is NaN where threshold is 0, and under
    a compiler.
    """
    size, outliers, top = x.abs(), None, math.nan
    scale = size.amax(1)
    tracing = torch.compiler.is_compiling()
    if threshold > 0:
        top = math.nan if tracing else float(scale.max())
        if not top < threshold:
            outliers = (size.amax(0) >= threshold).nonzero().squeeze(1)
            outliers = outliers if tracing or len(outliers) else None
            scale = size.masked_fill_(size >= threshold, 0).amax(1)
    scale = scale.float()
    codes = (x.float() * (127 / scale.clamp(min=_TINY)).unsqueeze(1)).round_()
    if outliers is not None:
        codes = codes.index_fill_(1, outliers, 0)
    return codes, scale, outliers, top


def int8_linear(x: Tensor, codes: Tensor | Packed, scale: Tensor, bias: Tensor | None = None, threshold: float = 6.0) -> Tensor:
    """x: float [rows, in], codes int8 [out, in], scale float32 [out], bias [out] -> [rows, out] of x's dtype.

    threshold 0 turns the decomposition off.
    """
    rounded, x_scale, outliers, top = _rounded(x, threshold)
    columns = None  # of the weight, where the input has outliers: [outliers, out]
    if isinstance(codes, Packed):
        if not math.isfinite(top) and not torch.isfinite(x_scale).all():  # the kernel takes no NaN; the scale carries it to the output
            rounded = rounded.nan_to_num_(0, 127, -127)
        product, columns = codes.product(rounded, outliers)
    elif multiplies_bytes(x.device):
        product = integer_product(rounded.to(torch.int8), codes).float()
    else:
        product = float_product(rounded, codes)
    y = _rescale(product, x_scale, scale, bias, x.dtype)
    if outliers is not None:
        columns = codes.index_select(1, outliers).t() if columns is None else columns  # type: ignore[union-attr]
        y = torch.addmm(y, x.index_select(1, outliers), (columns * scale).mul_(1 / 127).to(x.dtype))
    return y


def _rescale(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:  # two passes over the product instead of four
        product = product.mul_((rows * UNIT).unsqueeze(1))
        return product.mul_(columns) if bias is None else torch.addcmul(bias.float(), product, columns)
    product = product.mul_(rows.unsqueeze(1) * columns).mul_(UNIT)  # in the reference's order, so that half precision rounds alike
    return (product if bias is None else product.add_(bias)).to(dtype)


class _Frozen(torch.autograd.Function):
    """int8 forward; backward through the weight as read back from int8, which itself gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.biased = layer, bias is not None
        return int8_linear(x, layer.stored, layer.scale, bias, layer.threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ ctx.layer.read(grad.dtype)
        return to_x, grad.sum(0) if ctx.biased and ctx.needs_input_grad[1] else None, None


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight: x float [..., in] -> [..., out] of the same dtype (or autocast's).

    It stores codes int8 [out, in] and scale float32 [out]. `weight` reads them back as a float tensor, for code that wants to see one.
    Gradients flow to x and to the bias; the weight is frozen. In training mode on a CPU x isn't quantised, only the weight is, so that the
    gradient is that of the forward (as the authors' code has it; on a GPU they go through the 8-bit product). On a CPU `pack` brings the
    codes into the layout of the byte kernel
    that CPU has, in place; a state dict has them plain, always.
    """

    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, threshold: float = 6.0, dtype: Any = None, device: Any = None
    ):
        super().__init__()
        self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
        self.dtype = dtype or torch.get_default_dtype()  # of the weight, read back
        self.packed: Packed | None = None
        self.codes = nn.Parameter(torch.zeros(out_features, in_features, dtype=torch.int8, device=device), requires_grad=False)
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None = None, threshold: float = 6.0) -> Int8Linear:
        """From a float weight [out, in] and bias [out]; a bias that is a parameter is kept as it is."""
        out, into = weight.shape
        layer = cls(into, out, False, threshold, weight.dtype, "meta")
        codes, layer.scale, _ = quantize_rows(weight)
        layer.codes = nn.Parameter(codes, requires_grad=False)
        layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(x.to(torch.get_autocast_dtype(device)))
        compiling = torch.compiler.is_compiling()
        if compiling and self.packed is not None:
            fix = "formarium.nn.int8.unpack(model) before torch.compile or export"
            raise BadInput("int8 layer", expected="plain codes, to be traced", got="packed ones", fix=fix)
        if not compiling and not x.numel():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        flat = x.reshape(-1, self.in_features)
        if self.training and device == "cpu":
            y = F.linear(flat, self.read(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        elif torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)) and not compiling:
            y = _Frozen.apply(flat, self.bias, self)
        else:
            y = int8_linear(flat, self.stored, self.scale, self.bias, self.threshold)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def stored(self) -> Tensor | Packed:
        return self.codes if self.packed is None else self.packed

    @property
    def weight(self) -> Tensor:
        return dequantize_rows(self.codes if self.packed is None else self.packed.unpack(), self.scale, self.dtype)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight for training. A layer that trains stays unpacked, for reading packed codes is slow."""
        return dequantize_rows(self.unpack().codes, self.scale, dtype)

    def pack(self) -> Int8Linear:
        """Codes in the layout of the CPU's byte kernel, where it has one that needs a layout; nothing changes elsewhere."""
        if self.packed is None and self.codes.device.type == "cpu" and Packed.available():
            self.packed = Packed(self.codes.data)
            self.codes.data = self.codes.data.new_zeros(1).expand(self.codes.shape)  # its name and shape, without the bytes
        return self

    def unpack(self) -> Int8Linear:
        """Plain codes again: what training, torch.compile and export work on."""
        if self.packed is not None:
            self.codes.data, self.packed = self.packed.unpack(), None
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, threshold={self.threshold:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """`.half()` and `.to(dtype)` change what it computes in, never its scales."""
        was_packed, scale = self.packed is not None, self.scale
        self.unpack()
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32:
            self.dtype = self.scale.dtype
            self.scale = scale.to(self.scale.device)
        return self.pack() if was_packed else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[f"{prefix}codes"] = self.packed.unpack()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Besides its own names it takes a float weight, which it quantises, and bitsandbytes' (weight int8, SCB, weight_format)."""
        weight = state.pop(f"{prefix}weight", None)
        state.pop(f"{prefix}weight_format", None)
        if weight is not None and weight.dtype == torch.int8:
            state[f"{prefix}codes"], state[f"{prefix}scale"] = weight, state.pop(f"{prefix}SCB")
        elif weight is not None:
            state[f"{prefix}codes"], state[f"{prefix}scale"], _ = quantize_rows(weight)
        was_packed = self.packed is not None
        self.unpack()
        super()._load_from_state_dict(state, prefix, *args, **kwargs)
        if was_packed:
            self.pack()

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        """Packed codes are never written to, so copies share them."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if self.packed is not None:
            memo[id(self.packed)], memo[id(self.codes)] = self.packed, self.codes
        new.__dict__.update({k: deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: plain codes."""
        if self.packed is None:
            return self.__dict__
        plain = nn.Parameter(self.packed.unpack(), requires_grad=False)
        return {**self.__dict__, "packed": None, "_parameters": {**self._parameters, "codes": plain}}


def pack(model: nn.Module) -> nn.Module:
    """Every int8 layer of a model in the layout of this CPU's byte kernel (where it needs one); the same model."""
    return _each(model, Int8Linear.pack)


def unpack(model: nn.Module) -> nn.Module:
    """Plain codes in every int8 layer, as torch.compile and export want them; the same model."""
    return _each(model, Int8Linear.unpack)


def _each(model: nn.Module, do: Callable[[Int8Linear], Any]) -> nn.Module:
    for module in model.modules():
        if isinstance(module, Int8Linear):
            do(module)
    return model

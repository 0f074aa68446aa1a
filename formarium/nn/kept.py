"""Tables that are made once: what a prediction makes first, training must be able to use."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P, T = ParamSpec("P"), TypeVar("T")


def kept(most: int = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """lru_cache for a function that makes tensors: outside inference mode, whose tensors autograd refuses later on, and with values even
    where a network is just being built on the meta device. While a graph is captured they are made anew, so that they are part of it."""

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize=most)
        def cached(*args: P.args, **kwargs: P.kwargs) -> T:
            with torch.inference_mode(False), torch.device("cpu"):
                return fn(*args, **kwargs)

        @wraps(fn)
        def table(*args: P.args, **kwargs: P.kwargs) -> T:
            return fn(*args, **kwargs) if torch.compiler.is_compiling() else cached(*args, **kwargs)

        return table

    return decorate

"""bench: what one model costs on this machine: latency, throughput, parameters, FLOPs, memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from formarium.engine.precision import autocast, resolve
from formarium.engine.runs import Run, as_model
from formarium.model import Model


@dataclass(frozen=True)
class Bench:
    """latency_ms: median of single-sample forwards, with the 10th and 90th percentile. throughput: samples a second at `batch`.

    flops: of one sample's forward, a multiply-add counted as two. peak_memory: bytes of weights and of the largest set of activations
    alive at once in a single-sample forward. of_peak: throughput's FLOP/s over this machine's own matrix product's.
    """

    variant: str
    parameters: int
    flops: int
    latency_ms: float
    latency_low: float
    latency_high: float
    throughput: float
    batch: int
    peak_memory: int
    of_peak: float
    precision: str
    threads: int
    size: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    model: str | Path | Model | Run,
    *,
    batch: int = 32,
    size: Any = None,
    precision: str = "auto",
    repeats: int = 20,
    seconds: float = 5.0,
) -> Bench:
    """Measure a model. size: another input size than the model's own. repeats: forwards timed, fewer where `seconds` run out."""
    network = as_model(model)
    was, device = network.training, network.device
    network.eval()
    how = resolve(precision, device.type)
    try:
        one, many = (network.example(n, **({} if size is None else {"size": size})) for n in (1, batch))
        flops, _ = cost(network, one)
        with torch.inference_mode(), autocast(how, device):
            memory = sum(p.numel() * p.element_size() for p in network.parameters()) + activation_peak(lambda: network(*one), device)
            single = timed(lambda: network(*one), repeats, seconds / 2, device)
            several = timed(lambda: network(*many), max(3, repeats // 4), seconds / 2, device)
    finally:
        network.train(was)
    ordered = sorted(single)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    throughput = batch / statistics.median(several)
    return Bench(
        network.variant,
        network.parameters_count,
        flops,
        statistics.median(single) * 1e3,
        low * 1e3,
        high * 1e3,
        throughput,
        batch,
        memory,
        throughput * flops / matmul_peak(how, device.type),
        how,
        torch.get_num_threads(),
        tuple(one[0].shape[2:]),
    )


def timed(fn: Callable[[], Any], repeats: int, seconds: float, device: torch.device) -> list[float]:
    """Seconds of each of up to `repeats` calls (at least 3), after two warm ones."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        fn()
    wait()
    times: list[float] = []
    while len(times) < 3 or (len(times) < repeats and sum(times) < seconds):
        start = time.perf_counter()
        fn()
        wait()
        times.append(time.perf_counter() - start)
    return times


@cache
def matmul_peak(precision: str = "float32", device: str = "cpu", n: int = 1024) -> float:
    """FLOP/s of a square matrix product, the best of a few: what this machine can do."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    return 2 * n**3 / min(timed(lambda: a @ a, 5, 2.0, torch.device(device)))


class _Moved(TorchDispatchMode):
    """Counts operations and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            self.bytes += sum(
                t.numel() * t.element_size() for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t)
            )
        return out


def cost(model: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[int, _Moved]:
    """(FLOPs, operations and bytes moved) of one forward. Counted, so the same on every machine."""
    moving = [p for p in model.parameters() if p.requires_grad]  # the counter trips over a parameter that a module is called with
    for p in moving:
        p.requires_grad_(False)
    try:
        with torch.no_grad(), _Moved() as moved:
            model(*inputs)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        for p in moving:
            p.requires_grad_(True)
    return counter.get_total_flops(), moved


def activation_peak(fn: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the largest set of tensors alive at once while fn runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells the terminal when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        fn()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak

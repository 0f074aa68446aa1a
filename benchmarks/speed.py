"""Forward and training step of each image backbone, beside its peer where it has one, paired in one process on one machine.

    python benchmarks/speed.py                                  every system, batch 1 and 32, float32 (and bfloat16 where native)
    python benchmarks/speed.py --systems tnt pvt --batches 1 --repeats 9 --threads 1
    python benchmarks/speed.py --references clones --json benchmarks/speed.json
                                                                every system beside its authors' own code (see benchmarks/references)

Peers: timm for tnt, crossvit and efficientvit, transformers for pvt; the other backbones have none and stand alone. A and B take turns; the
ratio is the median of B's time over A's, pair by pair: above 1.0 formarium is ahead. GFLOP/s counts a multiply-add as two, as the matmul
peak does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import formarium
from formarium.engine.comparison import machine
from formarium.engine.precision import has_native_bf16

SMALLEST = {
    "tnt": "tnt_s_patch16_224",
    "pvt": "pvt_tiny",
    "crossvit": "crossvit_tiny_224",
    "cswin": "cswin_tiny_224",
    "crossformer": "crossformer_tiny_224",
    "iformer": "iformer_small",
    "smt": "smt_t",
    "efficientvit": "efficientvit_m0",
}


def timm_model(name: str) -> nn.Module:
    """timm imports torchvision, whose compiled operators don't load beside a CPU torch: an empty one does for its models."""

    class Named(type):
        def __getattr__(cls, attr: str):
            if attr.startswith("__"):
                raise AttributeError(attr)
            return f"{cls.__name__}.{attr}"

    class Empty(types.ModuleType):
        __path__ = ()
        __spec__ = None

        def __getattr__(self, attr: str):
            if attr.startswith("__"):
                raise AttributeError(attr)
            return Named(attr, (), {})

    for name_ in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models", ".models.feature_extraction"):
        full = "torchvision" + name_
        if full not in sys.modules:
            sys.modules[full] = Empty(full)
            parent, _, leaf = full.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, sys.modules[full])
    import timm

    for stub in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[stub]  # others had better not find it
    return timm.create_model(name)


def transformers_pvt() -> nn.Module:
    from transformers import PvtConfig, PvtForImageClassification

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = PvtForImageClassification(PvtConfig(num_labels=1000))

        def forward(self, x):
            return self.model(x).logits

    return Logits()


PEERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "tnt": ("timm", lambda: timm_model("tnt_s_legacy_patch16_224")),
    "crossvit": ("timm", lambda: timm_model("crossvit_tiny_240")),
    "efficientvit": ("timm", lambda: timm_model("efficientvit_m0")),
    "pvt": ("transformers", transformers_pvt),
}


def beside_references(clones: Path, wanted: list[str], repeats: int, path: str | None) -> None:
    """Every system that has a module in benchmarks/references and a clone of its authors' repository. What was measured of it takes its
    place in the JSON file as soon as it is."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import references

    ratios: list[float] = []
    for slug, module in references.modules().items():
        if wanted and slug not in wanted:
            continue
        peer = getattr(module, "PEER", "") or module.REPOSITORY
        clone = clones / getattr(module, "REPOSITORY", "")
        if not clone.is_dir():
            print(f"{slug}: no clone of {peer} in {clones}")
            continue
        if missing := [p for p in getattr(module, "NEEDS", ()) if importlib.util.find_spec(p) is None]:
            print(f"{slug}: {' and '.join(missing)} not installed")
            continue
        rows = []
        for found in module.pairs(clone):
            a, b, ratio = pair(found.ours, found.theirs, repeats)
            rows.append({"name": found.name, "mode": found.mode, "ms": a * 1e3, "peer_ms": (b or 0) * 1e3, "ratio": ratio})
            print(f"{slug:24} {found.name:44} {found.mode:8} {a * 1e3:9.1f} {(b or 0) * 1e3:9.1f} {ratio:6.2f}  {peer}", flush=True)
            ratios.append(ratio or 0)
        if path:
            known = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
            on = machine()
            command = f"python benchmarks/speed.py --references clones --systems {slug} --threads {on['threads']} --repeats {repeats}"
            known[slug] = {
                "peer": peer,
                "command": command,
                "machine": on["processor"],
                "threads": on["threads"],
                "torch": on["torch"],
                "rows": rows,
            }
            write(path, dict(sorted(known.items())))
    if ratios:
        print(f"geometric mean {statistics.geometric_mean(ratios):.2f}, lowest {min(ratios):.2f}")


def matmul_peak(dtype: torch.dtype, n: int = 1536) -> float:
    """GFLOP/s of a square matmul, the best of a few."""
    a = torch.randn(n, n, dtype=dtype)
    a @ a
    return 2 * n**3 / min(once(lambda: a @ a) for _ in range(8)) / 1e9


def once(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def forward_step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    model.eval()

    def step():
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            return model(x)

    return step


def training_step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    model.train()
    if len(x) == 1:  # BatchNorm can't normalise one vector: its statistics stand still, in both models, as in fine-tuning
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    label = torch.zeros(len(x), dtype=torch.long)

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def pair(ours: Callable[[], object], theirs: Callable[[], object] | None, repeats: int) -> tuple[float, float | None, float | None]:
    """Median seconds of ours and theirs, and the median of the pairs' ratios, the two taking turns after a warm-up each."""
    for step in (ours, theirs):
        if step:
            step()
            step()
    a, b = [], []
    i = 0
    while i < repeats or (sum(a) + sum(b) < 8 and i < 60):  # at least so many pairs, and more where they are short
        for step, times in [(ours, a), (theirs, b)][:: 1 if i % 2 else -1]:  # who goes first alternates too
            if step:
                times.append(once(step))
        i += 1
    return (
        statistics.median(a),
        statistics.median(b) if b else None,
        statistics.median(y / x for x, y in zip(a, b, strict=True)) if b else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*")
    parser.add_argument("--references", type=Path, help="a folder of clones of the authors' repositories: time beside those instead")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--modes", nargs="*", default=["forward", "train"])
    parser.add_argument("--repeats", type=int, default=5, help="pairs at least; short ones are repeated for 8 seconds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the rows to this file too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.references:
        beside_references(args.references, args.systems or [], args.repeats, args.json)
        return
    wanted = args.systems or [*SMALLEST]
    if unknown := {*wanted} - {*SMALLEST}:
        parser.error(f"{', '.join(sorted(unknown))}: only {', '.join(SMALLEST)} here; others with --references")
    dtypes = [torch.float32, *([torch.bfloat16] if has_native_bf16() else [])]
    peaks = {d: matmul_peak(d) for d in dtypes}
    print(f"{args.threads} threads, matmul peak " + ", ".join(f"{str(d)[6:]} {p:.0f} GFLOP/s" for d, p in peaks.items()))
    if len(dtypes) == 1:
        print("bfloat16 rows left out: this processor has no native bfloat16")
    print(f"{'variant':24} {'mode':8} {'batch':>5} {'dtype':>9} {'ms':>9} {'peer ms':>9} {'ratio':>6} {'GFLOP/s':>8} {'of peak':>8}  peer")
    rows = []
    for slug in wanted:
        name = SMALLEST[slug]
        ours = formarium.create(name)
        peer, make = PEERS.get(slug, ("", None))
        theirs = make() if make else None
        size = (240, 240) if slug == "crossvit" else ours.image_size  # timm's CrossViT takes 240 and makes 224 of it itself
        for dtype in dtypes:
            for batch in args.batches:
                x = torch.randn(batch, 3, *size)
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    ours.eval()(x)
                flops = counter.get_total_flops()
                for mode in args.modes:
                    make_step = forward_step if mode == "forward" else training_step
                    a, b, ratio = pair(make_step(ours, x, dtype), make_step(theirs, x, dtype) if theirs else None, args.repeats)
                    rate = flops * (1 if mode == "forward" else 3) / a / 1e9
                    row = {"variant": name, "mode": mode, "batch": batch, "dtype": str(dtype)[6:], "ms": a * 1e3, "peer_ms": b and b * 1e3,
                           "ratio": ratio, "gflops": rate, "of_peak": rate / peaks[dtype], "peer": peer}  # fmt: skip
                    rows.append(row)
                    print(f"{name:24} {mode:8} {batch:5} {row['dtype']:>9} {row['ms']:9.1f} {row['peer_ms'] or float('nan'):9.1f} "
                          f"{ratio or float('nan'):6.2f} {rate:8.1f} {row['of_peak']:8.0%}  {peer}", flush=True)  # fmt: skip
    write(args.json, rows)


def write(path: str | None, rows: object) -> None:
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

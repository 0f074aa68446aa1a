"""Methods that shrink, each on a model fitted to the sample digits: size, latency and accuracy before and after.

    python benchmarks/shrink.py                       all of them
    python benchmarks/shrink.py ofb lgvit             these

Results go to benchmarks/shrink.json, with the seed, the machine and the command. Latency is of one image, as the model predicts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import formarium
from formarium.engine.comparison import machine, one_thread

RESULTS = Path(__file__).parent / "shrink.json"
SEED = 0
# method -> (model, its epochs, the method's target, the method's epochs)
RUNS: dict[str, tuple[str, float, float | None, float | None]] = {
    "llm_int8": ("smt_micro", 6, None, None),
    "lgvit": ("smt_micro", 6, 0.6, 6),
    "ofb": ("smt_micro", 6, 0.65, 12),
    "sit_slim": ("crossvit_micro", 16, 0.5, 12),
}


def run(method: str, folder: Path) -> dict[str, Any]:
    model, epochs, target, more = RUNS[method]
    start = folder / f"{model}-{epochs}"
    if not start.exists():
        formarium.fit(model, "sample:digits", start, epochs=epochs, seed=SEED, progress=False, validations=1)
    began = time.perf_counter()
    found = formarium.shrink(start, method, "sample:digits", target=target, epochs=more, seed=SEED, progress=False)
    return {
        "model": model,
        "target": target,
        "rows": found.rows(),
        "seconds": round(time.perf_counter() - began, 1),
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "machine": machine()["processor"],
        "command": f"python benchmarks/shrink.py {method}",
    }


def main(methods: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, one_thread():
        for method in methods or [*RUNS]:
            found = run(method, Path(folder))
            known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps({**known, method: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            said = {r["what"]: (round(r["before"], 4), round(r["after"], 4)) for r in found["rows"]}
            shown = ("parameters", "bytes", "latency_ms", "throughput", "accuracy")
            print(f"{method:10} {found['model']:16} {found['seconds']:6.0f} s  " + "  ".join(f"{k} {said[k]}" for k in shown), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Every system's demo: fit its micro variant on its task's sample data by the card's demo recipe, score it beside the trivial baseline.

    python benchmarks/demos.py                      all systems that aren't image backbones (`formarium demo` compares those)
    python benchmarks/demos.py hat vitpose          these

Each result goes to benchmarks/demos.json (scores, baseline, seconds, seed, command), each picture of held-out predictions to docs/pictures.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import formarium
from formarium.catalogue import cards
from formarium.engine import runs
from formarium.engine.comparison import machine
from formarium.engine.evaluation import predict_all
from formarium.task import task

ROOT = Path(__file__).parent.parent
RESULTS, PICTURES = ROOT / "benchmarks" / "demos.json", ROOT / "docs" / "pictures"
SEED = 0


def sample_of(slug: str) -> str:
    card = cards()[slug]
    return str(card.demo.get("data", task(card.task).samples[0])).removeprefix("sample:")


def demo(slug: str) -> dict[str, object]:
    name, card = sample_of(slug), cards()[slug]
    own = task(card.task)
    start = time.perf_counter()
    run = formarium.fit(str(card.demo["variant"]), f"sample:{name}", seed=SEED, progress=False, validations=1)
    seconds = time.perf_counter() - start
    data = runs.as_data(f"sample:{name}", card.task)
    metrics = formarium.evaluate(run, data, bootstrap=0).metrics
    baseline, trivial = own.baseline(data, SEED)
    val = data.splits["val"]
    predictions, batches = predict_all(run.model, [val[i] for i in range(0, len(val), -(-len(val) // 8))][:8])
    picture = own.draw(*own.examples(predictions, batches), data.names or own.example_names)
    PICTURES.mkdir(exist_ok=True)
    picture.convert("RGB").quantize(96).save(PICTURES / f"{slug}.png", optimize=True)
    key, sign = own.metric, 1 if own.higher_is_better else -1
    return {
        "data": name,
        "metric": key,
        "score": metrics[key],
        "baseline": {"name": baseline, key: trivial[key]},
        "better": sign * metrics[key] > sign * trivial[key],
        "metrics": metrics,
        "fit_seconds": round(seconds, 1),
        "seed": SEED,
        "command": f"python benchmarks/demos.py {slug}",
        "threads": torch.get_num_threads(),
        "machine": machine()["processor"],
        "formarium": formarium.__version__,
    }


def main(slugs: list[str]) -> None:
    wanted = slugs or [c.slug for c in cards().values() if c.kind == "model" and c.task != "image-classification"]
    for slug in wanted:
        found = demo(slug)
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, slug: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        key = found["metric"]
        print(f"{slug:20} {key} {found['score']:.4f} (baseline {found['baseline'][key]:.4f}) {found['fit_seconds']} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

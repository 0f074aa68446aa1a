"""Every system's demo: fit its micro variant on its task's sample data by the card's demo recipe, score it beside the trivial baseline.

    python benchmarks/demos.py                      all systems that aren't image backbones (`formarium demo` compares those)
    python benchmarks/demos.py hat vitpose          these; methods too (ofb, deit_lt, ...)

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
from formarium.engine.recipes import recipe_for
from formarium.task import Data, task

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
    draw(slug, run, data)
    key, sign = own.metric, 1 if own.higher_is_better else -1
    return {
        "data": name,
        "metric": key,
        "score": metrics[key],
        "baseline": {"name": baseline, key: trivial[key]},
        "better": sign * metrics[key] > sign * trivial[key],
        "metrics": metrics,
        "fit_seconds": round(seconds, 1),
    }


def long_tails(slug: str) -> dict[str, object]:
    """Few images of some classes: beside plain training of the same backbone by the same recipe, in as many steps. Better is both tail and
    overall accuracy."""
    from formarium.methods.deit_lt import long_tailed, shot_accuracy

    card, data = cards()[slug], long_tailed(task("image-classification").sample("digits"), 0.02)
    variant = card.variants[str(card.demo["variant"])]
    start = time.perf_counter()
    run = formarium.fit(variant.name, data, seed=SEED, progress=False, validations=1)
    seconds = time.perf_counter() - start
    plain = formarium.fit(str(variant.config["trunk"]), data, recipe=recipe_for(variant.name), seed=SEED, progress=False, validations=1)
    metrics, trivial = shot_accuracy(run.model, data), shot_accuracy(plain.model, data)["mean"]
    draw(slug, run, data)
    return {
        "data": data.name,
        "metric": "tail",
        "score": metrics["mean"]["tail"],
        "baseline": {"name": "plain training of the backbone", **trivial},
        "better": all(metrics["mean"][k] > trivial[k] for k in ("tail", "overall")),
        "metrics": {f"{head}_{k}": v for head, row in metrics.items() for k, v in row.items()},
        "fit_seconds": round(seconds, 1),
    }


def one_task_after_another(slug: str) -> dict[str, object]:
    """Digits in tasks of four, three and three classes, beside fine-tuning a backbone task by task for as many steps."""
    from formarium.methods.gated_class_attention import fine_tuned, report

    card, data, steps = cards()[slug], task("image-classification").sample("digits"), 440
    recipe = recipe_for(str(card.demo["variant"]), steps=steps, lr=3e-3, shift=1)
    torch.manual_seed(SEED)
    model = formarium.create(str(card.demo["variant"]), first_task=4, increment=3, num_tasks=3)
    start = time.perf_counter()
    run = formarium.fit(model, data, recipe=recipe, seed=SEED, progress=False, validations=1)
    seconds = time.perf_counter() - start
    metrics = report(run.model, data)
    parts = [range(4), range(4, 7), range(7, 10)]
    rival = formarium.create("iformer_micro", num_classes=10)
    trivial = fine_tuned(formarium.fit, rival, data, parts, seed=SEED, recipe=recipe.with_(steps=steps // 3))
    return {
        "data": "digits, one task after another",
        "metric": "last",
        "score": metrics["last"],
        "baseline": {"name": "fine-tuning iformer_micro task by task", **trivial},
        "better": metrics["last"] > trivial["last"] and metrics["forgetting"] < trivial["forgetting"],
        "metrics": metrics,
        "fit_seconds": round(seconds, 1),
    }


def draw(slug: str, run: runs.Run, data: Data) -> None:
    """Some held-out predictions as a picture."""
    own, val = task(cards()[slug].task), data.splits["val"]
    predictions, batches = predict_all(run.model, [val[i] for i in range(0, len(val), -(-len(val) // 8))][:8])
    picture = own.draw(*own.examples(predictions, batches), data.names or own.example_names)
    PICTURES.mkdir(exist_ok=True)
    picture.convert("RGB").quantize(96).save(PICTURES / f"{slug}.png", optimize=True)


def where(slug: str) -> dict[str, object]:
    return {
        "seed": SEED,
        "command": f"python benchmarks/demos.py {slug}",
        "threads": torch.get_num_threads(),
        "machine": machine()["processor"],
        "formarium": formarium.__version__,
    }


OWN = {"deit_lt": long_tails, "gated_class_attention": one_task_after_another}  # whose data or rival aren't the task's


def main(slugs: list[str]) -> None:
    wanted = slugs or [c.slug for c in cards().values() if c.kind == "model" and c.task != "image-classification"]
    for slug in wanted:
        found = OWN.get(slug, demo)(slug) | where(slug)
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, slug: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        key = found["metric"]
        print(f"{slug:20} {key} {found['score']:.4f} (baseline {found['baseline'][key]:.4f}) {found['fit_seconds']} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

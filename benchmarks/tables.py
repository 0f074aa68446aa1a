"""TabPFN's micro network on scikit-learn's small tables, beside what is fitted to the same labelled rows.

    python benchmarks/tables.py                 the weights that the card's demo recipe gives (it is run first)
    python benchmarks/tables.py --steps 9000    longer training on the same prior
    python benchmarks/tables.py --packed        the weights that come with the package

Each table ten times: half of every class labelled, the other half asked for; once with all columns, once with the first four. Nothing was
chosen on these rows. Results go to benchmarks/tables.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import formarium
from formarium.engine.comparison import machine
from formarium.model import Model
from formarium.task import Data, task
from formarium.tasks.tabular_classification.data import Table, Tables, episodes, held_out
from formarium.tasks.tabular_classification.estimator import network_of, pack
from formarium.tasks.tabular_classification.metrics import RIVALS, rival
from formarium.tasks.tabular_classification.sample import REAL, real

RESULTS = Path(__file__).parent / "tables.json"
SPLITS = 10
SCORES = ("accuracy", "log_loss", "roc_auc")


def splits_of(name: str, columns: int | None, first: int = 100) -> list[Data]:
    """The same table divided in SPLITS ways, by seeds from `first` on."""
    table = real(name)
    table = Table(table.x[:, :columns], table.label, table.names, table.columns[:columns], table.categorical[:columns], [])
    found = []
    for seed in range(first, first + SPLITS):
        val: Tables = episodes(table, held_out(table.label, 0.5, seed), f"{name} split {seed}", seed)[0]
        found.append(Data(name, "tabular-classification", {"train": val, "val": val}, {}, table.names, [], {}))
    return found


def summary(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each score over the splits, and the standard error of accuracy's."""
    means = {k: round(float(np.mean([f[k] for f in found])), 4) for k in SCORES}
    return {**means, "accuracy_error": round(float(np.std([f["accuracy"] for f in found], ddof=1) / len(found) ** 0.5), 4)}


def compare(model: Model) -> dict[str, dict[str, Any]]:
    out = {}
    for name in REAL:
        for columns in (None, 4):
            datas = splits_of(name, columns)
            width = datas[0].splits["val"][0]["x"].shape[1]
            if columns is not None and width == real(name).x.shape[1]:
                continue  # iris has four
            ours = summary([formarium.evaluate(model, d, bootstrap=0).metrics for d in datas])
            row = {"tabpfn_micro": ours, **{r: summary([rival(d, r) for d in datas]) for r in RIVALS}}
            out[f"{name}, {width} columns"] = row
            print(
                f"{name}, {width} columns:", ", ".join(f"{k} {v['accuracy']:.3f} ({v['log_loss']:.3f})" for k, v in row.items()), flush=True
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--pack", type=Path, help="write the weights there, as float16")
    args = parser.parse_args()
    start, trained = time.process_time(), {}
    if args.packed:
        model, how = network_of("tabpfn_micro"), "packed"
    else:
        changes = {} if args.steps is None else {"steps": args.steps}
        run = formarium.fit("tabpfn_micro", "sample:prior", seed=args.seed, progress=False, validations=1, **changes)
        model, how = run.model, f"steps {args.steps}" if args.steps else "demo"
        trained = {"cpu_seconds": round(time.process_time() - start, 1), "seed": args.seed}
    if args.pack:
        pack(model, args.pack)
    prior = task("tabular-classification").sample("prior")
    held = {"tabpfn_micro": formarium.evaluate(model, prior, bootstrap=0).metrics, **{r: rival(prior, r) for r in RIVALS}}
    held = {k: {s: round(v[s], 4) for s in SCORES} for k, v in held.items()}
    command = "python benchmarks/tables.py" + (f" --steps {args.steps}" if args.steps else "") + (" --packed" if args.packed else "")
    found = {**trained, "command": command, "threads": torch.get_num_threads(), "machine": machine()["processor"], "prior": held}
    found["tables"] = compare(model)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, how: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The pictures of the system pages, drawn from a demo's runs: `python docs/draw.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import formarium
from formarium.engine import runs
from formarium.engine.evaluation import predict_all
from formarium.task import task

PICTURES = Path(__file__).parent / "pictures"


def main(demo: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    for where in sorted((demo / "textures" / "runs").iterdir()):
        run = runs.load_run(where)
        data = runs.as_data("sample:textures", run.model.task)
        val = data.splits["val"]
        few = [val[i] for i in range(7, len(val), len(val) // 8)][:8]
        predictions, batches = predict_all(run.model, few)
        picture = task(run.model.task).draw(predictions[0], batches[0], data.names)
        picture.quantize(64).save(PICTURES / f"{run.config['system']}.png", optimize=True)
    winner = demo / "winner"
    report = formarium.look(winner, "sufo", f"sample:{runs.load_run(winner).config['data']['name']}")
    figure = next(iter(report.figures.values()))
    figure.savefig(PICTURES / "sufo.png", dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))

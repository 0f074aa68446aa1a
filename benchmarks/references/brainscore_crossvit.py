"""A step of fast adversarial training beside github.com/williamberrios/BrainScore-Transformers, whose network is timm's CrossViT."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from speed import timm_model

from formarium.methods.brainscore_crossvit import BrainScoreCrossViT
from references import Pair, importing, on_cpu, recorded, step

REPOSITORY = "williamberrios/BrainScore-Transformers"


def pairs(clone: Path) -> Iterator[Pair]:
    root = clone / "Fast-Adversarial-Training"
    theirs = timm_model("crossvit_9_dagger_240")
    unused = {name: {} for name in ("wandb", "omegaconf", "torchvision", "torchvision__datasets", "dataset", "validation")}
    with importing(root / "Code", root / "src", scheduler={"custom_lr_scheduler_v1": lambda *a: 1e-5}, **unused):
        import train_adv
    r = recorded("brainscore_crossvit", "brainscore_crossvit_9_dagger_step")
    arch, said = r.constructor["arch"], r.constructor
    size, batch = 240, 4
    x, label = torch.rand(batch, 3, size, size), torch.arange(batch)
    r.same(theirs, lambda: r.ours.eval()(x[:1]), lambda: theirs.eval()(x[:1]))
    ours = BrainScoreCrossViT(rotations=False, rates=()).apply(r.ours.trunk)
    ours.set_preprocessing({"mean": said["mean"], "std": said["std"]})
    adv = SimpleNamespace(enable=True, clip_eps=said["clip_eps"], fgsm_step=said["fgsm_step"])
    train: dict[str, Any] = {
        "mean": said["mean"],
        "std": said["std"],
        "random_init": True,
        "scheduler_name": "custom_lr_scheduler_v1",
        "print_freq": 1,
    }
    augmentation = SimpleNamespace(crop_size=size)
    train_adv.configs = SimpleNamespace(ADV=adv, TRAIN=SimpleNamespace(**train), AUGMENTATION=augmentation)
    train_adv.global_noise_data = torch.zeros(batch, 3, size, size)
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-5, fused=True)
    criterion = torch.nn.CrossEntropyLoss()

    def their_step() -> None:  # an epoch of one batch
        with on_cpu(), contextlib.redirect_stdout(io.StringIO()):
            train_adv.train([(x.clone(), label)], theirs, criterion, optimiser, 0)

    yield Pair(
        f"{arch}, adversarial step, batch {batch}", "train", step(ours, lambda: ours.loss({"image": x, "label": label}).total), their_step
    )

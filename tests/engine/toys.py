"""A task of four numbers a sample, and models that train in unusual ways: the engine must not care what is learnt."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from formarium.cards import Card, Variant
from formarium.lens import Lens, Report
from formarium.model import Losses, Model, Stage, Turn
from formarium.task import Data, Task


class Points(list):
    """Raw samples: x float [4]; y their sum."""

    @staticmethod
    def make(count, seed):
        rng = np.random.default_rng(seed)
        return Points({"x": x, "id": f"point {i}"} for i, x in enumerate(rng.normal(2.0, 0.5, (count, 4)).astype(np.float32)))


def points(task="toy") -> Data:
    return Data("points", task, {"train": Points.make(48, 0), "val": Points.make(17, 1)}, {}, (), [], {"sample": "points"})


class Guess(NamedTuple):
    value: torch.Tensor
    noise: torch.Tensor


class ToyTask(Task):
    name, metric, higher_is_better, samples = "toy", "error", False, ("points",)
    recipe_keys = ("jitter", "swap")
    published_defaults = demo_defaults = MappingProxyType({"jitter": 0.1})

    def sample(self, name, seed=0):
        return points()

    def inputs(self, paths):
        raise AssertionError("no files here")

    def transform(self, preprocessing, recipe=None):
        jitter = (recipe or {}).get("jitter", 0.0)
        return lambda sample, rng: {**sample, "x": sample["x"] + np.float32(jitter) * rng.normal(size=4).astype(np.float32)}

    def augment_batch(self, recipe, model_args):
        if not recipe.get("swap"):
            return None
        return lambda batch, g: {**batch, "x": torch.lerp(batch["x"], batch["x"].flip(0), float(torch.rand((), generator=g)))}

    def collate(self, samples):
        return {"x": torch.from_numpy(np.stack([s["x"] for s in samples])), "id": [s["id"] for s in samples]}

    def score(self, predictions, batches):
        wanted = torch.cat([b["x"].sum(1) for b in batches])
        per_sample = (torch.cat([p.value for p in predictions]) - wanted).square().double().numpy()
        return {"error": float(per_sample.mean())}, {"error": per_sample}

    def rows(self, prediction, batch, names):
        return [{"id": i, "value": float(v)} for i, v in zip(batch["id"], prediction.value, strict=True)]


task = ToyTask()


@dataclass(frozen=True)
class Config:
    width: int = 8
    drop_path: float = 0.0


class Toy(Model):
    task = "toy"
    Config = Config

    def __init__(self, config):
        super().__init__(config)
        self.body = nn.Sequential(nn.Linear(4, config.width), nn.Tanh(), nn.Dropout(config.drop_path), nn.Linear(config.width, 1))

    def forward(self, x):
        return self.body(x)[:, 0]

    def loss(self, batch):
        error = (self(batch["x"]) - batch["x"].sum(1)).square().mean()
        return Losses(error, {"square": error})

    def predict(self, batch):
        value = self(batch["x"])
        return Guess(value, torch.randn_like(value))


class ToyGAN(Toy):
    """A critic, moved twice a step by its own optimiser, and a generator that meets the data's mean by pleasing it."""

    def __init__(self, config):
        super().__init__(config)
        self.critic = nn.Sequential(nn.Linear(4, config.width), nn.LeakyReLU(), nn.Linear(config.width, 1))
        self.generator = nn.Linear(2, 4)
        self.register_buffer("calls", torch.zeros(2, dtype=torch.long))

    def training_stages(self):
        own = {"lr": 2e-2, "optimizer": "adam", "betas": (0.5, 0.9)}
        return (
            Stage("adversarial", (Turn("loss_critic", ("critic.*",), repeats=2), Turn("loss_generator", ("generator.*",), recipe=own))),
        )

    def fake(self, like):
        return self.generator(torch.randn(len(like), 2))

    def loss_critic(self, batch):
        assert not any(p.requires_grad for p in self.generator.parameters())
        self.calls[0] += 1
        real = batch["x"]
        fake = self.fake(real).detach()
        between = torch.lerp(real, fake, torch.rand(len(real), 1)).requires_grad_()
        slope = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)[0].norm(dim=1)
        penalty = (slope - 1).square().mean()
        gap = self.critic(fake).mean() - self.critic(real).mean()
        return Losses(gap + 10 * penalty, {"gap": gap, "penalty": penalty})

    def loss_generator(self, batch):
        assert not any(p.requires_grad for p in self.critic.parameters())
        self.calls[1] += 1
        return Losses(-self.critic(self.fake(batch["x"])).mean())


class ToyTwoStage(Toy):
    """A codebook, then a prior over it: the second stage freezes the first and counts what was learnt."""

    def __init__(self, config):
        super().__init__(config)
        self.codes = nn.Parameter(torch.randn(3, 4))
        self.prior = nn.Linear(4, 3)
        self.frozen = False

    def training_stages(self):
        return (
            Stage("codebook", (Turn("loss_codes", ("codes",)),)),
            Stage("prior", (Turn("loss_prior", ("prior.*", "body.*")),), share=2.0, prepare="freeze_codes"),
        )

    def freeze_codes(self):
        self.frozen = True
        self.codes.requires_grad_(False)
        with torch.no_grad():
            self.prior.bias.copy_(torch.randn(3))

    def loss_codes(self, batch):
        assert not self.frozen and not any(p.requires_grad for p in self.prior.parameters())
        return Losses(torch.cdist(batch["x"], self.codes).min(1).values.mean())

    def loss_prior(self, batch):
        assert self.frozen and not self.codes.requires_grad
        code = torch.cdist(batch["x"], self.codes).argmin(1)
        return Losses(nn.functional.cross_entropy(self.prior(batch["x"]), code) + self.loss(batch).total)


class ToyNaN(Toy):
    """Its loss (or, where asked, only its gradient) goes wrong at the third step."""

    gradient_only = False

    def __init__(self, config):
        super().__init__(config)
        self.seen = 0

    def loss(self, batch):
        self.seen += 1
        error = super().loss(batch).total
        if self.seen >= 3:
            zero = self.body[0].weight.sum() * 0
            error = error + (zero.abs().sqrt() if self.gradient_only else zero + float("nan"))
        return Losses(error)


class ToyLens(Lens):
    def __init__(self, depth: int = 1):
        self.depth = depth

    def look(self, model, data, before=None, snapshots=None, others=()):
        assert not model.training
        numbers = {"samples": len(data.splits["val"]), "before": before is not None, "snapshots": [*(snapshots or {})]}
        return Report("toy", numbers={**numbers, "depth": self.depth})


CLASSES = {c.__name__.lower(): c for c in (Toy, ToyGAN, ToyTwoStage, ToyNaN)}


def card_of(slug, class_name, kind="model"):
    demo = {"lr": 0.02, "batch_size": 8, "epochs": 4}
    return Card(
        slug, slug, kind, "toy", "", "", (), {}, {}, {f"{slug}_micro": Variant(f"{slug}_micro", {})}, (), {}, {}, demo, {},
        module=__name__, class_name=class_name,
    )  # fmt: skip


def register(monkeypatch):
    """Put the toys into the catalogue for one test."""
    from formarium import catalogue
    from formarium import task as tasks

    monkeypatch.setitem(tasks.TASKS, "toy", __name__)
    for slug, cls in CLASSES.items():
        monkeypatch.setitem(catalogue.cards(), slug, card_of(slug, cls.__name__))
    monkeypatch.setitem(catalogue.cards(), "toylens", card_of("toylens", "ToyLens", "lens"))

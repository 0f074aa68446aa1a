"""Joint rotational invariance and adversarial training (Berrios and Deza, 2022, arXiv 2203.06649), of any image classifier.

Every training image is turned by 0, 90, 180 or 270 degrees, all as likely. Then, in pixel space, fast adversarial training (Wong et al.,
ICLR 2020) with eps = 2/255 and a step of 1.25 eps:

    noise ~ U(-eps, eps);  noise <- clip(noise + step sign(d loss(clip(x + noise, 0, 1)) / d noise), -eps, eps);
    the loss at clip(x + noise, 0, 1) is minimised.

A CrossViT-18-dagger trained so was the best model of monkeys' area V4 on Brain-Score; `brain_predictivity` has that measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.method import Method
from formarium.methods.wrapping import Wrapped, finish, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, evaluating
from formarium.nn.attacks import fast_adversary, pgd, quarter_turns
from formarium.nn.schedules import StepSchedule, piecewise_linear
from formarium.tasks.batches import batches_of
from formarium.tasks.image_classification.model import ImageClassifier

EPS, STEP = 2 / 255, 2.5 / 255
RATES = (0.4, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)  # of the peak, 2e-4, at the ends of six epochs


class RobustClassifier(Wrapped):
    """A classifier that trains on turned and adversarially perturbed images. It predicts as its trunk does."""

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        adversarial: bool = True
        rotations: bool = True
        grey: float = 0.0  # the share of training images without colour
        eps: float = EPS  # in pixels of [0, 1]
        step: float = STEP
        rates: tuple[float, ...] = RATES  # shares of the recipe's learning rate, linear in between; none: the engine's cosine

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        if config.eps < 0 or config.step < 0 or not 0 <= config.grey <= 1:
            raise BadInput("eps, step, grey", expected="at least 0, the last at most 1", got=f"{config.eps}, {config.step}, {config.grey}")
        super().__init__(config, trunk)
        self.set_preprocessing({k: v for k, v in self.trunk.preprocessing.items() if k in ("mean", "std", "size")})
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self._schedule: StepSchedule | None = None

    def set_preprocessing(self, preprocessing: Any) -> None:
        """The trunk normalises as this model does."""
        super().set_preprocessing(preprocessing)
        if "trunk" in self._modules:
            self.trunk.set_preprocessing(preprocessing)

    # training ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        return (Stage("train", prepare="begin"),)

    def begin(self) -> None:
        self.progress.zero_()
        if self._schedule is not None:
            self._schedule.off()
        self._schedule = StepSchedule(self.parameters(), self.set_rate) if len(self.config.rates) > 1 else None

    def set_rate(self, optimiser: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        group["lr"] = optimiser.defaults["lr"] * piecewise_linear(float(self.progress), self.config.rates)

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        self.progress.fill_(step / steps)

    def loss(self, batch: Batch) -> Losses:
        """The trunk's own loss, in training at turned and perturbed images."""
        if not self.training:
            return self.trunk.loss(batch)
        image = self.perturbed({**batch, "image": self.turned(batch["image"])})
        return self.trunk.loss({**batch, "image": image})

    def turned(self, image: Tensor) -> Tensor:
        """Every image by a random multiple of 90 degrees (of 180 where it isn't square), some without colour."""
        c = self.config
        if c.rotations:
            half, quarter = (torch.rand(2, len(image), device=image.device) < 0.5).long()
            image = quarter_turns(image, 2 * half + (quarter if image.shape[2] == image.shape[3] else 0))
        if c.grey and image.shape[1] == 3:
            luma = (image * image.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, keepdim=True)
            image = torch.where(torch.rand(len(image), 1, 1, 1, device=image.device) < c.grey, luma, image)
        return image

    def perturbed(self, batch: Batch) -> Tensor:
        """One adversarial step from a random start, image by image within eps of the given ones and in [0, 1]."""
        c = self.config
        if not c.adversarial or c.eps == 0:
            return batch["image"]
        n = len(batch["image"])  # sums, as sign and clip don't mind the scale, and tiny gradients keep their sign in half precision
        return fast_adversary(lambda x: self.trunk.loss({**batch, "image": x}).total * n, batch["image"], c.eps, c.step)


class BrainScoreCrossViT(Method):
    """adversarial, rotations, grey: what training adds. eps, step: in 1/255 of the pixels' range. rates: the learning rate's shares (see
    RobustClassifier.Config)."""

    network = RobustClassifier

    def __init__(
        self, adversarial: bool = True, rotations: bool = True, grey: float = 0.0, eps: float = 2.0, step: float | None = None,
        rates: Sequence[float] = RATES,
    ):  # fmt: skip
        self.options = {
            "adversarial": adversarial, "rotations": rotations, "grey": grey, "eps": eps / 255,
            "step": (1.25 * eps if step is None else step) / 255, "rates": tuple(rates),
        }  # fmt: skip

    def needs(self, model: Model) -> str:
        return why_not(model)

    def apply(self, model: Any, data: Any = None) -> RobustClassifier:
        """The same classifier, its weights kept, that trains robustly. Raises BadInput where it is no image classifier."""
        if reason := self.needs(model):
            raise BadInput(f"adversarial training of {type(model).__name__}", expected="an image classifier", got=reason)
        return finish(RobustClassifier(RobustClassifier.Config(**trunk_fields(model), **self.options), model), "brainscore_crossvit", model)


# what it buys -------------------------------------------------------------------------------------------------------


def robustness(
    model: ImageClassifier, data: Any, *, eps: float = EPS, step: float | None = None, iterations: int = 10, restarts: int = 1,
    samples: int = 500, split: str = "val", batch_size: int = 64, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Accuracy on held-out images as they are ("clean"), turned ("90", "180", "270"), after one FGSM step ("fgsm") and after PGD ("pgd").

    data: a Data, a path, "sample:NAME", samples or batches with labels. eps, step (eps / 4 by default): in pixels of [0, 1]. Attacks see
    the model's own loss in
    evaluation mode; the same seed gives the same attack.
    """
    if eps < 0 or iterations < 1 or restarts < 1:
        raise BadInput("attack", expected="eps at least 0, one iteration and one restart at least", got=f"{eps}, {iterations}, {restarts}")
    batches = batches_of(model, data, samples=samples, seed=seed, split=split)
    right: dict[str, int] = {}
    total = 0
    with evaluating(model), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for whole in batches:
            for start in range(0, len(whole["label"]), batch_size):
                image = whole["image"][start : start + batch_size].to(model.device)
                label = whole["label"][start : start + batch_size].to(model.device)
                for name, x in _attacked(model, image, label, eps, step or eps / 4, iterations, restarts).items():
                    with torch.no_grad():
                        said = model.predict({"image": x, "label": label}).label
                    right[name] = right.get(name, 0) + int((said == label).sum())
                total += len(label)
    return {name: count / total for name, count in right.items()}


def _attacked(model: Any, image: Tensor, label: Tensor, eps: float, step: float, iterations: int, restarts: int) -> dict[str, Tensor]:
    def loss_of(x: Tensor) -> Tensor:
        probabilities = model.predict({"image": x, "label": label}).probabilities
        return F.nll_loss(probabilities.clamp_min(1e-12).log(), label, reduction="none")

    out = {"clean": image}
    if image.shape[2] == image.shape[3]:
        out |= {str(90 * k): quarter_turns(image, torch.full_like(label, k)) for k in (1, 2, 3)}
    else:
        out["180"] = quarter_turns(image, torch.full_like(label, 2))
    out["fgsm"] = fast_adversary(loss_of, image, eps, 1.25 * eps)
    out["pgd"] = pgd(loss_of, image, eps, step, iterations, restarts)
    return out

"""SUFO: what a fine-tuned classifier's feature space holds (Hsu et al., ICLR 2024, arXiv 2305.17588).

Features are one vector a sample and layer (the class token where there is one, else the mean of the tokens). Then
S  supervised probing: linear probes on each frozen layer; or the first k blocks frozen and the rest fine-tuned;
U  unsupervised similarity: RSA of each layer before and after fine-tuning, Spearman's correlation of the samples' Euclidean distances;
F  feature dynamics: when, over the steps of fine-tuning, the classes come apart and few principal components carry the space;
   sparsification: what the classifier's head still says of the features without their leading components, or with only one of them;
O  outlier analysis: the samples at the ends of the leading components, those of several models at once, to be named by a person.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.errors import BadInput, FormariumError, UnknownName
from formarium.features import taps
from formarium.lens import Lens, Report, Table
from formarium.lenses import sufo_words as words
from formarium.lenses.freezing import FineTune, freeze_and_tune
from formarium.lenses.outliers import ends
from formarium.lenses.reading import Head, ProbeHead, Reading, layer_names, load_state, name_of, named, read
from formarium.lenses.scores import macro_f1, probe, rounded, scores, structure
from formarium.model import Model
from formarium.nn.components import Components, component_clusters
from formarium.nn.similarity import cka_matrix, rsa_matrix, svcca_matrix
from formarium.task import Data
from formarium.tasks.batches import batches_of, joined

Numbers = dict[str, Any]
MEASURES = ("rsa", "cka", "svcca")
STEPS = 12  # snapshots looked into at most, evenly spaced


class LeftOut(Exception):
    """A part of the report that can't be made of what was given; the message says why."""


@dataclass
class Study:
    """What all parts of one look share: labels, and what each model made of the same samples."""

    model: Model
    batches: list[Numbers]
    label: np.ndarray  # int64 [n]
    names: list[str]
    after: Reading
    report: Report
    stage: str = ""  # what the comparison is with: "before", or the first snapshot
    start: Model | None = None  # the model then, and its features
    before: Reading | None = None
    steps: dict[str, Reading] = field(default_factory=dict)  # the course of fine-tuning, first to last
    others: dict[str, Reading] = field(default_factory=dict)
    train: list[Numbers] | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        return [*self.after.layers]

    @property
    def has_head(self) -> bool:
        """Whether a tap stands before the head."""
        return any(name.startswith("features") for name in self.layers)

    def last(self, reading: Reading) -> Tensor:
        """The features that the head reads (of the last layer, where no tap stands before the head)."""
        found = reading.joint("features*")
        return found if found.shape[1] else [*reading.layers.values()][-1]


class SUFO(Lens):
    """Looks into any classifier whose taps give features.

    samples: how many of the data's, at random. layers: glob or globs over tap names; of more than `most_layers`, evenly spaced ones.
    folds: of the probes' cross-validation. freeze: numbers k of leading blocks to freeze, with all before them (0: the tokeniser
        alone), the rest fine-tuned from `before` as `fine_tune` says; full fine-tuning beside them. Empty: linear probes only.
    metric: of RSA's distances, "euclidean" (the paper's) or "cosine". components: how many leading ones are looked into.
    keep_mean: give the head ablated features around their mean, so that without ablation it says what the model says; False: the
        centred features themselves, as the authors' code does.
    label: the key of a batch that says a sample's class (see `reading.batches_of`), by default what its task says. A model that doesn't
        answer with these classes is read through a linear probe on its last features, which stands in for its head.
    outliers: samples a mode. seed: of the choice of samples and the folds; the same seed gives the same report.
    """

    def __init__(
        self,
        samples: int = 500,
        layers: str | Sequence[str] = "*",
        most_layers: int = 16,
        folds: int = 3,
        freeze: Sequence[int] = (),
        fine_tune: FineTune | Mapping[str, Any] | None = None,
        metric: str = "euclidean",
        components: int = 2,
        keep_mean: bool = True,
        outliers: int = 8,
        batch_size: int = 64,
        seed: int = 0,
        label: str | None = None,
    ):
        if metric not in ("euclidean", "cosine"):
            raise BadInput("metric", expected="'euclidean' or 'cosine'", got=repr(metric))
        least = {"samples": 8, "most_layers": 2, "folds": 2, "components": 1, "outliers": 1, "batch_size": 1}
        for name, value in zip(least, (samples, most_layers, folds, components, outliers, batch_size), strict=True):
            if value < least[name]:
                raise BadInput(name, expected=f"at least {least[name]}", got=str(value))
        self.samples, self.layers, self.most_layers, self.folds = samples, layers, most_layers, folds
        self.freeze, self.metric, self.components, self.keep_mean = tuple(freeze), metric, components, keep_mean
        for key in () if isinstance(fine_tune, FineTune) else (fine_tune or {}):
            if key not in (known := [f.name for f in fields(FineTune)]):
                raise UnknownName("setting of fine_tune", key, known)
        self.fine_tune = fine_tune if isinstance(fine_tune, FineTune) else FineTune(**(fine_tune or {}))
        self.outliers, self.batch_size, self.seed, self.label = outliers, batch_size, seed, label

    def needs(self, model: Model) -> str:
        if not taps(model):
            return "it has no taps, so its features can't be read"
        if getattr(model.config, "dense", False):
            return "it is a dense backbone without a classifier (create it with dense=False)"
        if not hasattr(model, "forward_batch"):
            return "it has no forward_batch, so it can't be run on its task's batches"
        return ""

    def look(
        self,
        model: Model,
        data: Any,
        before: Model | Mapping[str, Tensor] | None = None,
        snapshots: Mapping[int, Any] | None = None,
        others: Sequence[Model] | Mapping[str, Model] = (),
    ) -> Report:
        """model: a fine-tuned classifier. data: labelled samples, see `reading.batches_of`; held-out ones say most.
        before: the model before fine-tuning (or its state dict). snapshots: step -> state dict or .safetensors path, as `fit` keeps them.
        others: more models of the same task, for similarity between models and for outliers that they share.
        Raises BadInput where it can't look into the model or the data has no labels; parts that something is missing for are left out,
        and the report says why.
        """
        study = self._study(model, data, before, snapshots or {}, others)
        parts: dict[str, Callable[[Study], Numbers]] = {
            "probes": self.supervised,
            **({"freezing": self.freezing} if self.freeze else {}),
            "similarity": self.unsupervised,
            "dynamics": self.dynamics,
            "sparsification": self.sparsification,
            "outliers": self.outlying,
        }
        for name, part in parts.items():
            try:
                study.report.numbers[name] = part(study)
            except LeftOut as e:
                study.left_out[name] = str(e)
        study.report.numbers["left_out"] = study.left_out
        study.report.findings += [f"Left out: {name}, {why}." for name, why in study.left_out.items()]
        return study.report

    # what was given -----------------------------------------------------------------------------------------------

    def _study(self, model: Model, data: Any, before: Any, snapshots: Mapping[int, Any], others: Any) -> Study:
        if reason := self.needs(model):
            raise BadInput(f"SUFO on {name_of(model)}", expected="a classifier with taps", got=reason)
        batches = self._batches(model, data)
        label = joined(batches, "label").numpy()
        layers = layer_names(model, batches, self.layers, self.most_layers)
        after = read(model, batches, layers)
        classes = after.logits.shape[1]
        given = (
            [*batches[0].get("label_names", ())]
            or [*(data.names if isinstance(data, Data) else ())]
            or [*(getattr(model, "names", None) or ())]
        )
        names = [str(given[i]) if i < len(given) else f"class {i}" for i in range(classes)]
        if label.min() < 0 or label.max() >= classes:
            raise BadInput("labels", expected=f"0 to {classes - 1}, the model's classes", got=f"{label.min()} to {label.max()}")
        if len(np.unique(label)) < 2:
            raise BadInput("labels", expected="at least two classes among the samples", got=f"only {names[label[0]]!r}")
        study = Study(model, batches, label, names, after, Report(f"SUFO: inside {name_of(model)}"))
        self._follow(study, before, snapshots, layers)
        for name, other in named(others).items():
            try:
                study.others[name] = self._other(study, name, other, data)
            except FormariumError as e:
                study.left_out[f"the model {name}"] = str(e)
        if self.freeze and isinstance(data, Data) and "train" in data.splits:
            study.train = batches_of(model, data, 4 * self.samples, self.batch_size, self.seed, "train", self.label)
        own = scores(label, after.predicted.numpy(), names)
        study.report.numbers |= {"samples": len(label), "classes": names, "layers": layers, "others": [*study.others], "model": own}
        study.report.numbers["own_head"] = after.own_head
        if not after.own_head:
            study.report.findings.append(
                "It doesn't answer with these classes itself: where a head is meant, a linear probe on its last features speaks."
            )
        study.report.findings += words.overview(name_of(model), own, words.counts(label, names))
        return study

    def _batches(self, model: Model, data: Any) -> list[Numbers]:
        return batches_of(model, data, self.samples, self.batch_size, self.seed, key=self.label)

    def _other(self, study: Study, name: str, other: Model, data: Any) -> Reading:
        """Another model's features of the same samples, prepared as it wants them."""
        if reason := self.needs(other):
            raise BadInput(name, expected="a classifier with taps", got=reason)
        batches = self._batches(other, data)
        if not np.array_equal(joined(batches, "label").numpy(), study.label):
            raise BadInput(name, expected="the same samples in the same order", got="others (is the loader shuffled?)")
        reading = read(other, batches, layer_names(other, batches, self.layers, self.most_layers))
        if reading.logits.shape[1] != len(study.names):
            raise BadInput(name, expected=f"{len(study.names)} classes", got=str(reading.logits.shape[1]))
        return reading

    def _follow(self, study: Study, before: Any, snapshots: Mapping[int, Any], layers: list[str]) -> None:
        """Features before fine-tuning and at its snapshots, through copies of the model."""
        clone = copy.deepcopy(study.model) if snapshots or before is not None else study.model
        if before is not None:
            study.start = before if isinstance(before, Model) else load_state(copy.deepcopy(clone), before, "before")
            study.stage, study.before = "before", read(study.start, study.batches, layers)
            study.steps["before"] = study.before
        every = sorted(snapshots)
        for i in sorted({*np.linspace(0, len(every) - 1, min(len(every), STEPS)).round().astype(int).tolist()}):
            stage = f"step {every[i]}"
            reading = read(load_state(clone, snapshots[every[i]], f"snapshot {every[i]}"), study.batches, layers)
            if study.before is None:
                study.stage, study.before, study.start = stage, reading, copy.deepcopy(clone)
            if not _ends_with(study.steps, reading):
                study.steps[stage] = reading
        if study.steps and not _ends_with(study.steps, study.after):
            study.steps["now"] = study.after

    # S ------------------------------------------------------------------------------------------------------------

    def supervised(self, study: Study) -> Numbers:
        """Linear probes on every frozen layer, cross-validated on the samples given; before fine-tuning, too."""
        folds = min(self.folds, int(np.unique(study.label, return_counts=True)[1].min()))
        if folds < 2:
            raise LeftOut("a class has one sample only, so nothing can be held out of a probe's training (give more samples)")
        readings = {**({"before": study.before} if study.before else {}), "after": study.after}
        found: Numbers = {
            stage: {layer: probe(x.numpy(), study.label, folds, self.seed) for layer, x in reading.layers.items()}
            for stage, reading in readings.items()
        }
        largest = np.full_like(study.label, np.bincount(study.label).argmax())
        own, guess = macro_f1(study.label, study.after.predicted.numpy()), macro_f1(study.label, largest)
        columns = ["layer", *(f"{metric} {stage}" for stage in readings for metric in ("macro-F1", "accuracy"))]
        rows = [[layer, *(found[s][layer][m] for s in readings for m in ("macro_f1", "accuracy"))] for layer in study.layers]
        study.report.tables.append(Table(columns, rows, f"Linear probes, {folds}-fold cross-validation, classes weighted evenly"))
        lines = {stage: {layer: p["macro_f1"] for layer, p in found[stage].items()} for stage in readings}
        study.report.figures["Supervised probing: what a linear probe reads off each layer"] = _figures().probes(
            study.layers, lines, {"the model's own head": own, "always the largest class": guess}
        )
        found |= {"own_head": rounded(own), "largest_class": rounded(guess), "folds": folds}
        study.report.findings += words.probes(study.layers, found, study.stage)
        return found

    def freezing(self, study: Study) -> Numbers:
        """The paper's form: the first k blocks frozen, the rest and the head fine-tuned; beside full fine-tuning (key "full")."""
        if study.start is None:
            raise LeftOut("it starts from the model before fine-tuning, and neither before= nor snapshots= was given")
        if study.train is None:
            raise LeftOut('it fine-tunes on a split called "train", and the data has none (give a Data)')
        found: Numbers = {}
        for k in [None, *sorted({*self.freeze})]:
            tuned, frozen = freeze_and_tune(study.start, study.train, k, self.fine_tune, self.seed)
            predicted = read(tuned, study.batches, study.layers[-1]).predicted.numpy()
            found["full" if k is None else str(k)] = {**scores(study.label, predicted, study.names), "frozen_parameters": frozen}
        rows = [[k, v["macro_f1"], v["accuracy"], v["frozen_parameters"]] for k, v in found.items()]
        caption = "Fine-tuning with the first k blocks frozen (0: the tokeniser alone)"
        study.report.tables.append(Table(["k", "macro-F1", "accuracy", "frozen parameters"], rows, caption))
        study.report.findings += words.freezing(found)
        return found

    # U ------------------------------------------------------------------------------------------------------------

    def unsupervised(self, study: Study) -> Numbers:
        """RSA, CKA (debiased) and SVCCA: each layer with itself before fine-tuning, and with the layers of other models."""
        if study.before is None and not study.others:
            raise LeftOut("it compares with the model before fine-tuning (before=, or snapshots) or with others=, and none was given")
        found: Numbers = {}
        if study.before:
            found["before"] = self._with_before(study, study.before)
        if study.others:
            found["others"] = {name: self._with_other(study, other) for name, other in study.others.items()}
            keys = ("rsa", "cka", "svcca", "accuracy", "agreement")
            rows = [[name, *(p[k] for k in keys), " ~ ".join(p["most_alike"])] for name, p in found["others"].items()]
            columns = ["model", "RSA", "CKA", "SVCCA", "accuracy", "same predictions", "most alike layers"]
            study.report.tables.append(Table(columns, rows, f"Similarity of the last features with {name_of(study.model)}'s"))
            shown = {name: (p["layers"], np.array(p["matrix"]["cka"])) for name, p in found["others"].items()}
            study.report.figures["Unsupervised similarity: layer by layer with other models (CKA)"] = _figures().pairs(study.layers, shown)
            accuracy = study.report.numbers["model"]["accuracy"]
            study.report.findings += words.alike(name_of(study.model), accuracy, found["others"])
        return found

    def _with_before(self, study: Study, before: Reading) -> Numbers:
        matrices = self._similar([*before.layers.values()], [*study.after.layers.values()])
        found = {m: {layer: rounded(v) for layer, v in zip(study.layers, matrices[m].diagonal(), strict=True)} for m in MEASURES}
        rows = [[layer, *(found[m][layer] for m in MEASURES)] for layer in study.layers]
        caption = f"Similarity of each layer with itself, {study.stage} and now"
        study.report.tables.append(Table(["layer", "RSA", "CKA", "SVCCA"], rows, caption))
        study.report.figures[f"Unsupervised similarity: each layer, {study.stage} against now"] = _figures().similarity(
            study.layers, found, matrices["cka"], study.stage
        )
        study.report.findings += words.moved(study.layers, found["rsa"], study.stage)
        return found

    def _with_other(self, study: Study, other: Reading) -> Numbers:
        matrices = self._similar([*study.after.layers.values()], [*other.layers.values()])
        last = self._similar([study.last(study.after)], [study.last(other)])
        i, j = np.unravel_index(matrices["rsa"].argmax(), matrices["rsa"].shape)
        return {
            **{m: rounded(last[m][0, 0]) for m in MEASURES},
            "accuracy": rounded((other.predicted.numpy() == study.label).mean()),
            "agreement": rounded((study.after.predicted == other.predicted).double().mean()),
            "most_alike": [study.layers[i], [*other.layers][j]],
            "layers": [*other.layers],
            "matrix": {m: np.round(matrices[m], 4).tolist() for m in MEASURES},
        }

    def _similar(self, xs: list[Tensor], ys: list[Tensor]) -> dict[str, np.ndarray]:
        found = {"rsa": rsa_matrix(xs, ys, self.metric), "cka": cka_matrix(xs, ys, debiased=True), "svcca": svcca_matrix(xs, ys)}
        return {name: np.nan_to_num(values.numpy()) for name, values in found.items()}  # a constant layer is like none

    # F ------------------------------------------------------------------------------------------------------------

    def dynamics(self, study: Study) -> Numbers:
        """Step by step and layer by layer: how far apart the classes are, and how few components carry the space."""
        if len(study.steps) < 2:
            raise LeftOut("it follows the features over fine-tuning, which takes snapshots (fit(..., snapshots=8)) or at least before=")
        steps, label = [*study.steps], study.label
        layers = {step: {layer: structure(x, label) for layer, x in r.layers.items()} for step, r in study.steps.items()}
        last = {step: structure(study.last(r), label) for step, r in study.steps.items()}
        course = [last[step]["separation"] for step in steps]
        enough = course[0] + 0.9 * (course[-1] - course[0])
        apart = next(step for step, s in zip(steps, course, strict=True) if s >= min(enough, course[-1]))
        keys = ("separation", "centroid_accuracy", "cluster_purity", "components_95", "first_two", "participation")
        columns = ["step", "silhouette", "nearest centroid", "cluster purity", "components of 95%", "first two", "participation"]
        rows = [[step, *(last[step][k] for k in keys)] for step in steps]
        study.report.tables.append(Table(columns, rows, "The last features over fine-tuning"))
        planes = {step: Components.of(study.last(r)).project(2).numpy() for step, r in study.steps.items()}
        study.report.figures["Feature dynamics: the last features on their two leading components"] = _figures().planes(
            planes, label, study.names
        )
        curves = {k: np.array([[layers[s][y][k] for y in study.layers] for s in steps]) for k in ("separation", "first_two")}
        study.report.figures["Feature dynamics: separation of the classes and sparsity, by step and layer"] = _figures().course(
            study.layers, steps, curves
        )
        found = {"steps": steps, "layers": layers, "last": last, "apart_by": apart}
        study.report.findings += words.dynamics(found)
        return found

    def sparsification(self, study: Study) -> Numbers:
        """Which components of the last features carry the prediction: the head on features without the k leading ones, or with only one."""
        features = study.last(study.after)
        components = Components.of(features)
        stages = {**({study.stage: Components.of(study.last(study.before))} if study.before else {}), "now": components}
        curves = {stage: c.explained.cumsum(0).numpy() for stage, c in stages.items()}
        found: Numbers = {
            "explained": [rounded(v) for v in components.explained.tolist()],
            "components_95": components.count(0.95),
            "participation": rounded(components.participation),
        }
        if not study.has_head:
            study.left_out["ablation"] = "no tap called `features` stands before the head, so the head can't be given other features"
            study.report.figures["Sparsification: what the leading components explain"] = _figures().explained(curves, {}, [])
            return found
        head: Any = Head(study.model, study.batches, study.after) if study.after.own_head else ProbeHead(features, study.label)
        mean = features.double().mean(0, keepdim=True) * self.keep_mean

        def said(ablated: Tensor) -> Numbers:
            return scores(study.label, head(mean + ablated).argmax(1).numpy(), study.names)

        found["head"] = "affine" if head.affine else "reads the pooled features" if head.whole else "reads more than the pooled features"
        removed = _ever_sparser(len(components.s), 40 if head.affine else 8)
        found["without"] = {str(k): said(components.without_leading(k)) for k in removed}
        found["only"] = {str(k + 1): said(components.only(k)) for k in range(min(self.components + 1, len(components.s)))}
        shown = {f"without the first {k}": v for k, v in found["without"].items() if int(k) <= 5}
        shown |= {f"only component {k}": v for k, v in found["only"].items()}
        columns = ["features", "macro-F1", *(f"{name!r} right" for name in found["without"]["0"]["class_accuracy"])]
        rows = [[what, v["macro_f1"], *v["class_accuracy"].values()] for what, v in shown.items()]
        study.report.tables.append(Table(columns, rows, "The head on features without their leading components, or with only one"))
        study.report.figures["Sparsification: what the leading components explain, and what the head says without them"] = (
            _figures().explained(
                curves, {int(k): v["macro_f1"] for k, v in found["without"].items()}, [v["macro_f1"] for v in found["only"].values()]
            )
        )
        study.report.findings += words.ablated(found)
        return found

    # O ------------------------------------------------------------------------------------------------------------

    def outlying(self, study: Study) -> Numbers:
        """The samples at the ends of each leading component, and those farthest from their own class; which of them other models share."""
        features, label = study.last(study.after), study.label
        mine = ends(features, label, self.components)
        theirs = {name: ends(study.last(r), label, self.components, mine).order for name, r in study.others.items()}
        predicted, sure = study.after.predicted.numpy(), study.after.probabilities.amax(1).numpy()
        wrong = [r.predicted.numpy() != label for r in study.others.values()]
        ids = [str(i) for i in joined(study.batches, "id")] if "id" in study.batches[0] else [f"sample {i}" for i in range(len(label))]
        cells = component_clusters(Components.of(features).project(self.components), len(np.unique(label))).numpy()

        def sample(mode: str, i: int) -> Numbers:
            return {
                "index": i,
                "id": ids[i],
                "label": study.names[label[i]],
                "predicted": study.names[predicted[i]],
                "probability": rounded(sure[i]),
                "cluster": int(cells[i]),
                "shared_by": [name for name, order in theirs.items() if i in order[mode][: 2 * self.outliers]],
                "hint": words.hint(predicted[i] == label[i], sure[i], [bool(w[i]) for w in wrong]),
            }

        modes = [{"mode": mode, "samples": [sample(mode, int(i)) for i in order[: self.outliers]]} for mode, order in mine.order.items()]
        keys = ("id", "label", "predicted", "probability")
        rows = [
            [m["mode"], *(s[k] for k in keys), f"{len(s['shared_by'])} of {len(theirs)}", s["hint"]] for m in modes for s in m["samples"]
        ]
        columns = ["mode", "sample", "label", "predicted", "probability", "shared by", "look for"]
        study.report.tables.append(Table(columns, rows, "Outliers by mode; a person says what those of a mode have in common"))
        if "image" in study.batches[0]:
            images = joined(study.batches, "image").float().numpy()
            shown = {m["mode"]: [(images[s["index"]], s) for s in m["samples"]] for m in modes}
            study.report.figures["Outlier analysis: what lies at the ends (*: other models' outliers, too)"] = _figures().samples(shown)
        if not study.others:
            study.left_out["outliers shared by models"] = "no other models were given (others=)"
        study.report.findings += words.outliers(modes, len(study.others))
        return {"modes": modes, "unclustered": [ids[i] for i in np.flatnonzero(cells < 0)], "clusters": int(cells.max()) + 1}


def _figures() -> Any:
    from formarium.lenses import sufo_figures  # brings matplotlib in

    return sufo_figures


def _ever_sparser(n: int, most: int) -> list[int]:
    """0 to n: the first ones all, then with growing gaps, about `most`."""
    return sorted({*range(min(6, n + 1)), *np.geomspace(1, n, most).round().astype(int).tolist()})


def _ends_with(steps: Mapping[str, Reading], reading: Reading) -> bool:
    return bool(steps) and torch.equal([*steps.values()][-1].logits, reading.logits)

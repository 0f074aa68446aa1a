import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from formarium import create, trace
from formarium.catalogue import cards
from formarium.conformance import checks_for, run
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.features import Tap
from formarium.lenses import sufo_words as words
from formarium.lenses.freezing import FineTune, freeze_and_tune
from formarium.lenses.outliers import ends
from formarium.lenses.reading import Head, read
from formarium.lenses.scores import macro_f1, nearest_centroid, per_class_accuracy, structure
from formarium.lenses.sufo import SUFO
from formarium.nn.components import Components
from formarium.task import Data, task
from formarium.tasks.batches import batches_of, joined
from formarium.tasks.image_classification.model import ImageClassifier

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "sufo").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize("name", checks_for(cards()["sufo"]))
def test_conformance(name):
    assert run(cards()["sufo"], name).ok


class Net(ImageClassifier):
    """Three layers that train in a second. `head` is the kind of head."""

    @dataclass(frozen=True)
    class Config:
        image_size: int = 32
        in_channels: int = 3
        num_classes: int = 10
        dense: bool = False
        width: int = 32
        head: str = "linear"
        taps: bool = True

    def __init__(self, config):
        super().__init__(config)
        self.set_preprocessing({"size": 32, "crop": 1.0})
        w = config.width
        self.embed = nn.Conv2d(3, w, 4, 4)
        self.mix = nn.ModuleList(nn.Sequential(nn.Conv2d(w, w, 3, padding=1, stride=s), nn.BatchNorm2d(w), nn.GELU()) for s in (2, 1))
        self.head = nn.Linear(w, config.num_classes)
        if config.taps:
            self.tokens, self.blocks, self.features = Tap("map"), nn.ModuleList([Tap("map"), Tap("map")]), Tap("map")

    def forward(self, image):
        x = self.embed(image)
        x = self.tokens(x) if self.config.taps else x
        for i, mix in enumerate(self.mix):
            x = self.blocks[i](mix(x)) if self.config.taps else mix(x)
        x = self.features(x) if self.config.taps else x
        if self.config.head == "squashed":
            return self.head(x.mean((2, 3)).tanh())
        if self.config.head == "of tokens":
            return self.head(x.square().mean((2, 3)))
        return self.head(x.mean((2, 3)))


def net(seed: int = 0, **config) -> Net:
    torch.manual_seed(seed)
    return Net(Net.Config(**config)).eval()


@pytest.fixture(scope="module")
def digits() -> Data:
    return task("image-classification").sample("digits")


def trained(data: Data, seed: int = 0, steps: int = 120, **config):
    """(model, the model before, snapshots) after a short training."""
    model = net(seed, **config)
    before, snapshots = copy.deepcopy(model), {}
    batch = batches_of(model, data, 1000, 1000, split="train")[0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(steps + 1):
        if step % 40 == 0:
            snapshots[step] = {k: v.clone() for k, v in model.state_dict().items()}
        at = torch.arange(step * 64, step * 64 + 64) % len(batch["label"])
        optimiser.zero_grad()
        model.loss({"image": batch["image"][at], "label": batch["label"][at]}).total.backward()
        optimiser.step()
    model.load_state_dict(snapshots[steps])
    return model.eval(), before, snapshots


@pytest.fixture(scope="module")
def fitted(digits):
    return trained(digits)


@pytest.fixture(scope="module")
def report(digits, fitted):
    model, before, snapshots = fitted
    return SUFO(samples=200).look(model, digits, before=before, snapshots=snapshots, others=[trained(digits, seed=1, steps=80)[0]])


# the claim and the report -------------------------------------------------------------------------------------------


def test_claim_training_makes_the_feature_space_sparse_and_moves_the_last_layers_most(digits, fitted):
    model, before, _ = fitted
    numbers = SUFO(samples=300).look(model, digits, before=before).numbers
    rsa = [numbers["similarity"]["before"]["rsa"][layer] for layer in ("tokens", "features")]
    assert rsa[0] > 0.9 and rsa[1] < rsa[0] - 0.2
    dynamics = numbers["dynamics"]["last"]
    assert dynamics["now"]["separation"] > dynamics["before"]["separation"] + 0.1
    assert numbers["probes"]["after"]["features"]["macro_f1"] > 0.85 > numbers["probes"]["after"]["tokens"]["macro_f1"]
    raw = structure(joined(batches_of(model, digits, 300), "image").flatten(1), joined(batches_of(model, digits, 300), "label").numpy())
    assert dynamics["now"]["components_95"] < raw["components_95"]


def test_the_report_is_whole(report):
    numbers = json.loads(json.dumps(report.numbers))
    assert {"probes", "similarity", "dynamics", "sparsification", "outliers"} <= {*numbers} and not numbers["left_out"]
    assert numbers["layers"] == ["tokens", "blocks.0", "blocks.1", "features"] and numbers["samples"] == 200
    assert numbers["dynamics"]["steps"] == ["before", "step 40", "step 80", "step 120"]
    assert numbers["sparsification"]["head"] == "affine"
    assert [m["mode"] for m in numbers["outliers"]["modes"]][-1] == "away from their class"
    assert len(report.figures) == 7 and len(report.tables) == 6
    for figure in report.figures.values():
        figure.draw_without_rendering()
    assert len(report.findings) >= 9 and all(f.endswith(".") and "nan" not in f for f in report.findings)
    for table in report.tables:
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_seed_decides_and_nothing_is_left_behind(digits, fitted):
    model, before, snapshots = fitted
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    first, second = (SUFO(samples=100, seed=3).look(model, digits, before=before, snapshots=snapshots).numbers for _ in range(2))
    assert first == second and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.eval()


def test_without_before_snapshots_and_others_it_says_what_it_leaves_out(digits, fitted):
    report = SUFO(samples=100).look(fitted[0], digits)
    assert {*report.numbers["left_out"]} == {"similarity", "dynamics", "outliers shared by models"}
    assert any(f.startswith("Left out: dynamics, it follows") for f in report.findings)
    assert {"probes", "sparsification", "outliers"} <= {*report.numbers}


def test_snapshots_alone_stand_for_before(digits, fitted, tmp_path):
    from safetensors.torch import save_file

    model, _, snapshots = fitted
    save_file(snapshots[0], tmp_path / "0.safetensors")
    numbers = SUFO(samples=100).look(model, digits, snapshots={0: tmp_path / "0.safetensors", 80: snapshots[80]}).numbers
    assert numbers["dynamics"]["steps"] == ["step 0", "step 80", "now"]
    assert numbers["similarity"]["before"]["rsa"]["features"] < 0.9
    with pytest.raises(BadInput, match="snapshot 3: expected a state dict"):
        SUFO(samples=100).look(model, digits, snapshots={3: {"head.weight": torch.zeros(2)}})


def test_models_of_other_shapes_are_compared_and_unfit_ones_left_out(digits, fitted):
    others = {"wide": net(1, width=48), "bare": net(2, taps=False), "binary": net(3, num_classes=2)}
    numbers = SUFO(samples=100).look(fitted[0], digits, others=others).numbers
    assert [*numbers["similarity"]["others"]] == ["wide"]
    assert np.shape(numbers["similarity"]["others"]["wide"]["matrix"]["rsa"]) == (4, 4)
    assert "no taps" in numbers["left_out"]["the model bare"] and "10 classes" in numbers["left_out"]["the model binary"]
    again = SUFO(samples=100).look(fitted[0], digits, others=[fitted[0]]).numbers["similarity"]["others"]["Net"]
    assert again["rsa"] == again["cka"] == again["svcca"] == again["agreement"] == 1


# the head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "affine", "whole"), [("linear", True, True), ("squashed", False, True), ("of tokens", False, False)])
def test_the_head_on_unchanged_features_says_what_the_model_says(digits, kind, affine, whole):
    model = net(head=kind)
    batches = batches_of(model, digits, 100, 32)
    reading = read(model, batches)
    head = Head(model, batches, reading)
    assert (head.affine, head.whole) == (affine, whole)
    torch.testing.assert_close(head(reading.layers["features"]), reading.logits, atol=1e-4, rtol=1e-3)


def test_the_head_is_applied_to_the_features_it_is_given(digits):
    model = net()
    batches = batches_of(model, digits, 50, 32)
    head, x = Head(model, batches, read(model, batches)), torch.randn(50, 32)
    torch.testing.assert_close(head(x), model.head(x), atol=1e-4, rtol=1e-4)
    crooked = net(head="squashed")
    torch.testing.assert_close(Head(crooked, batches, read(crooked, batches))(x), crooked.head(x.tanh()), atol=1e-4, rtol=1e-4)


def test_ablation_with_and_without_the_mean(digits, fitted):
    model = fitted[0]
    kept, bare = (SUFO(samples=200, keep_mean=keep).look(model, digits).numbers for keep in (True, False))
    assert kept["sparsification"]["without"]["0"] == kept["model"]
    assert bare["sparsification"]["without"]["0"] != bare["model"]
    gone = kept["sparsification"]["without"][str(len(kept["sparsification"]["explained"]))]
    assert sum(n > 0 for n in gone["predicted"].values()) == 1  # all features alike: one answer for all
    batches = batches_of(model, digits, 200)
    x = read(model, batches).layers["features"].double()
    u, s, vh = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    said = model.head(torch.from_numpy((u[:, 2:] * s[2:]) @ vh[2:]).float()).argmax(1)
    assert bare["sparsification"]["without"]["2"]["macro_f1"] == pytest.approx(macro_f1(joined(batches, "label").numpy(), said.numpy()))


# outliers -----------------------------------------------------------------------------------------------------------


def test_a_wrong_label_is_found(digits, fitted):
    dataset = digits.splits["val"]
    samples = [dict(dataset[i]) for i in range(120)]
    victim = next(i for i, s in enumerate(samples) if s["label"] == 0)
    samples[victim] |= {"label": 7, "id": "the mislabelled one"}
    report = SUFO(samples=120).look(fitted[0], samples)
    away = report.numbers["outliers"]["modes"][-1]["samples"]
    found = next(s for s in away if s["id"] == "the mislabelled one")
    assert found["predicted"] == "class 0" and found["hint"].startswith("the label")
    assert any("Check the labels" in f and "the mislabelled one" in f for f in report.findings)


def test_modes_are_paired_between_models_whatever_their_axes_signs_and_order():
    g = torch.Generator().manual_seed(0)
    plane = Components.of(torch.randn(100, 2, generator=g)).u * torch.tensor([3.0, 2.0])
    label = np.arange(100) % 3
    mine = ends(plane, label)
    swapped = torch.stack([-1.2 * plane[:, 1], 0.4 * plane[:, 0], torch.zeros(100)], 1)
    theirs = ends(swapped, label, 2, mine)
    for mode in [*mine.order][:4]:
        assert mine.order[mode][:10].tolist() == theirs.order[mode][:10].tolist(), mode


# freezing -----------------------------------------------------------------------------------------------------------


def test_freezing_the_first_blocks_moves_only_what_comes_after(digits):
    start = net()
    train = batches_of(start, digits, 128, 64, split="train")
    how = FineTune(lr=1e-2, epochs=1, batch_size=32)
    for k, still in [(None, ()), (0, ("embed",)), (1, ("embed", "mix.0")), (2, ("embed", "mix.0", "mix.1"))]:
        tuned, frozen = freeze_and_tune(start, train, k, how)
        state = start.state_dict()
        kept = {n for n, v in tuned.state_dict().items() if torch.equal(v, state[n])}
        assert kept == {n for n in state if n.startswith(still)} if still else not kept, k
        assert frozen == sum(p.numel() for n, p in start.named_parameters() if still and n.startswith(still))
    with pytest.raises(BadInput, match="up to 2"):
        freeze_and_tune(start, train, 3, how)


def test_freezing_in_a_report(digits, fitted):
    lens = SUFO(samples=100, freeze=(2, 0), fine_tune={"lr": 1e-2, "epochs": 1, "batch_size": 64})
    report = lens.look(fitted[0], digits, before=fitted[1])
    assert [*report.numbers["freezing"]] == ["full", "0", "2"]
    assert "freezing" in lens.look(fitted[0], digits).numbers["left_out"]
    assert '"train"' in lens.look(fitted[0], batches_of(fitted[0], digits, 100), before=fitted[1]).numbers["left_out"]["freezing"]


def test_fine_tuning_is_the_papers_where_the_model_is_published():
    assert FineTune().of(create("pvt_tiny", num_classes=2)) == (7.6e-6, 25, 8)
    assert FineTune(epochs=2).of(create("pvt_micro")) == (2e-3, 2, 64)


# what is given ------------------------------------------------------------------------------------------------------


def test_data_in_every_form_gives_the_same_samples(digits):
    model = net()
    some = [digits.splits["val"][i] for i in range(10)]
    batches = batches_of(model, some, 10, 4)
    assert [len(b["label"]) for b in batches] == [4, 4, 2] and batches[0]["image"].dtype == torch.float32
    for data in (batches, iter(batches), {k: joined(batches, k) for k in batches[0]}):
        again = batches_of(model, data, 9)
        assert joined(again, "id") == [s["id"] for s in some][:9]
        assert torch.equal(joined(again, "image"), joined(batches, "image")[:9])
    assert joined(batches_of(model, digits, 20), "id") == joined(batches_of(model, digits, 20), "id")
    assert len({*joined(batches_of(model, digits, 60), "label").tolist()}) == 10


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "labelled samples"),
        (3, "Data, samples, a loader or batches"),
        ([torch.zeros(3)], "a dict of tensors"),
        ([{"image": torch.rand(8, 3, 32, 32)}], "samples with labels"),
        ([{"image": torch.rand(8, 3, 32, 32), "label": torch.zeros(8, dtype=torch.int64)}], "at least two classes"),
        ([{"image": torch.rand(8, 3, 32, 32), "label": torch.arange(8) + 5}], "0 to 9, the model's classes"),
    ],
)
def test_unusable_data_is_refused_clearly(data, said):
    with pytest.raises(BadInput, match=said):
        SUFO().look(net(), data)


def test_models_it_can_not_look_into_and_bad_options():
    batch = {"image": torch.rand(8, 3, 32, 32), "label": torch.arange(8)}
    for model, why in [(net(taps=False), "no taps"), (create("pvt_micro", dense=True), "dense backbone")]:
        assert why in SUFO().needs(model)
        with pytest.raises(BadInput, match=why):
            SUFO().look(model, batch)
    for options in ({"metric": "manhattan"}, {"samples": 3}, {"components": 0}, {"folds": 1}):
        with pytest.raises(BadInput):
            SUFO(**options)
    with pytest.raises(UnknownName, match="epochs"):
        SUFO(fine_tune={"epoch": 3})


def test_one_sample_a_class_leaves_probes_out(fitted):
    batch = {"image": torch.rand(10, 3, 32, 32), "label": torch.arange(10)}
    left_out = SUFO().look(fitted[0], batch).numbers["left_out"]
    assert "one sample only" in left_out["probes"]


def test_a_class_token_that_knows_nothing_yet_is_not_taken_for_the_layer():
    model = create("pvt_micro").eval()
    batch = {"image": torch.rand(4, 3, 32, 32), "label": torch.arange(4)}
    layers = read(model, [batch]).layers
    assert all(x.std(0).max() > 0 for x in layers.values())
    features = trace(model, batch, at="features")["features"]
    torch.testing.assert_close(layers["features"], features.tokens[:, 0])


def test_scores():
    label, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 3])
    np.testing.assert_array_equal(per_class_accuracy(label, predicted), [0.5, 1, 0, np.nan])
    np.testing.assert_array_equal(per_class_accuracy(label, predicted, 3), [0.5, 1, 0])
    x = np.array([[0.0], [1.0], [10.0], [11.0], [4.0]])
    assert nearest_centroid(x, np.array([0, 0, 1, 1, 1])) == 0.8


def test_findings_say_what_to_do():
    after = {"a": 0.2, "b": 0.91, "c": 0.9, "d": 0.92, "e": 0.92}
    found = {"after": {k: {"macro_f1": v} for k, v in after.items()}, "own_head": 0.8, "largest_class": 0.1}
    early, head = words.probes([*after], found, "")
    assert early.startswith("A linear probe reads the classes off 'b'") and "3 layers behind it" in early and "train the head anew" in head
    full = {"full": {"macro_f1": 0.9}, "0": {"macro_f1": 0.9}, "2": {"macro_f1": 0.89}, "4": {"macro_f1": 0.5}}
    assert "first 2 blocks frozen" in words.freezing(full)[0]
    assert "Every part has to move" in words.freezing({"full": {"macro_f1": 0.9}, "2": {"macro_f1": 0.7}})[0]
    assert "first 2 of 3 layers hardly moved" in words.moved(["a", "b", "c"], {"a": 0.99, "b": 0.95, "c": 0.3}, "before")[1]
    pairs = {"x": {"rsa": 0.9, "agreement": 0.8, "accuracy": 0.9}, "y": {"rsa": 0.1, "agreement": 0.5, "accuracy": 0.4}}
    near, ensemble = words.alike("m", 0.9, pairs)
    assert near.startswith("x sees") and "x errs most on its own" in ensemble  # y is too weak to advise
    uneven = {"accuracy": 0.9, "macro_f1": 0.7, "class_accuracy": {"common": 0.97, "rare": 0.2}}
    assert (
        "'rare' has 10 of 100 samples and is 20% right; sample classes evenly" in words.overview("m", uneven, {"common": 90, "rare": 10})[1]
    )
    course = {"separation": 0.0, "components_95": 9, "first_two": 0.3}
    for now, said in [(0.4, "by 'step 9'"), (0.03, "still overlap"), (0.0, "check the learning rate")]:
        last = {"before": course, "step 9": {**course, "separation": now, "components_95": 3}}
        apart, sparse = words.dynamics({"steps": [*last], "last": last, "apart_by": "step 9"})
        assert said in apart and "grew sparse" in sparse


@pytest.mark.slow
@pytest.mark.parametrize("slug", [c.slug for c in cards().values() if c.kind == "model" and c.task == "image-classification"])
def test_every_classifier_of_this_package_can_be_looked_into(slug, digits):
    torch.manual_seed(0)
    report = SUFO(samples=100).look(create(f"{slug}_micro", num_classes=10), digits)
    told = {"arbex": "reads the pooled features", "spectformer": "reads more than the pooled features"}  # an MLP; a head over all tokens
    assert report.numbers["sparsification"]["head"] == told.get(slug, "affine")


def test_the_authors_other_metric_and_pairs_are_replayed():
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    from formarium.authors.sufo import similarity

    g = torch.Generator().manual_seed(0)
    sets = {name: torch.randn(2, 12, 5, generator=g) for name in ("finetuned", "pretrained", "finetuned2", "pretrained2")}
    two = {name: sets[name] for name in ("finetuned", "pretrained")}
    header = {"reference": {"constructor": {"dis_flag": "cos"}}, "outputs": [{"path": "rsa"}]}
    tuned, plain = two["finetuned"].double(), two["pretrained"].double()
    expected = [spearmanr(1 - pdist(t.numpy(), "cosine"), pdist(p.numpy())).statistic for t, p in zip(tuned, plain, strict=True)]
    np.testing.assert_allclose(similarity(header, two, {})["rsa"].numpy(), expected, atol=1e-6)
    moved = [(sets[a] - sets[b]).double().norm(dim=2).numpy() for a, b in (("finetuned", "finetuned2"), ("pretrained", "pretrained2"))]
    expected = [spearmanr(t, p).statistic for t, p in zip(*moved, strict=True)]
    header = {"reference": {"constructor": {}}, "outputs": [{"path": "rsa"}]}
    np.testing.assert_allclose(similarity(header, sets, {})["rsa"].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        ("shapeformer_micro", None),
        ("graph_transformer_micro", None),
        ("mogo_micro", "half"),
        ("squeezeformer_micro", "half"),
        ("vitpose_micro", "half"),
    ],
)
def test_it_looks_into_models_of_every_modality(variant, label):
    torch.manual_seed(0)
    model = create(variant).eval()
    batches = [model.example_batch(16, seed=i) for i in range(3)]
    for batch in batches:
        batch["half"] = ["left" if j % 2 else "right" for j in range(16)]
    report = SUFO(samples=48, label=label).look(model, batches)
    assert report.numbers["probes"]["after"] and report.findings and report.figures
    assert report.numbers["own_head"] == (variant == "shapeformer_micro")
    assert report.numbers["sparsification"]["components_95"] > 0


def test_classes_come_from_strings_and_numbers():
    torch.manual_seed(0)
    model = create("pvt_micro").eval()
    batch = model.example_batch(12)
    batch["kind"], batch["size"] = ["b", "a", "c"] * 4, torch.linspace(0, 1, 12)
    named = batches_of(model, [batch], key="kind")[0]
    assert named["label_names"] == ["a", "b", "c"] and named["label"].tolist() == [1, 0, 2] * 4
    thirds = batches_of(model, [batch], key="size")[0]
    assert thirds["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(BadInput, match="one class"):
        batches_of(model, [{**batch, "odd": torch.zeros(12, 3)}], key="odd")

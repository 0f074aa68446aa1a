from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.lenses.circuits import CircuitFinder, de_embed, graph, pull_back
from formarium.lenses.transcoders import Transcoders, sample_language_model
from formarium.nn.gpt import GPT, DecoderView
from formarium.nn.transcoder import Transcoder, train_transcoder

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "transcoders").glob("*.safetensors"))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = GPT(20, context=12, dim=16, layers=3, heads=2).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model, torch.randint(20, (16, 12))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(("dim", "features", "count"), [(768, 24576, 37774848), (1024, 32768, 67143680)])
def test_parameter_counts(dim, features, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transcoder(dim, dim, features).parameters()) == count


@torch.no_grad()
def test_claim_features_and_bias_add_up_to_the_output():
    made, x, r = Transcoder(8, 8, 40), torch.randn(5, 8), torch.randn(8)
    nn.init.normal_(made.b_dec_out)
    out, z = made(x)
    torch.testing.assert_close(z @ pull_back(made, r) + made.b_dec_out @ r, out @ r)


@torch.no_grad()
def test_claim_with_the_mlps_own_neurons_it_is_the_mlp():
    into, out = nn.Linear(6, 24), nn.Linear(24, 6)
    made = Transcoder(6, 6, 24)
    made.W_enc.copy_(into.weight.T)
    made.b_enc.copy_(into.bias)
    made.W_dec.copy_(out.weight.T)
    made.b_dec_out.copy_(out.bias)
    x = torch.randn(7, 6)
    torch.testing.assert_close(made(x)[0], out(torch.relu(into(x))))


def finder_of(small) -> tuple[CircuitFinder, DecoderView]:
    model, tokens = small
    view = DecoderView(model)
    torch.manual_seed(1)
    made = [Transcoder(16, 16, 64).eval() for _ in range(3)]
    return CircuitFinder(view, made, view.run(tokens[:1])), view


@torch.no_grad()
def test_claim_all_parts_add_up_to_the_residual(small):
    finder, _ = finder_of(small)
    for layer in range(3):
        parts = finder.accounts(layer, torch.randn(16), token=9)
        total = parts.pop("total")
        assert sum(parts.values()) == pytest.approx(total, abs=1e-4)


@torch.no_grad()
def test_claim_the_invariant_part_is_the_same_for_every_prompt(small):
    _, tokens = small
    finder, view = finder_of(small)
    start = finder.start(2, 5, -1)
    other = CircuitFinder(view, finder.transcoders, view.run(tokens[1:2]))
    direction = finder.transcoders[2].W_enc[:, 5]
    assert torch.equal(pull_back(finder.transcoders[0], direction), pull_back(other.transcoders[0], direction))
    assert not torch.allclose(finder.active[0][-1], other.active[0][-1])
    assert start.node.token == 11


@torch.no_grad()
def test_a_views_activations_are_the_models(small):
    model, tokens = small
    view = DecoderView(model)
    found = view.run(tokens[:2])
    torch.testing.assert_close(found.logits, model(tokens[:2]))
    for i, block in enumerate(model.h):
        torch.testing.assert_close(found.norm2[i] * block.ln_2.weight + block.ln_2.bias, block.ln_2(found.mid[i]), rtol=1e-4, atol=1e-5)
        written = torch.einsum("bhds,bshw,hwm->bdm", found.pattern[i], found.value[i], view.w_o(i)) + block.attn.c_proj.bias
        torch.testing.assert_close(written, found.mid[i] - found.before[i], rtol=1e-3, atol=1e-4)
    head = found.norm1[0][0] @ view.w_v(0)[1]
    bias = model.h[0].ln_1.bias @ view._weight(model.h[0].attn.c_attn)[:, 32:] + model.h[0].attn.c_attn.bias[32:]
    torch.testing.assert_close(head + bias.view(2, 8)[1], found.value[0][0, :, 1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_paths_start_at_the_feature_and_are_capped(small):
    finder, _ = finder_of(small)
    feature = int(finder.active[2][11].argmax())
    paths = finder.paths(2, feature, 11, length=3, branches=4)
    for length, same in enumerate(paths):
        for path in same:
            assert len(path) == length + 2 and path[0].node.index == feature and path[0].node.layer == 2
            assert all(b.contribution <= a.contribution + 1e-6 for a, b in pairwise(path[:2]))
            assert all(b.node.layer <= a.node.layer and b.node.token <= a.node.token for a, b in pairwise(path))
    nodes, edges = graph(paths)
    assert len(nodes) > 3 and all(low in nodes and high in nodes for low, high in edges)


@torch.no_grad()
def test_what_a_step_contributes_is_what_its_ablation_takes_away(small):
    """Of the direct paths: a first-layer feature's contribution to a direction is what leaves when its decoder row is zero."""
    finder, _ = finder_of(small)
    start = finder.start(1, 3, 7)
    step = next(s for s in finder.contributions(start, 64) if s.node.kind == "mlp")
    z = finder.active[step.node.layer][7, step.node.index]
    assert step.contribution == pytest.approx(float(z * step.invariant), rel=1e-4)


def test_known_features_are_recovered():
    """60 sparse binary features in 24 dimensions, each with an output of its own."""
    g = torch.Generator().manual_seed(0)
    ways, outs = (torch.nn.functional.normalize(torch.randn(60, 24, generator=g), dim=1) for _ in range(2))
    active = (torch.rand(8000, 60, generator=g) < 0.04).float()
    x, y = active @ ways, active @ outs
    kept = active.sum(1) > 0
    made, _ = train_transcoder(x[kept], y[kept], 96, l1=1e-2, lr=3e-3, steps=900, batch=512)
    cosine = torch.nn.functional.normalize(made.W_dec.detach(), dim=1) @ outs.T
    out, z = made(x[kept])
    linear = x[kept] @ torch.linalg.lstsq(x[kept], y[kept]).solution
    assert cosine.amax(0).mean() > 0.9  # random rows reach about 0.5
    assert (out - y[kept]).square().mean() < (linear - y[kept]).square().mean()
    assert (z > 0).float().sum(1).mean() < 7  # 2.6 in truth


def test_ghost_gradients_reach_dead_features_alone():
    made = Transcoder(8, 8, 16)
    with torch.no_grad():
        made.b_enc[:4] = -100
    x = torch.randn(32, 8)
    dead = torch.arange(16) < 4
    plain, ghosted = (torch.autograd.grad(made.loss(x, x, 0.0, d).total, made.b_enc)[0] for d in (None, dead))
    assert plain[:4].abs().sum() == 0
    with torch.no_grad():
        made.b_enc[:4] = -2
    ghosted = torch.autograd.grad(made.loss(x, x, 0.0, dead).ghost, made.W_dec)[0]
    assert ghosted[:4].abs().sum() > 0 and ghosted[4:].abs().sum() == 0


def test_it_looks_into_a_model_trained_here():
    model, tokens, letters = sample_language_model(steps=100)
    report = Transcoders(features=192, steps=200, lr=2e-3, tokens=12_000, names=letters).look(model, tokens)
    layers = report.numbers["layers"]
    assert all(r["gap"] < 0.3 and r["l0"] < 80 for r in layers)
    assert len(report.figures) == 3 and len(report.tables) == 3 and report.findings
    assert len(report.numbers["excited_by"]) == 5 and report.numbers["circuit"]["activation"] > 0


def test_it_looks_into_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(30, (16, 12))
    view = DecoderView(model)
    found = view.run(tokens)
    theirs = model(tokens, output_attentions=True).attentions
    for ours, wanted in zip(found.pattern, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    report = Transcoders(features=32, steps=20).look(model, tokens)
    assert report.numbers["circuit"]["layer"] == 1
    parts = dict(report.numbers["circuit"]["accounts"])
    assert sum(v for k, v in parts.items() if k != "total") == pytest.approx(parts["total"], abs=1e-3)
    assert de_embed(view, Transcoder(16, 16, 8), 3).shape == de_embed(view, Transcoder(16, 16, 8), 3, 0, 1).shape == (30,)


def test_bad_input(small):
    model, tokens = small
    with pytest.raises(BadInput, match="GPT-2-like"):
        Transcoders().look(nn.Linear(3, 3), tokens)
    with pytest.raises(BadInput, match="int64"):
        Transcoders().look(model, tokens.float())
    with pytest.raises(BadInput, match="0 to 19"):
        Transcoders().look(model, tokens + 5)
    with pytest.raises(BadInput, match="steps"):
        Transcoders(steps=0)
    with pytest.raises(BadInput, match="layer"):
        Transcoders(features=8, steps=2, layer=7).look(model, tokens)

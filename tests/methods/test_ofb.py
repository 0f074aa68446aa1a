import time
from pathlib import Path

import pytest
import torch

import formarium
from formarium import catalogue, create
from formarium.authors import authors_of, load_state
from formarium.engine.benchmarking import cost
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.methods.ofb import OFB, Searched, masked_tokens, narrowable, reconstruction_loss
from formarium.methods.ofb_space import Space, attention_cells, embedding_cells, hidden_cells
from formarium.tasks.image_classification.trunks import ViT

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "ofb").glob("*.safetensors"))
BACKBONES = catalogue.cards()["ofb"].demo["backbones"]


@pytest.fixture
def model() -> Searched:
    torch.manual_seed(0)
    return create("ofb_micro").eval()


def space(n: int = 16) -> Space:
    torch.manual_seed(0)
    return Space((4, n), *attention_cells(4, n))


def settle(model: Searched) -> None:
    """One living cell in the middle of every space, sparsity alone."""
    for _, one in model.named_spaces():
        if one.searched:
            one.alive.zero_()[len(one.heads) // 2, len(one.widths) // 2] = True
    model.set_w(0.0)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(("name", "count"), [("ofb_deit_small", 22370506), ("ofb_deit_base", 87206486)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert create(name).parameters_count == count


def test_the_candidates_are_the_papers():
    assert attention_cells(6, 64) == ((2, 4, 6), (16, 24, 32, 40, 48, 56, 64))
    assert len(hidden_cells(1536)) == 7 and hidden_cells(1536)[0] == 384
    assert embedding_cells(384) == tuple(range(192, 385, 12)) and len(embedding_cells(384)) == 17
    assert attention_cells(3, 16, even=False)[0] == (1, 2, 3) and attention_cells(3, 16)[0] == (2,)


@torch.no_grad()
def test_claim_the_mask_falls_with_the_rank_and_is_one_inside_every_living_cell():
    one = space()
    m = one.mask()
    assert (m >= 0).all() and (m <= 1 + 1e-6).all()
    assert (m.diff(dim=0) <= 1e-6).all() and (m.diff(dim=1) <= 1e-6).all()
    torch.testing.assert_close(m[: one.heads[0], : one.widths[0]], torch.ones(2, 4))
    one.alive[-1, -1] = False
    assert one.shares()[-1, -1] == 0 and one.shares().sum() == pytest.approx(1)


@torch.no_grad()
def test_claim_importance_alone_ignores_sizes_and_sparsity_alone_only_ranks():
    one = space()
    before = one.gate(1.0), one.gate(0.0)
    one.score.mul_(3)  # the same order
    torch.testing.assert_close(one.gate(0.0), before[1])
    one.score.div_(3)
    one.alpha.add_(torch.rand_like(one.alpha))
    torch.testing.assert_close(one.gate(1.0), before[0])
    assert not torch.allclose(one.gate(0.0), before[1])


@torch.no_grad()
def test_the_best_scored_units_are_covered_most():
    one = space()
    gate = one.gate(0.0)
    best = one.score.sigmoid().sum(1).argmax()
    assert gate[best].sum() == gate.sum(1).max()
    assert gate[best][one.score[best].argmax()] == gate.max()


def test_claim_the_one_hot_loss_falls_as_shares_get_more_one_hot():
    one, seen = space(), []
    for sharp in (0.1, 1.0, 3.0, 9.0, 30.0):
        one.scale = sharp
        seen.append(one.one_hot_loss(4e-4).item())
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0 < seen[0]  # the tangent is negative near one-hot
    one.alpha.data.zero_()
    assert torch.isfinite(one.one_hot_loss(0.0))  # all equal: the tangent's pole


@torch.no_grad()
def test_small_cells_die_and_one_is_left():
    one = space()
    one.scale = 40.0
    one.alpha.zero_()[1, 3] = 1.0
    assert not space().compress() and one.compress()
    assert int(one.alive.sum()) == 1 and one.one_hot_loss(1.0) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["ofb_micro", "plain"])
def test_claim_cutting_units_of_gate_zero_changes_nothing(name):
    torch.manual_seed(0)
    model = create("ofb_micro", target=0.99, **({} if name == "ofb_micro" else {"embedding": False, "embedded": False})).eval()
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))
    settle(model)
    x, before = model.example(2)[0], model.parameters_count
    gated = model(x)
    model.narrow()
    torch.testing.assert_close(model(x), gated, rtol=1e-4, atol=1e-5)
    assert model.parameters_count < before / 1.5 and not hasattr(model, "spaces") and not model.searching
    assert {*dict(model.named_parameters())} == {f"trunk.{n}" for n, _ in model.trunk.named_parameters()}


@torch.no_grad()
def test_claim_folding_changes_nothing():
    torch.manual_seed(0)
    model = create("ofb_micro", embedding=False, embedded=False, target=1.0).eval()
    model.set_w(0.7)
    x = model.example(2)[0]
    for _, one in model.named_spaces():
        one.alpha.zero_()[-1, -1] = 1e4  # the full size
    gated = model(x)
    model.narrow()
    torch.testing.assert_close(model(x), gated, rtol=1e-4, atol=1e-5)
    assert model.config.sizes[0] == (4, 16)


def test_the_embeddings_search_is_not_pre_norm(model):
    x = model.example(1)[0]
    with torch.no_grad():
        model.embedding.score.fill_(50.0)
        model.set_w(1.0)
        for _, one in model.named_spaces():
            one.score.fill_(50.0)  # every gate is 1
        assert not torch.allclose(model(x), model.trunk(x), atol=1e-4)
        torch.testing.assert_close(model.embedding.gate(), torch.ones(1, 64))


def test_masking_paints_the_masked_pixels_alone():
    image, painted = torch.rand(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    masked = masked_tokens(torch.rand(2, 64), 0.75)
    assert (masked.sum(1) == 16).all()
    where = masked.unflatten(1, (8, 8))
    other = painted + (1 - where.repeat_interleave(4, 1).repeat_interleave(4, 2))[:, None] * 7
    torch.testing.assert_close(reconstruction_loss(image, painted, where), reconstruction_loss(image, other, where))
    flat = reconstruction_loss(torch.full((1, 3, 32, 32), 0.3), torch.zeros(1, 3, 32, 32), torch.ones(1, 8, 8))
    assert flat < 0.3  # nothing to normalise by, and no NaN


def test_the_search_goes_from_importance_to_sparsity_and_masks_more_and_more(model):
    seen = []
    for done in (0.0, 0.2, 0.4, 1.0):
        model.set_progress(done)
        seen.append((model.spaces[0].w, model.keep))
    assert seen[0] == pytest.approx((0.99, 0.95)) and seen[2] == pytest.approx((0.1, 0.75)) and seen[3] == pytest.approx((0.1, 0.75))
    assert seen[1][0] == pytest.approx(0.545)


def test_the_loss_reaches_weights_scores_and_logits(model):
    model.train().set_progress(0.2)
    losses = model.search_loss(model.example_batch(4))
    assert {*losses.terms} >= {"cross_entropy", "one_hot_attention", "one_hot_mlp", "one_hot_embedding", "budget", "reconstruction"}
    losses.total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == ["alpha_patch"]  # as in the authors' network
    assert model.spaces[0].alpha.grad.abs().sum() > 0 and model.embedding.score.grad.abs().sum() > 0


@pytest.mark.parametrize("name", BACKBONES)
def test_it_goes_on_models_of_the_catalogue(name):
    torch.manual_seed(0)
    trunk = create(name).eval()
    before, x = trunk.parameters_count, trunk.example(2)
    flops = cost(trunk, x)[0]
    made = OFB(target=0.95).apply(trunk)
    made.train().set_progress(0.3)
    made.search_loss(made.example_batch(2)).total.backward()
    made.eval()
    settle(made)
    with torch.no_grad():
        gated = made(*x)
        made.narrow()
        torch.testing.assert_close(made(*x), gated, rtol=1e-3, atol=1e-4)
    assert made.parameters_count < before and cost(made, x)[0] < flops
    again = Searched(made.config)
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again.eval()(*x), made(*x))


def test_the_budget_is_kept():
    for share in (0.35, 0.5, 0.8):
        torch.manual_seed(0)
        trunk = ViT(ViT.Config(image_size=32, patch_size=4, dim=64, depth=4, heads=4, num_classes=10))
        whole = trunk.parameters_count
        made = OFB(target=share).apply(trunk)
        assert made.parameters_left().item() <= whole and made.budget_loss() >= 0
        made.narrow()
        assert share - 0.1 < made.parameters_count / whole <= share


def test_it_says_where_it_cannot():
    assert "narrowed" in OFB().needs(create("efficientvit_micro"))
    assert "already" in OFB().needs(create("ofb_micro"))
    assert "embedding" in OFB(embedding=True).needs(create("pvt_micro"))
    with pytest.raises(BadInput, match="target"):
        OFB(target=0)
    with pytest.raises(UnknownName, match="attention"):
        OFB(attention="all")
    with pytest.raises(BadInput, match="units"):
        create("ofb_micro", units=("blocks.0.norm1",))
    with pytest.raises(BadInput, match="narrowed"):
        OFB().apply(create("efficientvit_micro"))


def test_what_belongs_to_each_head_keeps_its_heads():
    torch.manual_seed(0)
    units, modes = narrowable(create("crossformer_micro").eval())  # a position bias for each head
    assert {modes[n] for n, u in units.items() if u.kind == "attention"} == {"channels"}
    assert {modes[n] for n, u in units.items() if u.kind == "mlp"} == {"joint"}


def test_saving_loading_and_a_fit(tmp_path):
    torch.manual_seed(0)
    made = OFB(target=0.65).apply(create("smt_micro"))
    run = formarium.fit(made, "sample:digits", out=tmp_path / "run", steps=6, batch_size=16, progress=False, validations=1)
    assert not run.model.searching and run.model.parameters_count <= 0.65 * create("smt_micro").parameters_count
    loaded = formarium.load(tmp_path / "run")
    x = loaded.example(2)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), run.model.eval()(x))
    assert loaded.config.sizes == run.model.config.sizes and loaded.parameters_count == run.model.parameters_count
    fresh = OFB(target=0.65).apply(create("smt_micro"))
    fresh.load_state_dict(run.model.state_dict())
    assert fresh.parameters_count == loaded.parameters_count


def test_their_names_round_trip():
    made = create("ofb_micro")
    theirs = authors_of("ofb").export_state(made)
    assert {"patch_embed.alpha", "blocks.2.attn.score", "blocks.0.mlp.alpha", "mask_token", "decoder.0.weight", "alpha_patch"} <= {*theirs}
    other = create("ofb_micro")
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_small_network_is_faster():
    torch.manual_seed(0)
    trunk = ViT(ViT.Config(image_size=64, patch_size=8, dim=192, depth=6, heads=6, num_classes=10)).eval()
    small = OFB(target=0.35).apply(ViT(trunk.config)).eval()
    small.narrow()
    x, times = trunk.example(4)[0], {"whole": [], "small": []}
    with torch.no_grad():
        for _ in range(6):
            for name, network in (("whole", trunk), ("small", small)):
                start = time.perf_counter()
                network(x)
                times[name].append(time.perf_counter() - start)
    assert min(times["small"]) < 0.85 * min(times["whole"])


def test_a_target_out_of_reach_is_told():
    smt = create("smt_micro", num_classes=10)
    with pytest.warns(UserWarning, match=r"0\.608 of SMT's parameters at least: 0\.5 is out of reach"):
        made = OFB(target=0.5).apply(smt)
    assert made.least() == pytest.approx(254662 / 418882)  # every module as small as it goes


@pytest.mark.slow
def test_it_learns():
    run = formarium.fit("ofb_smt_micro", "sample:digits", epochs=16, lr=2e-3, batch_size=64, progress=False, seed=0, validations=1)
    assert run.summary["accuracy"] > 0.9 and run.model.parameters_count <= 0.65 * create("smt_micro").parameters_count

import copy
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import catalogue, create
from formarium.authors import authors_of, load_state
from formarium.engine.benchmarking import cost
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.features import trace
from formarium.methods.sit_slim import SiTSlim, Slimmed, plan, recalibration_loss, slimmable
from formarium.methods.sit_slim_trunk import LVViT
from formarium.tasks.image_classification.trunks import ViT

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "sit_slim").glob("*.safetensors"))
PUBLISHED = {name: v for name, v in catalogue.cards()["sit_slim"].variants.items() if "_micro" not in name}
BACKBONES = catalogue.cards()["sit_slim"].demo["backbones"]
SMALL = {"arbex_micro": {"depth": 2}}


@pytest.fixture
def model() -> Slimmed:
    torch.manual_seed(0)
    return create("sit_slim_micro").eval()


def vit(**changes) -> ViT:
    torch.manual_seed(0)
    made = ViT(ViT.Config(image_size=32, patch_size=4, dim=32, depth=4, heads=2, num_classes=10, **changes)).eval()
    made.set_preprocessing({"size": 32})
    return made


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_with_and_without_the_reverse_modules(name):
    published = PUBLISHED[name].published
    with torch.device("meta"):
        made = create(name)
        assert made.parameters_count == published["parameters"]
        made.release()
        assert made.parameters_count == published["parameters_at_inference"]
        if name == "sit_slim_s_224":
            assert [made.counts()[i] for i in (7, 8, 11, 13, 15)] == [196, 98, 49, 24, 24]


def test_claim_counts_and_flops():
    with torch.device("meta"):
        model = create("sit_slim_t_224").eval()
        assert model.counts() == [98, 49] + [24] * 12  # 196 before the first slimming; 24.5 is floored
        x = torch.randn(1, 3, 224, 224)
        slim = cost(model, (x,))[0] / 2e9
        with model.unslimmed():
            whole = cost(model, (x,))[0] / 2e9
    assert 0.9 < slim < 1.1 and 3.2 < whole < 3.7


@torch.no_grad()
def test_claim_every_slimmed_token_is_a_convex_combination_of_all(model):
    slim = model.slims[0]
    x = torch.randn(2, 64, 64)
    weights = slim.weights(x)
    assert weights.shape == (2, 32, 64) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 32))  # over the input tokens, not over the kept ones
    assert (weights.sum(1) - 1).abs().max() > 1e-3 or (weights.sum(1) - 0.5).abs().max() < 0.5
    constant = torch.randn(1, 1, 64).expand(2, 64, 64)
    torch.testing.assert_close(slim(constant), constant[:, :32], rtol=1e-5, atol=1e-6)
    assert (slim(x) <= x.amax(1, keepdim=True) + 1e-6).all() and (slim(x) >= x.amin(1, keepdim=True) - 1e-6).all()


@torch.no_grad()
def test_claim_without_slimming_it_is_the_plain_network(model):
    x = model.example(2)[0]
    plain = LVViT(LVViT.Config(image_size=32, patch_size=4, stem="patch", dim=64, depth=5, heads=4, num_classes=10)).eval()
    plain.load_state_dict(model.trunk.state_dict())
    with model.unslimmed():
        torch.testing.assert_close(model(x), plain(x))
    assert (model(x) - plain(x)).abs().max() > 1e-5


@torch.no_grad()
def test_reverse_modules_give_the_full_count_again(model):
    _, slim = model.tokens(model.example(2)[0], recover=False)
    _, whole = model.tokens(model.example(2)[0], recover=True)
    assert [t.shape[1] for t in slim] == [32, 16, 8, 8, 8]
    assert [t.shape[1] for t in whole] == [64] * 5


def test_before_the_first_slimming_nothing_is_recovered():
    made = SiTSlim(stage_blocks=(2, 1, 1)).apply(vit())
    assert [type(r).__name__ for r in made.reverse] == ["Identity", "ReverseSlimming", "ReverseSlimming", "ReverseSlimming"]
    assert made.config.places == ("blocks.1", "blocks.2") and made.config.shares == (0.5, 0.25)


def test_the_loss_leaves_class_tokens_out_and_does_not_move_the_teacher():
    made = SiTSlim().apply(vit()).train()
    batch = made.example_batch(4)
    losses = made.loss(batch)
    losses.total.backward()
    assert {*losses.terms} == {"cross_entropy", "tokens", "logits"} and not made.teacher.training
    assert all(p.grad is None for p in made.teacher.parameters())
    silent = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent, silent
    _, tokens = made.tokens(made.example(1)[0], recover=True)
    assert all(t.shape[1:] == (64, 32) for t in tokens)


def test_the_loss_by_hand():
    g = torch.Generator().manual_seed(0)
    said, meant, s, t = (torch.randn(3, 4, generator=g) for _ in range(4))
    out = recalibration_loss(said, meant, [s, t], [t, t], torch.tensor([0, 1, 2]), 2.0, 2.0, 1.0)
    kl = (meant.softmax(1) * (meant.log_softmax(1) - said.log_softmax(1))).sum() / 3
    wanted = F.cross_entropy(said, torch.tensor([0, 1, 2])) + 2 * ((s - t) ** 2).mean() / 2 + 2 * kl
    torch.testing.assert_close(out.total, wanted)


@pytest.mark.parametrize("name", BACKBONES)
def test_it_goes_on_models_of_the_catalogue(name):
    torch.manual_seed(0)
    trunk = create(name, **SMALL.get(name, {})).eval()
    whole = copy.deepcopy(trunk)
    assert SiTSlim().needs(trunk) == ""
    made = SiTSlim(target=0.6).apply(trunk).eval()
    x = made.example(2)[0]
    with torch.no_grad(), made.unslimmed():
        torch.testing.assert_close(made(x), whole(x), rtol=1e-4, atol=1e-5)
    assert made.token_share == pytest.approx(0.6, abs=0.13)
    made.train().loss(made.example_batch(2)).total.backward()
    assert all(p.grad is not None for p in made.slims.parameters())
    made.after_step(1, 1)
    assert cost(made.eval(), (x,))[0] < cost(whole, (x,))[0]
    assert made.parameters_count == whole.parameters_count + sum(p.numel() for p in made.slims.parameters())
    read = trace(made, x)
    assert all(f.grid is None or torch.Size(f.grid).numel() + f.prefix == f.tokens.shape[1] for f in read.values())


def test_it_says_where_it_cannot():
    assert "grid" in SiTSlim().needs(create("cswin_micro"))
    assert "place" in SiTSlim().needs(create("smt_micro"))
    assert "already" in SiTSlim().needs(create("sit_slim_micro"))
    with pytest.raises(BadInput, match="fewer tokens"):
        SiTSlim().apply(create("cswin_micro"))
    with pytest.raises(BadInput, match="target"):
        SiTSlim(target=1.5)
    with pytest.raises(BadInput, match="sum to 4"):
        SiTSlim(stage_blocks=(1, 1)).apply(vit())
    with pytest.raises(BadInput, match="places"):
        create("sit_slim_micro", places=("blocks.9",), shares=(0.5,))
    with pytest.raises(BadInput, match="maps"):
        create("sit_slim_micro").pyramid(torch.randn(1, 3, 32, 32))


def test_a_plan_has_the_share_asked_for():
    for depth, share in [(12, 0.5), (24, 0.6), (4, 0.5), (3, 0.7)]:
        blocks, ratio = plan(depth, share)
        assert sum(blocks) == depth and sum(b * ratio**i for i, b in enumerate(blocks)) == pytest.approx(share * depth, rel=1e-3)
    assert plan(14, 0.2232)[0] == (1, 1, 1, 11)  # the published T
    assert plan(16, 0.703)[0] == (9, 3, 2, 2)  # and S


def test_a_slimmed_vit_has_no_grid_behind_a_slimming():
    made = SiTSlim(stage_blocks=(2, 2)).apply(vit()).eval()
    read = trace(made, made.example(1))
    assert read["trunk.blocks.0"].grid == (8, 8) and read["trunk.blocks.3"].grid is None and read["trunk.blocks.3"].tokens.shape[1] == 33


def test_saving_loading_and_a_fit(tmp_path):
    made = SiTSlim(target=0.5).apply(vit())
    before = made.parameters_count
    run = formarium.fit(made, "sample:digits", out=tmp_path / "run", steps=3, batch_size=16, progress=False, validations=1)
    assert not hasattr(run.model, "teacher") and run.model.parameters_count < before / 2
    loaded = formarium.load(tmp_path / "run")
    x = loaded.example(2)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), run.model.eval()(x))
    assert loaded.parameters_count == run.model.parameters_count and not loaded.config.reverse
    fresh = SiTSlim(target=0.5).apply(vit())
    fresh.load_state_dict(run.model.state_dict())  # a finished state finishes it
    assert fresh.parameters_count == loaded.parameters_count


def test_training_needs_the_size_it_was_built_for(model):
    model.take_teacher()
    with pytest.raises(BadInput, match="32x32"):
        model.loss({"image": torch.rand(2, 3, 64, 64), "label": torch.zeros(2, dtype=torch.int64)})
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)  # inference takes any


def test_one_that_was_created_becomes_its_own_teacher(model):
    stages = model.training_stages()
    assert [s.name for s in stages] == ["teacher", "slimming"] and stages[0].turns[0].loss == "unslimmed_loss"
    model.unslimmed_loss(model.example_batch(2)).total.backward()
    assert all(p.grad is None for p in model.slims.parameters())
    model.take_teacher()
    assert torch.equal(model.teacher.head.weight, model.trunk.head.weight) and not any(p.requires_grad for p in model.teacher.parameters())
    assert [s.name for s in model.training_stages()] == ["slimming"]


def test_their_names_round_trip():
    made = create("sit_slim_micro")
    theirs = authors_of("sit_slim").export_state(made)
    assert {"tsm.0.weight.1.weight", "rtsm.2.mlp1.fc1.weight", "blocks.0.attn.proj.bias", "patch_embed.proj.weight"} <= {*theirs}
    other = create("sit_slim_micro")
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), other.state_dict().values(), strict=True))
    assert "slims.0.fc1.weight" in made.state_dict()


def test_slimmed_models_are_faster():
    torch.manual_seed(0)
    big = ViT(ViT.Config(image_size=128, patch_size=8, dim=128, depth=8, heads=4, num_classes=10)).eval()
    made = SiTSlim(target=0.4).apply(copy.deepcopy(big)).eval()
    x = made.example(2)[0]
    times = {"whole": [], "slim": []}
    with torch.no_grad():
        for _ in range(5):
            for name, network in (("whole", big), ("slim", made)):
                start = time.perf_counter()
                network(x)
                times[name].append(time.perf_counter() - start)
    assert min(times["slim"]) < 0.8 * min(times["whole"])


def test_a_stage_whose_map_is_read_afterwards_is_left_alone():
    groups, why = slimmable(create("smt_micro"))
    assert not groups and "stages.2" in why


@pytest.mark.slow
def test_half_the_tokens_of_a_trained_network_lose_nothing():
    recipe = {"lr": 2e-3, "warmup_epochs": 2, "batch_size": 64, "progress": False, "seed": 0, "validations": 1}
    plain = formarium.fit("tnt_micro", "sample:digits", epochs=36, **recipe)
    slim = formarium.fit(SiTSlim(target=0.5).apply(copy.deepcopy(plain.model)), "sample:digits", epochs=24, **recipe)
    assert slim.model.token_share == pytest.approx(0.5)
    assert slim.summary["accuracy"] > max(0.953, plain.summary["accuracy"] - 0.01)  # logistic regression: 0.953

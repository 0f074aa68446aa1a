from pathlib import Path

import pytest
import torch

from formarium import create, trace
from formarium.authors.spectformer import authors
from formarium.engine.records import read_header, replay
from formarium.errors import BadInput
from formarium.nn.attention import SelfAttention
from formarium.nn.global_filter import GlobalFilter
from formarium.nn.token_labelling import NO_BOX

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "spectformer").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_exported_names_are_the_authors(path):
    state = read_header(path)["state"]
    if not state:
        pytest.skip("a loss")
    model = create(read_header(path)["variant"])
    assert {k: list(v.shape) for k, v in authors.export_state(model).items()} == {k: shape for k, (shape, *_) in state.items()}


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    return create("spectformer_micro")


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return create("spectformer_plain_micro")


def test_claim_exactly_the_first_alpha_blocks_are_spectral():
    with torch.device("meta"):
        for name, alpha in (("spectformer_t", [4]), ("spectformer_s_224", [4]), ("spectformer_h_s_224", [3, 4, 0, 0])):
            for stage, spectral in zip(create(name).stages, alpha, strict=True):
                kinds = [type(b.mixer) for b in stage.blocks]
                assert kinds == [GlobalFilter] * spectral + [SelfAttention] * (len(kinds) - spectral)
                weights = [n for n, _ in stage.named_parameters() if n.endswith("mixer.weight")]
                assert weights == [f"blocks.{j}.mixer.weight" for j in range(spectral)]


def test_claim_a_gate_is_linear_and_commutes_with_cyclic_shifts(pyramid):
    gate = pyramid.stages[0].blocks[0].mixer
    a, b = torch.randn(2, 8, 8, 24), torch.randn(2, 8, 8, 24)
    torch.testing.assert_close(gate(2 * a - 3 * b), 2 * gate(a) - 3 * gate(b), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gate(a.roll((3, 5), (1, 2))), gate(a).roll((3, 5), (1, 2)), atol=1e-6, rtol=1e-4)


def test_claim_a_gate_sees_the_whole_map_of_its_own_channel_only(pyramid):
    x = torch.zeros(1, 8, 8, 24, requires_grad=True)
    pyramid.stages[0].blocks[0].mixer(x)[0, 3, 3, 5].backward()
    assert (x.grad[0, :, :, 5] != 0).all() and x.grad[0, :, :, :5].abs().sum() == 0 and x.grad[0, :, :, 6:].abs().sum() == 0


def test_a_plain_spectral_block_has_one_residual_and_the_pyramids_two(plain, pyramid):
    block, x = plain.stages[0].blocks[0], torch.randn(1, 64, 64)
    y = block.mixer(block.norm1(x).unflatten(1, (8, 8))).flatten(1, 2)
    torch.testing.assert_close(block(x, (8, 8)), x + block.mlp(block.norm2(y)))
    block, x = pyramid.stages[0].blocks[0], torch.randn(1, 64, 24)
    y = x + block.mixer(block.norm1(x).unflatten(1, (8, 8))).flatten(1, 2)
    torch.testing.assert_close(block(x, (8, 8)), y + block.mlp(block.norm2(y), (8, 8)))


def test_filters_have_the_size_of_their_map_at_224():
    with torch.device("meta"):
        shapes = [s.blocks[0].mixer.weight.shape for s in create("spectformer_h_l_224").stages[:2]]
    assert [tuple(s) for s in shapes] == [(56, 29, 96, 2), (28, 15, 192, 2)]


def test_any_size_runs(plain, pyramid):
    for model in (plain.eval(), pyramid.eval()):
        with torch.no_grad():
            for size in ((32, 32), (40, 28), (57, 64)):
                assert torch.isfinite(model(torch.randn(2, 3, *size))).all()
    with pytest.raises(BadInput, match="at least 4x4"):
        plain(torch.randn(1, 3, 3, 9))


def test_predictions_add_half_of_the_best_token(pyramid):
    x = torch.randn(2, 3, 32, 32)
    pyramid.eval()
    logits, tokens, grid = pyramid.token_outputs(x)
    assert grid == (2, 2) and tokens.shape == (2, 4, 10)
    torch.testing.assert_close(pyramid(x), logits + 0.5 * tokens.max(1).values)


def test_mixing_tokens_is_undone_on_the_token_logits(pyramid):
    """With all of the grid in the box the batch is simply reversed, and the token logits are back in order."""
    x = torch.randn(3, 3, 32, 32)
    pyramid.eval()
    logits, tokens, _ = pyramid.token_outputs(x)
    swapped, back, _ = pyramid.token_outputs(x, (0, 0, 2, 2))
    torch.testing.assert_close(swapped, logits.flip(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(back, tokens, atol=1e-5, rtol=1e-4)
    assert pyramid.token_outputs(x, (0, 0, 1, 1))[1].sub(tokens).abs().max() > 1e-4


def test_token_targets_are_used_and_checked(pyramid):
    batch = pyramid.eval().example_batch(4)
    plain = pyramid.loss(batch).terms
    labels = torch.eye(10)[torch.tensor([[1, 2, 3, 4]] * 4)].transpose(1, 2)  # b classes tokens
    terms = pyramid.loss({**batch, "token_target": labels}).terms
    assert terms["token_cross_entropy"] != plain["token_cross_entropy"] and terms["cross_entropy"] == plain["cross_entropy"]
    with pytest.raises(BadInput, match="token_target"):
        pyramid.loss({**batch, "token_target": labels[..., :3]})
    with pytest.raises(BadInput, match="hierarchical"):
        create("spectformer_plain_micro", token_label=True)


def test_training_mixes_and_evaluation_does_not(pyramid):
    batch, boxes = pyramid.example_batch(4), []
    original = pyramid.token_outputs
    pyramid.token_outputs = lambda image, box=NO_BOX: boxes.append(box) or original(image, box)
    for _ in range(8):
        pyramid.train().loss(batch)
    assert len({*boxes}) > 1
    boxes.clear()
    pyramid.eval().loss(batch)
    pyramid.train().loss({k: v[:1] for k, v in batch.items()})  # nothing to mix with
    assert boxes == [NO_BOX, NO_BOX]


def test_dense_gives_a_pyramid_and_the_plain_form_one_map():
    model = create("spectformer_h_s_dense", depths=(1, 1, 1, 1), spectral=(1, 1, 0, 0)).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, c, 96 // s, 64 // s) for c, s in zip((64, 128, 320, 448), (4, 8, 16, 32), strict=True)]
    assert [m.shape for m in create("spectformer_plain_micro", dense=True)(torch.rand(1, 3, 32, 32))] == [(1, 64, 8, 8)]


def test_the_class_token_starts_as_the_mean_of_the_others(pyramid):
    seen = []
    pyramid.class_blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    tokens = trace(pyramid.eval(), torch.randn(2, 3, 32, 32), at="stages.2.blocks.0")["stages.2.blocks.0"].tokens
    torch.testing.assert_close(seen[0][:, 0], tokens.mean(1))


@pytest.mark.parametrize("name", ["spectformer_micro", "spectformer_plain_micro"])
def test_it_learns(name):
    torch.manual_seed(0)
    model = create(name).train()
    batch = model.example_batch(16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = model.eval().loss(batch).total.item()
    for _ in range(20):
        loss = model.train().loss(batch).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert model.eval().loss(batch).total.item() < 0.7 * before

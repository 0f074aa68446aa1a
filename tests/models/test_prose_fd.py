from pathlib import Path

import numpy as np
import pytest
import torch

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.task import task
from formarium.tasks.operator_learning.symbols import PAD

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "prose_fd").glob("*.safetensors"))


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * ("small" not in p.stem)) for p in RECORDS])
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


@pytest.fixture(scope="module")
def micro():
    torch.manual_seed(0)
    return create("prose_fd_micro").eval()


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_a_frame_does_not_depend_on_those_asked_for_behind_it(micro):
    fields, times, skeleton, query = micro.example(2, times=6)
    whole = run(micro, fields, times, skeleton, query)
    for n in (1, 3, 5):
        torch.testing.assert_close(run(micro, fields, times, skeleton, query[:, :n]), whole[:, :n], atol=1e-5, rtol=1e-4)


def test_with_times_any_frame_can_be_asked_for_alone():
    torch.manual_seed(0)
    model = create("prose_fd_micro", continuous=True).eval()
    fields, times, skeleton, query = model.example(2, times=6)
    whole = run(model, fields, times, skeleton, query)
    torch.testing.assert_close(run(model, fields, times, skeleton, query[:, [4, 1]]), whole[:, [4, 1]], atol=1e-5, rtol=1e-4)
    later = run(model, fields, times + 3, skeleton, query + 3) - whole  # asked-for times count from the last given one
    assert later.abs().max() > 1e-4  # given times are absolute
    assert (run(model, fields, times, skeleton, query + 1) - whole).abs().max() > 1e-4


# pitfalls -----------------------------------------------------------------------------------------------------------


def test_padding_of_words_changes_nothing_and_words_matter(micro):
    fields, times, skeleton, query = micro.example(2)
    longer = torch.nn.functional.pad(skeleton, (0, 4), value=PAD)
    whole = run(micro, fields, times, skeleton, query)
    torch.testing.assert_close(run(micro, fields, times, longer, query), whole, atol=1e-5, rtol=1e-4)
    assert (run(micro, fields, times, skeleton.flip(1), query) - whole).abs().max() > 1e-5


def test_patches_lie_where_they_were_cut():
    """A patch of the given frames is one token; what comes out of one query's token is one patch, rows first."""
    torch.manual_seed(0)
    micro = create("prose_fd_micro", patches=4, patches_out=8)
    fields = micro.example(1, 1, 1)[0]
    changed = fields.clone()
    side = micro.size // micro.config.patches
    changed[:, :, side : 2 * side, 2 * side : 3 * side] += 1  # second row, third column
    with torch.no_grad():
        a, b = (micro.patch(f.movedim(-1, 2).flatten(0, 1)).flatten(2).transpose(1, 2) for f in (fields, changed))
        assert ((a - b).abs().amax((0, 2)) > 1e-6).nonzero().tolist() == [[micro.config.patches + 2]]
        n, side = micro.config.patches_out, micro.size // micro.config.patches_out
        tokens = torch.zeros(1, n * n, micro.config.dim)
        tokens[0, n + 2] = 1
        x = micro.head(tokens.reshape(1, n, n, -1).permute(0, 3, 1, 2)) - micro.head(torch.zeros(1, micro.config.dim, n, n))
        seen = x[0].abs().amax(0) > 1e-7
        assert seen[side : 2 * side, 2 * side : 3 * side].any() and seen.sum() == seen[side : 2 * side, 2 * side : 3 * side].sum()


@pytest.mark.parametrize("normalise", ["meanvar", "range"])
def test_units_do_not_matter(normalise):
    """Fields in other units are continued in those units, each field in its own."""
    torch.manual_seed(0)
    model = create("prose_fd_micro", normalise=normalise).eval()
    batch = model.example_batch(2, times=5)
    said = model.predict(batch).solution
    scale, shift = torch.tensor([3.0, 0.02, 100.0]).repeat(model.config.grid), torch.tensor([-5.0, 1.0, 40.0]).repeat(model.config.grid)
    data = torch.cat([batch["data"][..., :1], batch["data"][..., 1:] * scale + shift], -1)
    torch.testing.assert_close(model.predict({**batch, "data": data}).solution, said * scale + shift, atol=2e-3, rtol=1e-3)


def test_the_objective_is_the_normalised_mean_square_of_the_fields_there_are(micro):
    batch = micro.example_batch(3)
    batch["dims"][1, 1:] = False
    for k in ("data", "target"):
        flat = batch[k][1, :, k == "data" :].unflatten(1, (micro.config.grid, 3))
        flat[..., 1:] = 0
    found = micro.loss(batch).terms["data"]
    total, count = 0.0, 0
    for i, dims in enumerate((3, 1, 3)):
        fields, true = (x.unflatten(1, (16, 16, 3)) for x in (batch["data"][i, :, 1:], batch["target"][i]))
        mean, size = fields.mean((0, 1, 2)), fields.std((0, 1, 2)) + 1e-8
        said = micro(
            ((fields - mean) / size)[None], batch["data"][i : i + 1, :, 0], batch["skeleton"][i : i + 1], batch["query"][i : i + 1]
        )[0]
        off = (said - (true - mean) / size)[..., :dims]
        total, count = total + (off**2).sum(), count + off.numel()
    torch.testing.assert_close(found, total / count, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"loss_weight": "l2"}, {"loss_weight": "linfty"}, {"loss_weight": "l2", "square_loss": False}])
def test_weighted_losses_are_relative_to_each_frame(changes):
    torch.manual_seed(0)
    model = create("prose_fd_micro", **changes, normalise="").eval()
    batch = model.example_batch(2)
    said, true = model.forward_batch(batch), batch["target"].unflatten(2, (16, 16, 3))
    off, norm = (x.flatten(2, 3) for x in (said - true, true))
    size = norm.abs().amax(2) if changes["loss_weight"] == "linfty" else norm.norm(dim=2)
    share = off.norm(dim=2) / size
    torch.testing.assert_close(model.loss(batch).total, (share if "square_loss" in changes else share**2).sum() / 2, atol=1e-4, rtol=1e-3)


def test_the_loss_in_the_datas_own_units():
    torch.manual_seed(0)
    model = create("prose_fd_micro", denormalise=True).eval()
    batch = model.example_batch(2)
    said = model.predict(batch).solution
    torch.testing.assert_close(model.loss(batch).total, ((said - batch["target"]) ** 2).mean(), atol=1e-5, rtol=1e-4)


def test_rolled_out_frames_come_from_what_was_said():
    """One frame a pass: the oldest frame leaves, what was said comes in, normalised anew."""
    torch.manual_seed(0)
    model = create("prose_fd_micro", ahead=1).eval()
    batch = model.example_batch(2, frames=4, times=3)
    whole = model.predict(batch).solution
    window, when = batch["data"][..., 1:], batch["data"][..., 0]
    for i in range(3):
        step = {**batch, "data": torch.cat([when[..., None], window], 2), "query": batch["query"][:, i : i + 1]}
        said = model.predict(step).solution
        torch.testing.assert_close(said[:, 0], whole[:, i], atol=1e-4, rtol=1e-3)
        window, when = torch.cat([window[:, 1:], said], 1), torch.cat([when[:, 1:], batch["query"][:, i : i + 1]], 1)
    assert model.forward_batch(batch).shape[1] == 1  # it learns the next frame only
    ten = create("prose_fd_micro").eval()
    assert ten.predict(ten.example_batch(1, frames=4, times=23)).solution.shape[1] == 23


def test_what_is_added_to_the_last_frame():
    torch.manual_seed(0)
    plain, carrying = create("prose_fd_micro", carry_last=False).eval(), create("prose_fd_micro", carry_last=True).eval()
    carrying.load_state_dict(plain.state_dict())
    inputs = plain.example(2)
    torch.testing.assert_close(run(carrying, *inputs), run(plain, *inputs) + inputs[0][:, -1:])


def test_fewer_fields_than_the_model_has(micro):
    batch = micro.example_batch(2)
    flat = [batch[k][..., k == "data" :].unflatten(2, (micro.config.grid, 3))[..., :2].flatten(2) for k in ("data", "target")]
    small = {**batch, "data": torch.cat([batch["data"][..., :1], flat[0]], 2), "target": flat[1], "dims": batch["dims"][:, :2]}
    assert micro.predict(small).solution.shape == (2, 3, 2 * micro.config.grid) and torch.isfinite(micro.loss(small).total)
    padded = micro.square(flat[0], 2)
    assert padded.shape[-1] == 3 and (padded[..., 2] == 0).all()


def test_what_cannot_be_is_said(micro):
    batch = micro.example_batch(2)
    with pytest.raises(BadInput, match="padding"):
        micro.predict({**batch, "observed": batch["observed"].clone().fill_(False)})
    with pytest.raises(BadInput, match="tanh"):
        micro.predict({k: v for k, v in batch.items() if k != "skeleton"} | {"guess": [["tanh"], ["U"]]})
    with pytest.raises(BadInput, match="at most 10 frames"):
        micro(*micro.example(1, frames=11))
    with pytest.raises(BadInput, match="square"):
        create("prose_fd_micro", grid=1000)
    with pytest.raises(BadInput, match="meanvar"):
        create("prose_fd_micro", normalise="max")


@pytest.mark.parametrize("changes", [{"text": False}, {"continuous": True}, {"normalise": "", "ahead": 2}], ids=lambda c: "-".join(c))
def test_options_train_predict_and_round_trip(changes):
    from formarium.authors import load_state
    from formarium.authors.prose_fd import authors

    torch.manual_seed(0)
    model = create("prose_fd_micro", **changes)
    batch = model.example_batch(2)
    model.loss(batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.isfinite(model.eval().predict(batch).solution).all()
    other = create("prose_fd_micro", **changes)
    load_state(other, authors.export_state(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_sample_flows_make_a_batch(micro):
    from formarium.tasks.operator_learning.fluids import flows

    t = task("operator-learning")
    ready = t.transform({})
    samples = [ready(s, np.random.default_rng(0)) for s in flows("val", 4, 0)]
    for chosen in (samples, samples[1::2]):  # both kinds, and water alone
        batch = t.collate(chosen)
        assert torch.isfinite(micro.loss(batch).total)
        said = micro.predict(batch)
        assert said.solution.shape == batch["target"].shape and said.words == [[] for _ in chosen]
    assert (said.solution.unflatten(2, (256, 3))[..., 1:] == 0).all()  # fields that shallow water lacks
    metrics, _ = t.score([said], [batch])
    assert "valid" not in metrics and metrics["relative_l2"] > 0
    assert t.draw(said, batch).size[0] > 300

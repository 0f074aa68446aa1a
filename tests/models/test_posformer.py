from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.text.posformer import AttentionCorrection, MaskedBatchNorm, Steps, identifiers, levels_and_places
from formarium.tasks.formula_recognition.latex import EOS, SOS, to_ids, tokenize
from formarium.tasks.formula_recognition.model import bidirectional, pad_rows

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "posformer").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    if outcome.parameters is not None:
        assert outcome.parameters == outcome.expected_parameters


@pytest.fixture(scope="module")
def micro():
    torch.manual_seed(0)
    return create("posformer_micro").eval()


def row(model, text):
    return torch.tensor(to_ids(tokenize(text), model.config.vocabulary))


# the position forest ------------------------------------------------------------------------------------------------


def test_identifiers_of_a_nested_formula(micro):
    ids = identifiers(row(micro, r"x^{2}+\frac{a_{1}}{b}"), micro.structure).tolist()
    #        x    ^    {    2      }    +    \frac {   a       _       {       1         }       }    {    b       }
    paths = ["3", "3", "3", "43", "3", "3", "3", "3", "43", "43", "43", "453", "43", "3", "3", "53", "3"]
    assert ["".join(str(c) for c in path if c) for path in ids] == paths


def test_reading_backwards_turns_the_identifiers_around(micro):
    rows, _ = bidirectional(row(micro, r"\sqrt[3]{x}-y_{1}")[None])
    forward, backward = identifiers(rows, micro.structure)[0]
    assert torch.equal(forward[1:], backward[1:].flip(0)) and forward[0, 0] == SOS and backward[0, 0] == EOS


def test_deep_paths_are_cut_and_levels_end_at_four(micro):
    deep = "x" + "".join("^{x" for _ in range(6)) + "}" * 6
    ids = identifiers(row(micro, deep), micro.structure)
    level, place = levels_and_places(ids)
    assert level.max() == 4 and place[level == 4].unique().tolist() == [4] and (ids[level == 4] != 0).all()


@pytest.mark.parametrize("broken", ["x ^ { 2", "x ^ 2", r"\frac { x } y"])
def test_a_formula_without_its_groups_is_refused(micro, broken):
    ids = torch.tensor(to_ids(broken.split(), micro.config.vocabulary))
    with pytest.raises(BadInput, match="formula"):
        identifiers(ids, micro.structure)


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_the_position_decoder_is_not_there_when_it_reads(micro):
    batch = micro.example_batch(2)
    before = micro.predict(batch)
    bare = create("posformer_micro")
    bare.load_state_dict(micro.state_dict())
    bare.eval()
    del bare.position_decoder, bare.level_head, bare.place_head
    after = bare.predict(batch)
    assert before.ids == after.ids and torch.equal(before.score, after.score)


def test_claim_steps_without_ink_add_nothing_to_what_was_seen(micro):
    correction = AttentionCorrection(4, 8, True, True)
    attention = torch.rand(1, 4, 1, 3, 6)
    tokens = torch.tensor([[[micro.structure["^"], micro.structure["{"], micro.structure["}"]]]])
    seen = correction.seen(attention, attention, micro.decoder.inked(tokens))
    assert not seen[..., :2, :].any() and torch.equal(seen[..., 2, :], torch.cat([attention, attention], 1)[..., 2, :])


def test_what_was_seen_is_of_earlier_steps_only(micro):
    image, mask, rows, ids = micro.example(1)
    with torch.no_grad():
        whole = micro(image, mask, rows, ids)
        begun = micro(image, mask, rows[:, :, :4], ids[:, :, :4])
    for a, b in zip(whole, begun, strict=True):
        torch.testing.assert_close(a[:, :, :4], b, atol=1e-5, rtol=1e-4)


# pitfalls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cross", "own"), [(True, False), (False, True), (False, False), (True, True)])
def test_token_by_token_is_as_all_at_once(cross, own):
    torch.manual_seed(0)
    model = create("posformer_micro", cross_coverage=cross, self_coverage=own, layers=3).eval()
    image, mask, rows, _ = model.example(2)
    with torch.no_grad():
        features, padding = model.encode(image, mask)
        whole = model.decoder(rows, rows, features, padding)
        steps, parents = Steps(model.decoder, features, padding, 2), None
        for t in range(rows.shape[2]):
            one = steps(rows[:, :, t].flatten(), parents).view(2, 2, -1)
            parents = torch.arange(4)
            torch.testing.assert_close(one, whole[:, :, t], atol=1e-5, rtol=1e-4)


def test_batch_norm_leaves_padding_out():
    norm, x = MaskedBatchNorm(3), torch.randn(2, 3, 4, 5)
    padding = torch.zeros(2, 4, 5, dtype=torch.bool)
    padding[1, :, 3:] = True
    plain = torch.nn.BatchNorm1d(3)
    inside = x.movedim(1, -1)[~padding]
    torch.testing.assert_close(norm(x, padding).movedim(1, -1)[~padding], plain(inside))
    assert not norm(x, padding).movedim(1, -1)[padding].any()
    plain(inside)
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.eval()(x, padding).movedim(1, -1)[~padding], plain.eval()(inside))


def test_the_target_of_the_last_step_does_not_depend_on_the_batch(micro):
    rows, targets = bidirectional(pad_rows([row(micro, "x+y").tolist(), row(micro, "x").tolist()]))
    assert rows[1].tolist() == [[SOS, rows[1, 0, 1], 0, 0], [EOS, rows[1, 0, 1], 0, 0]]
    assert targets[1, 0].tolist()[1:] == [EOS, 0, 0] and targets[1, 1].tolist()[1:] == [SOS, 0, 0]
    batch, short = micro.example_batch(2), {}
    short = {**{k: v[:1] for k, v in batch.items()}, "tokens": row(micro, "x")[None]}
    longer = {**short, "tokens": torch.nn.functional.pad(short["tokens"], (0, 3))}
    assert torch.allclose(micro.loss(short).total, micro.loss(longer).total, atol=1e-6)


def test_the_objective_is_the_weighted_mean_of_three(micro):
    losses = micro.loss(micro.example_batch(2))
    t = losses.terms
    torch.testing.assert_close(losses.total, (t["symbols"] + 0.25 * t["levels"] + 0.25 * t["places"]) / 1.5)


def test_predictions_have_words_and_scores(micro):
    said = micro.predict(micro.example_batch(3))
    assert len(said.latex) == len(said.ids) == 3 and said.score.shape == (3,)
    assert said.latex[0] == " ".join(said.tokens[0]) and all(len(r) < micro.config.max_len for r in said.ids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i, m, r, d: (i, m, r + 200, d), "token ids"),
        (lambda i, m, r, d: (i, m[:, :10], r, d), "mask"),
        (lambda i, m, r, d: (i.expand(-1, 3, -1, -1), m, r, d), "image"),
        (lambda i, m, r, d: (i, m, r[:, :1], d), "rows"),
    ],
)
def test_wrong_inputs_are_said(micro, change, says):
    with pytest.raises(BadInput, match=says):
        micro(*change(*micro.example(1)))


def test_a_trainers_checkpoint_loads(micro, tmp_path):
    from formarium.authors.posformer import authors

    state = {f"model.{k}": v for k, v in authors.export_state(micro).items()}
    torch.save({"state_dict": {**state, "model.decoder.pos_enc.pe": torch.zeros(500, 64)}}, tmp_path / "best.ckpt")
    other = create("posformer_micro")
    other.load_authors(tmp_path / "best.ckpt")
    assert torch.equal(other.head.weight, micro.head.weight)


def test_it_learns_to_read_a_few_formulas():
    from formarium.task import task

    torch.manual_seed(0)
    t = task("formula-recognition")
    data = t.sample("formulas")
    model = create("posformer_micro", vocabulary=data.model_args["vocabulary"]).train()
    import numpy as np

    ready, rng = t.transform({}), np.random.default_rng(0)
    batch = t.collate([ready(data.splits["train"][i], rng) for i in range(4)])
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    first = model.loss(batch).total.item()
    for _ in range(60):
        loss = model.loss(batch).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1 * first
    said = model.eval().predict(batch)
    true = [" ".join(data.splits["train"].formulas[i]) for i in range(4)]
    assert sum(a == b for a, b in zip(said.latex, true, strict=True)) >= 3

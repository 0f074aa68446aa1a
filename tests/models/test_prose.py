from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.science.prose import ReversibleNorm
from formarium.tasks.operator_learning.symbols import EOS, PAD, vocabulary

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "prose").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


@pytest.fixture(scope="module")
def micro():
    torch.manual_seed(0)
    return create("prose_micro", vocabulary=vocabulary(3, 0)).eval()


def run(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_a_time_does_not_depend_on_which_others_are_asked(micro):
    data, observed, skeleton, query, equation = micro.example(2)
    whole, _ = run(micro, data, observed, skeleton, query, equation)
    for at in ([3], [6, 0], [1, 2, 5]):
        part, _ = run(micro, data, observed, skeleton, query[:, at], equation)
        torch.testing.assert_close(part, whole[:, at], atol=1e-5, rtol=1e-4)


def test_with_query_attention_it_does_depend():
    torch.manual_seed(0)
    model = create("prose_micro", query_attention=True, vocabulary=vocabulary(3, 0)).eval()
    data, observed, skeleton, query, equation = model.example(1)
    whole, _ = run(model, data, observed, skeleton, query, equation)
    part, _ = run(model, data, observed, skeleton, query[:, :1], equation)
    assert (part - whole[:, :1]).abs().max() > 1e-4


# pitfalls -----------------------------------------------------------------------------------------------------------


def test_padding_of_words_changes_nothing(micro):
    data, observed, skeleton, query, equation = micro.example(2)
    longer, further = (torch.nn.functional.pad(x, (0, 3), value=PAD) for x in (skeleton, equation))
    u, logits = run(micro, data, observed, skeleton, query, equation)
    u2, logits2 = run(micro, data, observed, longer, query, further)
    torch.testing.assert_close(u, u2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, logits2[:, : equation.shape[1]], atol=1e-5, rtol=1e-4)


def test_padding_of_samples_changes_nothing(micro):
    data, observed, skeleton, query, equation = micro.example(2)
    longer = torch.nn.functional.pad(data, (0, 0, 0, 4), value=7.0)
    for a, b in zip(
        run(micro, data, observed, skeleton, query, equation),
        run(micro, longer, torch.nn.functional.pad(observed, (0, 4)), skeleton, query, equation),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_words_are_causal(micro):
    data, observed, skeleton, query, equation = micro.example(1)
    other = equation.clone()
    other[:, 5:] = 9
    a, b = (run(micro, data, observed, skeleton, query, e)[1] for e in (equation, other))
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-3


def test_split_decoders_see_their_own_part_of_the_fusion(micro):
    data, observed, skeleton, query, equation = micro.example(1)
    n = data.shape[1]
    with torch.no_grad():
        fused = micro.fuse(data, observed, skeleton)
        texts, samples = fused.clone(), fused.clone()
        texts[:, n:] += 1
        samples[:, :n] += 1
        assert torch.equal(micro.solution(fused, observed, skeleton, query), micro.solution(texts, observed, skeleton, query))
        assert torch.equal(micro.writing(fused, observed, skeleton, equation), micro.writing(samples, observed, skeleton, equation))


def test_written_word_by_word_as_when_forced(micro):
    data, observed, skeleton, _, _ = micro.example(2)
    model = micro
    with torch.no_grad():
        fused = model.fuse(data, observed, skeleton)
        for row, i in zip(model.write(fused, observed, skeleton), range(2), strict=True):
            forced = torch.tensor([[0, *row]])
            said = model.writing(fused[i : i + 1], observed[i : i + 1], skeleton[i : i + 1], forced)[0].argmax(-1).tolist()
            words = [w for w in row if w != PAD]
            assert words == row and said[: len(row)] == row and (len(row) == model.config.max_len - 1 or said[len(row)] == EOS)


def test_a_beam_is_at_least_as_likely_as_the_greedy_words():
    torch.manual_seed(0)
    made = {"vocabulary": vocabulary(3, 0), "max_len": 8, "alpha": 0.0}
    greedy = create("prose_micro", **made).eval()
    wide = create("prose_micro", **made, beams=6).eval()
    wide.load_state_dict(greedy.state_dict())
    data, observed, skeleton, _, _ = greedy.example(2)
    with torch.no_grad():
        fused = greedy.fuse(data, observed, skeleton)

        def likely(rows):
            out = []
            for i, row in enumerate(rows):
                words = [*row, *([EOS] if len(row) < 7 else [])]
                logits = greedy.writing(fused[i : i + 1], observed[i : i + 1], skeleton[i : i + 1], torch.tensor([[0, *words[:-1]]]))
                out.append(logits[0].log_softmax(-1)[torch.arange(len(words)), words].sum().item())
            return out

        rows = likely(greedy.write(fused, observed, skeleton)), likely(wide.write(fused, observed, skeleton))
        assert all(b >= a - 1e-4 for a, b in zip(*rows, strict=True))


def test_the_objective_is_relative_error_and_cross_entropy(micro):
    batch = micro.example_batch(3)
    losses = micro.loss(batch)
    torch.testing.assert_close(losses.total, 6 * losses.terms["data"] + losses.terms["text"])
    u, logits = micro(*(batch[k] for k in ("data", "observed", "skeleton", "query", "equation")))
    off = [((a - b) ** 2).sum() / ((b**2).sum() + 1e-5) for a, b in zip(u, batch["target"], strict=True)]
    torch.testing.assert_close(losses.terms["data"], torch.stack(off).mean())
    there = batch["equation"][:, 1:] != PAD
    said = logits[:, :-1].log_softmax(-1).gather(2, batch["equation"][:, 1:, None])[..., 0][there]
    torch.testing.assert_close(losses.terms["text"], -said.mean())


def test_without_known_equations_only_the_solution_is_learned(micro):
    batch = micro.example_batch(2)
    batch["equation"] = torch.full_like(batch["equation"], PAD)
    assert micro.loss(batch).terms["text"] == 0


def test_fewer_dimensions_than_the_model_has(micro):
    batch = micro.example_batch(2)
    small = {**batch, "data": batch["data"][..., :3], "dims": batch["dims"][:, :2], "target": batch["target"][..., :2]}
    small.pop("equation")
    small["words"] = [["u_1", "|", "neg", "u_0"], []]
    said = micro.predict(small)
    assert said.solution.shape == (2, 7, 2) and torch.isfinite(micro.loss(small).total)


def test_an_unknown_symbol_is_named(micro):
    batch = micro.example_batch(2)
    batch.pop("skeleton")
    with pytest.raises(BadInput, match="tanh"):
        micro.predict({**batch, "guess": [["tanh", "u_0"], ["u_0"]]})


def test_reversible_normalisation_comes_back():
    norm, data = ReversibleNorm(4), torch.randn(2, 9, 5) * 3 + 1
    with torch.no_grad():
        norm.gain.uniform_(0.5, 2)
        norm.bias.normal_()
    normal, mean, deviation = norm(data)
    assert torch.equal(normal[..., 0], data[..., 0])
    torch.testing.assert_close(norm.undo(normal[..., 1:], mean, deviation), data[..., 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": False},
        {"write": False},
        {"solve": False},
        {"grid": 8, "dims": 1, "normalise": True},
        {"split_text": False, "split_data": False, "residual_features": True},
        {"fused_projections": False, "cosine": True, "shared_output": False, "fusion_positions": "learnable"},
    ],
    ids=lambda c: "-".join(c),
)
def test_options_train_predict_and_round_trip(changes):
    from formarium.authors import load_state
    from formarium.authors.prose import authors

    torch.manual_seed(0)
    model = create("prose_micro", vocabulary=vocabulary(3, 0), max_len=8, **changes)
    batch = model.example_batch(2)
    model.loss(batch).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    said = model.eval().predict(batch)
    assert torch.isfinite(said.solution).all() and len(said.words) == 2
    other = create("prose_micro", vocabulary=vocabulary(3, 0), max_len=8, **changes)
    load_state(other, authors.export_state(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.slow
def test_a_batch_of_all_twenty_families():
    import numpy as np

    from formarium.task import task
    from formarium.tasks.operator_learning.families import POINTS, families
    from formarium.tasks.operator_learning.sample import pdes20_words

    torch.manual_seed(0)
    t = task("operator-learning")
    ready = t.transform({}, {"noise": 0.02, "noise_targets": True, "add_term": 0.15, "drop_term": 0.15})
    batch = t.collate([ready(s, np.random.default_rng(0)) for s in families("val", 20, 0)])
    model = create("prose_micro", vocabulary=pdes20_words(), dims=1, grid=POINTS, max_len=12)
    first = model.loss(batch)
    first.total.backward()
    assert all(torch.isfinite(x) for x in first.terms.values())
    said = model.eval().predict(batch)
    assert said.solution.shape == (20, 16, 64) and len(said.words) == 20


def test_it_learns_a_few_trajectories():
    import numpy as np

    from formarium.task import task

    torch.manual_seed(0)
    t = task("operator-learning")
    from formarium.tasks.operator_learning.sample import trajectories

    model = create("prose_micro", vocabulary=vocabulary(2, 1), dims=2).train()
    ready = t.transform({})
    batch = t.collate([ready(s, np.random.default_rng(0)) for s in trajectories("train", 6, 0)])
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    first = model.loss(batch).terms
    for _ in range(60):
        losses = model.loss(batch)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
    assert losses.terms["text"] < 0.2 * first["text"] and losses.terms["data"] < 0.7 * first["data"]
    assert sum(model.eval().predict(batch).valid) >= 4

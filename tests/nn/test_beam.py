import itertools

import pytest
import torch

from formarium.nn.beam import KVCache, beam_search, decode

WORDS, START, END = 4, 0, 1


def table(seed, rows=1):
    """Log-probabilities that depend on the last two tokens of a sequence: a process whose best sequences can be counted out."""
    return torch.randn(WORDS, WORDS, WORDS, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


class Process:
    def __init__(self, logp):
        self.logp, self.last = logp, None

    def __call__(self, token, parents):
        before = torch.zeros_like(token) if self.last is None else self.last[parents]
        self.last = token
        return self.logp[before, token]


def every(logp, max_len, alpha):
    """All hypotheses (tokens between start and end, score), best first: ended ones, and open ones of full length."""
    found = []
    for n in range(max_len):
        for words in itertools.product([w for w in range(WORDS) if w != END], repeat=n):
            path, total, before = [START, *words], 0.0, 0
            for a, b in itertools.pairwise(path):
                total, before = total + logp[before, a, b].item(), a
            if n == max_len - 1:
                found.append((total / max_len**alpha, list(words)))
            else:
                found.append(((total + logp[before, path[-1], END].item()) / len(path) ** alpha, list(words)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all(seed, alpha):
    logp, max_len = table(seed), 4
    ends = torch.tensor([END])
    found = beam_search(Process(logp), torch.tensor([START]), ends, beams=40, max_len=max_len, alpha=alpha)
    score, words = every(logp, max_len, alpha)[0]
    assert found.tokens[0, 0, : found.lengths[0, 0]].tolist() == words
    assert found.scores[0, 0].item() == pytest.approx(score, abs=1e-5)
    assert (found.scores[0].diff() <= 0).all()


def test_groups_do_not_see_one_another():
    logp = table(3)
    two = beam_search(Process(logp), torch.tensor([START, 2]), torch.tensor([END, END]), beams=3, max_len=6)
    for i, start in enumerate((START, 2)):
        one = beam_search(Process(logp), torch.tensor([start]), torch.tensor([END]), beams=3, max_len=6)
        n = int(one.lengths[0, 0])
        assert one.tokens[0, 0, :n].tolist() == two.tokens[i, 0, :n].tolist()
        torch.testing.assert_close(one.scores[0], two.scores[i])


def test_greedy_takes_the_likeliest_and_stops_at_the_end():
    logp = torch.full((WORDS, WORDS, WORDS), -5.0)
    logp[:, START, 2] = logp[:, 2, 3] = logp[:, 3, END] = 0
    tokens, lengths = decode(Process(logp), torch.tensor([START, 3]), torch.tensor([END, END]), max_len=10)
    assert tokens.tolist() == [[2, 3, 0], [0, 0, 0]] and lengths.tolist() == [2, 0]


def test_sampling_follows_the_seed():
    logp = table(1)
    drawn = []
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            decode(Process(logp), torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64), max_len=9, temperature=1.0)[0]
        )
    assert torch.equal(drawn[0], drawn[1]) and not all(drawn[0].shape == d.shape and torch.equal(drawn[0], d) for d in drawn[2:])


def test_the_cache_grows_and_follows_its_rows():
    cache, parts = KVCache(), []
    for t in range(5):
        k = torch.randn(3, 2, 1, 4)
        parts.append(k)
        keys, values = cache.append(k, 2 * k)
        torch.testing.assert_close(keys, torch.cat(parts, 2))
        torch.testing.assert_close(values, 2 * keys)
        if t == 2:
            order = torch.tensor([2, 2, 0])
            cache.reorder(order)
            parts = [p[order] for p in parts]

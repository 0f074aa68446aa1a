import itertools
import math

import torch

from formarium.nn.ctc import collapse, greedy, prefix_beam_search


def distribution(frames, tokens, seed=0, sharpness=1.0):
    return (sharpness * torch.randn(1, frames, tokens, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def by_enumeration(log_probs):
    """labels -> log probability, over all paths."""
    found = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=log_probs.shape[0]):
        p = sum(log_probs[i, t].item() for i, t in enumerate(path))
        key = tuple(collapse(path))
        found[key] = math.log(math.exp(found.get(key, -math.inf)) + math.exp(p))
    return found


def test_collapse_merges_and_drops_blanks():
    assert collapse([0, 1, 1, 0, 1, 2, 2, 0]) == [1, 1, 2]
    assert collapse([]) == collapse([0, 0]) == []
    assert collapse([3, 3, 1], blank=3) == [1]


def test_greedy_follows_the_likeliest_path_within_the_length():
    path = torch.tensor([[1, 1, 0, 1, 2, 2]])
    log_probs = torch.nn.functional.one_hot(path, 3).float().mul(5).log_softmax(-1)
    assert greedy(log_probs, torch.tensor([6]))[0] == [[1, 1, 2]]
    labels, score = greedy(log_probs, torch.tensor([2]))
    assert labels == [[1]] and torch.allclose(score, log_probs.max(-1).values[:, :2].sum(1))


def test_a_wide_beam_finds_the_exact_maximum():
    for seed in range(6):
        log_probs = distribution(5, 3, seed)
        exact = by_enumeration(log_probs[0])
        labels, score = prefix_beam_search(log_probs, torch.tensor([5]), beam=200)
        best = max(exact, key=exact.get)
        assert tuple(labels[0]) == best and math.isclose(score.item(), exact[best], abs_tol=1e-5)


def test_the_sum_over_paths_beats_the_best_path():
    # blank is each frame's likeliest token, and yet "1" is likelier than nothing
    log_probs = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert greedy(log_probs, torch.tensor([2]))[0] == [[]]
    labels, score = prefix_beam_search(log_probs, torch.tensor([2]))
    assert labels == [[1]] and math.isclose(score.exp().item(), 1 - 0.36, abs_tol=1e-6)


def test_a_language_model_turns_the_balance():
    log_probs = torch.tensor([[[0.1, 0.5, 0.4]]]).log()
    assert prefix_beam_search(log_probs, torch.tensor([1]))[0] == [[1]]
    assert prefix_beam_search(log_probs, torch.tensor([1]), score=lambda prefix, token: 1.0 if token == 2 else 0.0)[0] == [[2]]


def test_ragged_lengths_and_none_at_all():
    log_probs = distribution(6, 4, sharpness=3.0).expand(3, -1, -1)
    labels, score = prefix_beam_search(log_probs, torch.tensor([6, 3, 0]))
    assert labels[2] == [] and score[2] == 0
    assert labels[1] == prefix_beam_search(log_probs[:1, :3], torch.tensor([3]))[0][0]

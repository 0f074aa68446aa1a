import math

import pytest
import torch

from formarium.nn.ops.points import angle, farthest_points, interpolation, nearest_neighbours, pair_features, real, take
from formarium.nn.rigid import fit_motion, move, random_rotations, ransac_motion
from formarium.nn.transport import log_transport


def test_farthest_points_of_a_line():
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0], [4.0]])
    points = torch.cat([line, torch.zeros(5, 2)], 1).expand(2, -1, -1)
    assert farthest_points(points, torch.tensor([5, 3]), 3).tolist() == [[0, 3, 4], [0, 2, 1]]  # what is padding never counts


def test_farthest_points_against_the_plain_rule():
    torch.manual_seed(0)
    points = torch.randn(1, 60, 3)
    chosen = farthest_points(points, torch.tensor([60]), 20)[0].tolist()
    for i in range(1, 20):
        d = torch.cdist(points[0], points[0, chosen[:i]]).amin(1)
        assert d[chosen[i]] == pytest.approx(d.max().item(), rel=1e-5)


def test_neighbours():
    torch.manual_seed(0)
    points, queries = torch.randn(2, 30, 3), torch.randn(2, 7, 3)
    index, distance = nearest_neighbours(queries, points, torch.tensor([30, 12]), 4)
    for b, n in ((0, 30), (1, 12)):
        d = torch.cdist(queries[b], points[b, :n])
        torch.testing.assert_close(distance[b], d.sort(1).values[:, :4])
        torch.testing.assert_close(d.gather(1, index[b]), distance[b])
    index, distance = nearest_neighbours(queries, points[:, :3], torch.tensor([3, 2]), 5)
    assert distance.isinf().sum((1, 2)).tolist() == [14, 21] and (index[distance.isinf()] == 0).all()


def test_taking_and_interpolating():
    x = torch.arange(12.0).view(2, 3, 2)
    assert take(x, torch.tensor([[2, 0], [1, 1]])).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    assert real(torch.tensor([1, 3]), 3).tolist() == [[True, False, False], [True, True, True]]
    points = torch.randn(1, 9, 3)
    index, weight = interpolation(points, points, torch.tensor([9]))
    torch.testing.assert_close((take(points, index) * weight[..., None]).sum(2), points)  # at a point, that point alone


def test_pair_features():
    p, n = torch.zeros(1, 3), torch.tensor([[0.0, 0, 1]])
    q, m = torch.tensor([[[1.0, 0, 1.0]]]), torch.tensor([[[1.0, 0, 0]]])
    assert pair_features(p, n, q, m)[0, 0].tolist() == pytest.approx([math.sqrt(2), 0.25, 0.25, 0.5])
    assert angle(torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0, 0])).item() == pytest.approx(math.pi)
    rotation = random_rotations(1)[0]
    turned = pair_features(p @ rotation.T + 3, n @ rotation.T, q @ rotation.T + 3, m @ rotation.T)
    torch.testing.assert_close(turned, pair_features(p, n, q, m), atol=1e-5, rtol=1e-5)


def test_motions():
    torch.manual_seed(0)
    motion = torch.eye(4).repeat(3, 1, 1)
    motion[:, :3, :3], motion[:, :3, 3] = random_rotations(3), torch.randn(3, 3)
    points = torch.randn(3, 20, 3)
    torch.testing.assert_close(fit_motion(points, move(motion, points)), motion, atol=1e-5, rtol=1e-5)
    target = move(motion, points)
    target[:, 10:] += 5  # half of them wrong, and without weight
    weight = (torch.arange(20) < 10).float().expand(3, -1)
    torch.testing.assert_close(fit_motion(points, target, weight), motion, atol=1e-5, rtol=1e-5)
    flat = torch.cat([torch.randn(12, 2), torch.zeros(12, 1)], 1)  # a plane must not be mirrored
    assert torch.linalg.det(fit_motion(flat, flat * torch.tensor([1.0, -1, 1]))[:3, :3]) > 0
    rotations = random_rotations(500)
    assert torch.linalg.det(rotations).min() > 0.999 and rotations.mean(0).abs().max() < 0.12


def test_ransac_finds_the_motion_among_outliers():
    g = torch.Generator().manual_seed(0)
    motion = torch.eye(4)
    motion[:3, :3], motion[:3, 3] = random_rotations(1, g)[0], torch.randn(3, generator=g)
    source = torch.randn(200, 3, generator=g)
    target = move(motion, source)
    target[60:] = torch.randn(140, 3, generator=g)
    found = ransac_motion(source, target, 0.05, generator=g)
    assert (found - motion).abs().max() < 1e-3
    assert torch.equal(ransac_motion(source[:2], target[:2], 0.05), torch.eye(4))


def test_transport():
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 5)
    rows, columns = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    columns[1, 3:] = False
    plan = log_transport(scores, rows, columns, torch.tensor(1.0), 200).exp()
    torch.testing.assert_close(plan[:, :4].sum(2), torch.ones(2, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(plan[0, :, :5].sum(0), torch.ones(5), atol=1e-3, rtol=0)
    assert plan[1, :, 3:5].max() == 0
    sure = log_transport(20 * torch.eye(4)[None], rows[:1], rows[:1], torch.tensor(1.0), 100).exp()
    assert sure[0].diagonal()[:4].min() > 0.99
    alone = log_transport(torch.full((1, 4, 4), -20.0), rows[:1], rows[:1], torch.tensor(1.0), 100).exp()
    assert alone[0, :4, 4].min() > 0.99

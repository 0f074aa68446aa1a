from pathlib import Path

import numpy as np
import pytest
import torch

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadCheckpoint, BadInput
from formarium.lenses.tokencut import DinoViT, TokenCut, box_iou, max_f, overlap, refined, sample_objects
from formarium.nn.normalised_cut import affinity, normalised_cut, second_eigenvector

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "tokencut").glob("*.safetensors"))
GRID = (10, 14)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return DinoViT.of(depth=4)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(("name", "count"), [("vits16", 21665664), ("vits8", 21670272), ("vitb16", 85798656), ("vitb8", 85807872)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert DinoViT.of(f"tokencut_{name}").parameters_count == count


def planted(noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros(GRID, bool)
    mask[3:7, 5:9] = True
    ways = rng.normal(size=(2, 32))
    return ways[mask.reshape(-1).astype(int)] + noise * rng.normal(size=(mask.size, 32)), mask


def test_claim_a_planted_object_is_recovered_exactly():
    features, mask = planted()
    cut = normalised_cut(features, GRID, tau=0.5)
    assert np.array_equal(cut.mask, mask) and mask.reshape(-1)[cut.seed]
    assert cut.box((16, 16), (155, 224)) == (80, 48, 144, 112)
    assert cut.box((16, 16), (100, 120)) == (80, 48, 120, 100)  # clipped where the image was padded


@pytest.mark.parametrize("lanczos", [False, True])
def test_claim_the_vector_solves_the_generalised_problem(lanczos):
    weights = affinity(planted(noise=0.8)[0], 0.2, 1e-5)
    value, v = second_eigenvector(weights, lanczos)
    degree = weights.sum(1)
    assert np.abs(degree * v - weights @ v - value * degree * v).max() < 1e-6 * degree.max()
    assert abs((degree * v).sum()) < 1e-6 * degree.sum() ** 0.5 and abs(v @ (degree * v) - 1) < 1e-8


def test_claim_rotated_and_scaled_features_give_the_same_cut():
    features, _ = planted(noise=0.6)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(32, 32)))
    one, other = normalised_cut(features, GRID), normalised_cut(7.0 * features @ rotation, GRID)
    assert np.array_equal(one.mask, other.mask) and one.seed == other.seed
    np.testing.assert_allclose(one.vector, other.vector, atol=1e-8)


def test_claim_the_seed_is_always_foreground():
    for seed in range(12):
        features = np.random.default_rng(seed).normal(size=(GRID[0] * GRID[1], 6))
        cut = normalised_cut(features, GRID)
        assert cut.foreground.reshape(-1)[cut.seed] and cut.mask.reshape(-1)[cut.seed] and not (cut.mask & ~cut.foreground).any()


def test_lanczos_and_decomposition_agree_on_a_large_grid():
    weights = affinity(np.random.default_rng(0).normal(size=(600, 12)), 0.2, 1e-5)
    (a, u), (b, v) = (second_eigenvector(weights, way) for way in (False, True))
    assert abs(a - b) < 1e-9 and np.abs(u - np.sign(u @ v) * v).max() < 1e-6 * np.abs(u).max()


def test_of_parts_only_that_with_the_seed_is_the_mask():
    features, mask = planted(noise=0.05)
    features = features.reshape(*GRID, -1)
    features[0, 0] = features[4, 6]  # one more patch of the object's kind, apart from it
    cut = normalised_cut(features.reshape(GRID[0] * GRID[1], -1), GRID, tau=0.5)
    assert cut.foreground[0, 0] != cut.mask[0, 0] or cut.seed == 0
    assert cut.foreground.sum() == mask.sum() + 1


def test_the_bilateral_solver_moves_a_rough_mask_to_the_images_edge():
    image = np.full((64, 96, 3), 40, np.uint8)
    truth = np.zeros((64, 96), bool)
    truth[13:45, 21:60] = True
    image[truth] = (210, 120, 60)
    rough = np.kron(truth.reshape(4, 16, 6, 16).mean((1, 3)) > 0.5, np.ones((16, 16), bool))
    soft, mask = refined(image, rough, sigma_spatial=16, sigma_luma=16, sigma_chroma=8)
    assert overlap(mask, truth) > 0.98 > overlap(rough, truth) and soft[30, 40] > 0.9 > 0.1 > soft[2, 90]


def test_scores_against_known_values():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7) and box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    truth = np.array([[True, False], [False, False]])
    assert max_f(truth.astype(float), truth) == pytest.approx(1.0)
    assert overlap(truth, np.ones((2, 2), bool)) == 0.25


def test_it_finds_sample_objects_far_better_than_a_box_in_the_middle(vit):
    samples = sample_objects(10, seed=1)
    report = TokenCut(tau=0.7, center=True).look(vit, samples)
    numbers = report.numbers
    assert numbers["corloc"] >= 0.6 > numbers["central_box_corloc"] and numbers["iou"] > 0.6
    assert len(report.tables[0].rows) == 10 and report.figures and any("CorLoc" in f for f in report.findings)


def test_it_looks_into_models_of_the_catalogue_and_compares_with_before():
    torch.manual_seed(0)
    models = [create("pvt_micro").eval() for _ in range(2)]
    images = [s["image"] for s in sample_objects(3)]
    report = TokenCut(center=True).look(models[0], images, before=models[1])
    assert "overlap_with_before" in report.numbers and "corloc" not in report.numbers
    assert all(0 <= x0 < x1 <= 208 and 0 <= y0 < y1 <= 160 for x0, y0, x1, y1 in report.numbers["boxes"])
    with pytest.raises(BadInput, match="last attention layer"):
        TokenCut(features="keys").look(create("efficientvit_micro").eval(), images)


def test_positions_follow_the_grid(vit):
    assert vit.positions_on((14, 14)).shape == (1, 197, 384) and vit.positions_on((5, 9)).shape == (1, 46, 384)


def test_bad_input(vit, tmp_path):
    with pytest.raises(BadInput, match="uint8"):
        TokenCut().discover(vit, np.zeros((10, 10, 3)))
    with pytest.raises(BadInput, match="images"):
        TokenCut().look(vit, [])
    with pytest.raises(BadInput, match="tau"):
        TokenCut(tau=2)
    with pytest.raises(BadInput, match="refine"):
        TokenCut(refine="crf")
    with pytest.raises(BadInput, match="16 patches"):
        TokenCut().discover(vit, np.zeros((32, 32, 3), np.uint8))
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "dino.pth")
    with pytest.raises(BadCheckpoint, match="doesn't fit"):
        vit.load_authors(tmp_path / "dino.pth")

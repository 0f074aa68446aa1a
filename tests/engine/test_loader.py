import numpy as np
import pytest
import torch

from formarium.engine.loader import Order, Prepared, evaluation_batches, part, parts, placed_batches, stream, training_batches
from formarium.errors import BadInput


class Numbers(list):
    """Samples by index; `bad` ones can't be decoded."""

    bad = ()

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"truncated file {i}")
        return {"x": np.full(2, i, dtype=np.float32), "id": str(i)}


def jitter(sample, rng):
    return {**sample, "x": sample["x"] + rng.random(2, dtype=np.float32)}


def collate(samples):
    return {"x": torch.from_numpy(np.stack([s["x"] for s in samples])), "id": [s["id"] for s in samples]}


def mix(batch, generator):
    return {**batch, "x": torch.lerp(batch["x"], batch["x"].flip(0), float(torch.rand((), generator=generator))), "kind": "mixed"}


def batches(order, steps, **options):
    return [b["x"] for b in training_batches(Prepared(Numbers(range(10)), jitter, order.seed), order, steps, collate, **options)]


def test_an_epoch_sees_each_sample_once_and_any_step_can_be_asked_for():
    order = Order(10, 3, seed=0)
    keys = [order.batch(s) for s in range(6)]
    assert order.per_epoch == 3 and len({i for k in keys[:3] for _, i, _ in k}) == 9 and {e for k in keys[3:] for e, _, _ in k} == {1}
    assert order.batch(4) == keys[4] and Order(10, 3, seed=1).batch(4) != keys[4]
    assert len(Order(2, 64, 0).batch(5)) == 2


def test_repeated_augmentation_shows_fewer_samples_more_often():
    order = Order(12, 6, seed=0, copies=3)
    assert order.per_epoch == 2
    keys = order.batch(0) + order.batch(1)
    assert len({i for _, i, _ in keys}) == 4 and len({*keys}) == 12
    ten = Order(10, 6, seed=0, copies=3)
    xs = batches(ten, range(1))[0]
    assert len({int(x[0]) for x in xs}) == 2 and len({float(x[0]) for x in xs}) == 6  # each copy augmented anew


def test_batches_are_the_same_with_workers_from_the_middle_and_in_several_processes():
    order = Order(10, 4, seed=3)
    plain = batches(order, range(6))
    assert all(torch.equal(a, b) for a, b in zip(plain, batches(order, range(6), workers=2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[3:], batches(order, range(3, 6)), strict=True))
    assert not torch.equal(plain[0], batches(Order(10, 4, seed=4), range(1))[0])
    for how in (None, mix):
        whole = batches(order, range(4), mix=how)
        halves = [batches(order, range(4), mix=how, rank=r, world=2) for r in range(2)]
        for a, *b in zip(whole, *halves, strict=True):
            assert torch.equal(a[0::2], b[0]) and torch.equal(a[1::2], b[1])


def test_streams_differ_by_purpose_and_place():
    seeds = {stream(0, p, i, j) for p in range(4) for i in range(20) for j in range(20)}
    assert len(seeds) == 1600 and stream(0, 1, 2) == stream(0, 1, 2)


def test_parts_cover_the_batch_and_leave_what_belongs_to_all():
    batch = {"x": torch.arange(6), "id": [*"abcdef"], "scale": torch.tensor(2.0), "names": ["u", "v"]}
    cut = parts(batch, 4)
    assert sum(w for _, w in cut) == pytest.approx(1) and torch.cat([p["x"] for p, _ in cut]).tolist() == [*range(6)]
    assert [i for p, _ in cut for i in p["id"]] == [*"abcdef"] and all(p["names"] == ["u", "v"] and p["scale"] == 2 for p, _ in cut)
    assert part(batch, slice(1, None, 2))["id"] == ["b", "d", "f"]
    assert len(parts(batch, 20)) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named(workers):
    numbers = Numbers(range(10))
    numbers.bad = (7,)
    with pytest.raises(BadInput, match=r"^sample 7: expected one that can be read, got OSError: truncated file 7$"):
        [*evaluation_batches(numbers, lambda s, g: s, collate, 4, workers)] if not workers else [
            *evaluation_batches(numbers, _same, collate, 4, workers)
        ]
    with pytest.raises(BadInput, match="sample 7"):
        [*training_batches(Prepared(numbers, _same), Order(10, 5, 0), range(2), collate, workers=workers)]


def _same(sample, rng):
    return sample


def test_evaluation_takes_every_sample_once_and_groups_shapes():
    class Ragged(Numbers):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "x": np.full(1 + i % 2, i, dtype=np.float32)}

    even = [*evaluation_batches(Numbers(range(10)), _same, collate, 4)]
    assert [len(b["id"]) for b in even] == [4, 4, 2]
    placed = [*placed_batches(Ragged(range(10)), _same, collate, 4)]
    assert sorted(i for places, _ in placed for i in places) == [*range(10)]
    assert all(b["id"] == [str(i) for i in places] for places, b in placed)
    with pytest.raises(ValueError, match="broken"):  # a fault of the collation itself isn't hidden
        [*evaluation_batches(Numbers(range(3)), _same, _broken, 4)]


def _broken(samples):
    raise ValueError("broken")

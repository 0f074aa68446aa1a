import pytest
import torch

from formarium import create, trace
from formarium.errors import BadInput
from formarium.features import Feature, Tap, taps


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create("pvt_micro").eval()


def test_reads_tokens_with_their_grid(model):
    features = trace(model, torch.rand(2, 3, 32, 32), at="stages.*.blocks.*")
    assert [*features] == [f"stages.{i}.blocks.0" for i in range(4)]
    assert features["stages.1.blocks.0"].grid == (8, 8) and features["stages.1.blocks.0"].map().shape == (2, 48, 8, 8)
    last = features["stages.3.blocks.0"]
    assert last.prefix == 1 and torch.equal(last.pooled(), last.tokens[:, 0])


def test_a_batch_dict_is_normalised_as_the_model_does(model):
    image = torch.rand(2, 3, 32, 32)
    by_batch, by_tensor = trace(model, {"image": image}), trace(model, model.normalise(image))
    assert torch.equal(by_batch.output, by_tensor.output)


def test_no_match_names_the_taps_there_are(model):
    with pytest.raises(BadInput, match=r"stages\.0\.tokens"):
        trace(model, torch.rand(1, 3, 32, 32), at="layers.*")
    with pytest.raises(BadInput, match="taps 'nowhere'"):
        trace(model, torch.rand(1, 3, 32, 32), edit={"nowhere": lambda f: f.tokens})


def test_edits_must_keep_the_shape_and_leave_no_trace(model):
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(BadInput, match="edited features"):
        trace(model, image, edit={"features": lambda f: f.tokens[:, :1]})
    assert all(t.watch is None for t in taps(model).values())


def test_gradients_flow_when_asked(model):
    features = trace(model, torch.rand(1, 3, 32, 32), at="features", grad=True)
    assert features["features"].tokens.requires_grad
    assert not trace(model, torch.rand(1, 3, 32, 32), at="features")["features"].tokens.requires_grad


@pytest.mark.parametrize(("layout", "shape"), [("map", (2, 5, 3, 4)), ("grid", (2, 3, 4, 5)), ("map", (2, 5, 2, 3, 4))])
def test_layouts_read_alike_and_edits_go_back(layout, shape):
    tap, x, seen = Tap(layout), torch.randn(shape), []

    def watch(feature):
        seen.append(feature)
        return Feature(feature.tokens * 2, feature.grid)

    tap.watch = watch
    assert torch.equal(tap(x), 2 * x)
    assert seen[0].tokens.shape == (2, x.numel() // 10, 5)
    assert torch.equal(seen[0].map(), x if layout == "map" else x.movedim(-1, 1))


def test_windows_fold_back_into_their_sample():
    tap, seen = Tap(), []
    tap.watch = lambda f: seen.append(f)
    tap(torch.randn(6, 4, 5), batch=2)
    assert seen[0].tokens.shape == (2, 12, 5)

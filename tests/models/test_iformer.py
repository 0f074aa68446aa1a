from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.authors import authors_of
from formarium.engine.records import read_header, replay
from formarium.errors import BadInput
from formarium.models.image.iformer import InceptionMixer, LowMixer

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "iformer").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def test_claim_attentions_share_grows_with_depth():
    for name in ("iformer_small", "iformer_base", "iformer_large"):
        mixers = [b.mixer for s in create(name).stages for b in s.blocks]
        shares = [m.low / (m.low + m.high) for m in mixers]
        assert shares == sorted(shares) and shares[0] == pytest.approx(1 / 3) and shares[-1] > 0.9
        assert all(m.fuse.groups == m.low + 2 * m.high for m in mixers)


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return InceptionMixer(24, 6, 3, True, 2).eval()


def test_claim_without_attention_the_mixer_is_local(mixer):
    with torch.no_grad():
        mixer.low_mixer.qkv.weight[-mixer.low :] = 0  # values
        x = torch.randn(1, 16, 16, 24)
        other = x.clone()
        other[0, 8, 8] += torch.randn(24)
        moved = ((mixer(x) - mixer(other)).abs().sum(-1)[0] > 1e-5).nonzero()  # attention to equal values rounds
    assert (moved - 8).abs().max() <= 2


def test_claim_attention_alone_is_global_and_keeps_low_frequencies(mixer):
    """The attention path sees nothing of a checkerboard, and all of a constant."""
    low = LowMixer(24, 3, False, 2).eval()
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    board = (1 - 2 * ((x + y) % 2)).float()[None, ..., None].expand(1, 8, 8, 24)
    with torch.no_grad():
        assert low(board).abs().max() < 1e-6
        assert mixer.high_mixer(board[..., :12]).std() > 1e-3
        flat = torch.ones(1, 8, 8, 24)
        torch.testing.assert_close(low(flat), low.qkv(flat)[..., -24:])


def test_the_residual_inside_the_fusing_convolution(mixer):
    seen = []
    mixer.out.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    x = torch.randn(2, 6, 6, 24)
    with torch.no_grad():
        mixer(x)
        y = torch.cat([mixer.high_mixer(x[..., : mixer.high]), mixer.low_mixer(x[..., mixer.high :])], -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(seen[0], (y + mixer.fuse(y)).permute(0, 2, 3, 1))


def test_layer_scale_stands_in_the_last_two_stages_only():
    model = create("iformer_small")
    assert [s.blocks[0].scale1 is not None for s in model.stages] == [False, False, True, True]


def test_odd_and_oblong_images():
    model = create("iformer_micro").eval()
    maps = model.pyramid(torch.rand(1, 3, 36, 52))
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 13), (5, 7), (3, 4)]


def test_one_head_count_a_block():
    with pytest.raises(BadInput, match="5 numbers"):
        create("iformer_micro", attention_heads=(1, 2, 3))


def test_names_go_back_exactly():
    names = {k for k in authors_of("iformer").export_state(create("iformer_small")) if not k.endswith("num_batches_tracked")}
    assert names == {k for k in read_header(RECORDS[0])["state"] if not k.endswith("num_batches_tracked")}

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formarium import create, trace
from formarium.authors import authors_of, load_state
from formarium.catalogue import card
from formarium.engine.records import read_header, replay
from formarium.errors import BadInput
from formarium.models.image.tnt import TNT, SqueezeExcite, WordMerge
from formarium.nn.ops.short_attention import short_attention

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "tnt").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


@pytest.mark.parametrize("name", [*card("tnt").published])
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        assert create(name).parameters_count == card("tnt").variants[name].parameters


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_words_attend_inside_their_sentence_only():
    """However deep, the words of a patch depend on its own pixels alone; so does the sentence before the first outer attention."""
    model = create("tnt_micro").eval()
    image = torch.rand(1, 3, 32, 32)
    other = image.clone()
    other[..., 8:16, 16:24] += 1  # the patch in row 1, column 2 of a 4 x 4 grid
    before, after = (trace(model, x) for x in (image, other))
    moved = (before["tokens"].tokens != after["tokens"].tokens).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [1 + 6]  # behind the class token
    for j in range(len(model.stages[0].blocks)):
        a, b = (t[f"stages.0.words.{j}"].tokens.unflatten(1, (16, 16)) for t in (before, after))
        assert (a != b).any(-1).any(-1)[0].nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_b_patch16_224"])
def test_claim_words_take_less_than_a_tenth_of_a_block(name):
    with torch.device("meta"):
        block = create(name).stages[0].blocks[0]
    inner = sum(p.numel() for part in (block.words, block.fuse) for p in part.parameters())
    assert inner < 0.1 * sum(p.numel() for p in block.parameters())


def test_without_the_fusion_the_sentences_are_a_plain_vision_transformer():
    model = create("tnt_micro").eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for block in model.stages[0].blocks:
            block.fuse.norm2.weight.zero_()
            block.fuse.norm2.bias.zero_()
        x = trace(model, image)["tokens"].tokens
        for block in model.stages[0].blocks:
            q, k, v = block.attention.qkv(block.norm1(x)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            x = x + block.attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(model(image), model.head(model.norm(x)[:, 0]))


# the network --------------------------------------------------------------------------------------------------------


def test_the_last_block_may_leave_out_what_the_head_does_not_read():
    model = create("tnt_micro").eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = model._run(image)[-1]
        torch.testing.assert_close(model(image), model.head(model.norm(tokens)[:, 0]))
    read = trace(model, image)
    for name in ("stages.0.blocks.3", "features"):
        assert read[name].map().shape[2:] == (4, 4)
        assert torch.equal(trace(model, image, at=name).output, read.output)
    torch.testing.assert_close(read["stages.0.blocks.3"].tokens, tokens)


def test_other_sizes_resize_the_positions_and_cut_a_remainder_off():
    model = create("tnt_micro").eval()
    image = torch.rand(1, 3, 45, 26)
    with torch.no_grad():
        assert model.pyramid(image)[0].shape == (1, 96, 5, 3)
        assert torch.equal(model(image), model(image[..., :40, :24]))
    with pytest.raises(BadInput, match="at least 8x8"):
        model(torch.rand(1, 3, 32, 7))


def test_dense_gives_the_map_that_pyramid_gives():
    model = create("tnt_micro", dense=True).eval()
    (out,) = model(torch.rand(2, 3, 32, 64))
    assert out.shape == (2, 96, 4, 8) and not hasattr(model, "head")


def test_squeeze_and_excitation_adds_a_gated_share():
    torch.manual_seed(0)
    layer, x = SqueezeExcite(16), torch.randn(2, 5, 16)
    gate = layer(x) / x
    torch.testing.assert_close(gate, gate[:, :1].expand_as(gate))
    assert gate.abs().max() < 1
    model = create("tnt_micro", se=True).eval()
    assert "stages.0.blocks.0.se.fc1.weight" in model.state_dict() and model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_short_attention_is_attention(scale):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 16, 6, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    found = short_attention(q, k, v, scale)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert torch.equal(short_attention(q, k, v, scale), expected)


def test_names_go_back_exactly():
    model = create("tnt_s_patch16_224")
    assert {*authors_of("tnt").export_state(model)} == {*read_header(RECORDS[0])["state"]}


def test_positions_and_class_token_escape_weight_decay():
    for name in ("tnt_micro", "pyramid_tnt_micro"):
        model = create(name)
        assert {n for n in model.no_weight_decay() if n in model.state_dict()} >= {"tokeniser.positions", "tokeniser.word_positions"}


# PyramidTNT ---------------------------------------------------------------------------------------------------------


def test_pyramid_words_stand_in_the_first_blocks_of_a_stage():
    with torch.device("meta"):
        model = create("pyramid_tnt_s_256")
    assert [sum(b.words is not None for b in s.blocks) for s in model.stages] == [1, 2, 1, 1]  # two where it has more than six


def test_pyramid_keys_are_pooled_and_the_table_belongs_to_the_size():
    with torch.device("meta"):
        model = create("pyramid_tnt_ti_192")
    assert [tuple(s.relative.shape) for s in model.stages] == [(1, 2, 576, 36), (1, 4, 144, 36), (1, 8, 36, 36), (1, 8, 9, 9)]


def test_pyramid_words_of_four_sentences_merge_as_they_lie_in_the_image():
    torch.manual_seed(0)
    merge, image = WordMerge(3, 5), torch.randn(1, 16, 24, 3)  # words of 4 x 6 sentences
    words = image.view(4, 4, 6, 4, 3).transpose(1, 2).reshape(24, 16, 3)
    out = merge(words, (4, 6)).view(2, 3, 4, 4, 5)
    block = merge.norm(image)[0, 8:16, 0:8].permute(2, 0, 1)[None]  # the lower left block
    torch.testing.assert_close(out[1, 0], merge.conv(block)[0].permute(1, 2, 0))


def test_pyramid_odd_grids_get_a_border_of_zeros():
    torch.manual_seed(0)
    merge = WordMerge(3, 5)
    words = torch.randn(15, 16, 3)  # of 3 x 5 sentences
    out = merge(words, (3, 5)).view(2, 3, 16, 5)
    corner = F.pad(merge.norm(words[-1]).view(4, 4, 3).permute(2, 0, 1)[None], (0, 4, 0, 4))
    torch.testing.assert_close(out[1, 2], merge.conv(corner)[0].flatten(1).t())


def test_pyramid_trains_and_takes_other_sizes():
    torch.manual_seed(0)
    model = create("pyramid_tnt_micro")
    model.loss(model.example_batch(4)).total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        maps = model.pyramid(torch.rand(2, 3, 40, 56))
        assert [tuple(m.shape) for m in maps] == [(2, 64, 5, 7), (2, 128, 3, 4)]
        assert model(torch.rand(2, 3, 40, 56)).shape == (2, 10)
        exact = model(image := torch.rand(2, 3, 32, 32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(image).float() - exact).abs().max() < 0.1 * exact.abs().max()
    with pytest.raises(BadInput, match="multiples of 8"):
        model(torch.rand(1, 3, 36, 32))


def test_pyramid_taps_read_and_edit():
    torch.manual_seed(0)
    model = create("pyramid_tnt_micro").eval()
    image = torch.rand(2, 3, 32, 32)
    read = trace(model, image)
    with torch.no_grad():
        assert torch.equal(read.output, model(image))
    assert read["stages.1.blocks.0"].grid == (2, 2) and read["stages.1.words.0"].tokens.shape == (2, 4 * 16, 16)
    for name in read:
        edited = trace(model, image, at=name, edit={name: lambda f: f.tokens + torch.randn_like(f.tokens)}).output
        assert not torch.equal(edited, read.output), name


def test_pyramid_names_round_trip():
    model, again = create("pyramid_tnt_micro"), create("pyramid_tnt_micro")
    theirs = authors_of("tnt").export_state(model)
    assert {
        *("patch_embed.common_conv.1.running_var", "patch_embed.outer_convs.6.weight", "word_merges.0.conv.0.weight"),
        *("sentence_merges.0.norm.bias", "stages.0.relative_pos", "stages.0.blocks.0.outer_attn.linear.weight"),
        *("stages.1.blocks.0.outer_attn.kv.weight", "stages.0.blocks.0.inner_attn.q.weight", "stages.0.blocks.0.proj.weight"),
    } <= {*theirs}
    load_state(again, theirs)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_pyramid_relative_positions_on_another_grid():
    model = create("pyramid_tnt_micro")
    stage = model.stages[0]
    assert stage.relative_on(stage.relative, (4, 4)) is stage.relative
    assert stage.relative_on(stage.relative, (6, 8)).shape == (1, 2, 48, 12)
    constant = torch.full_like(stage.relative, 0.7)
    torch.testing.assert_close(stage.relative_on(constant, (6, 8)), torch.full((1, 2, 48, 12), 0.7))


def test_one_config_says_which_of_the_two_it_is():
    assert create("tnt_micro").tokeniser.__class__ is not create("pyramid_tnt_micro").tokeniser.__class__
    assert isinstance(create("pyramid_tnt_micro"), TNT)

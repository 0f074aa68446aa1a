import pickle

import pytest
import torch
from safetensors.torch import save_file

from formarium import create
from formarium.authors import Rename, authors_of, read_checkpoint
from formarium.errors import BadCheckpoint


def test_a_rule_reads_either_way():
    rule = Rename("block{i+1}.{j}.attn.q", "stages.{i}.blocks.{j}.attention.q")
    assert rule.apply("block2.10.attn.q.weight") == "stages.1.blocks.10.attention.q.weight"
    assert rule.apply("stages.1.blocks.10.attention.q.weight", forward=False) == "block2.10.attn.q.weight"
    assert rule.apply("block2.10.attn.qkv.weight") is None  # whole dotted names only


@pytest.fixture
def released(tmp_path):
    torch.manual_seed(0)
    model = create("pvt_micro")
    return model, authors_of("pvt").export_state(model), tmp_path


def test_safetensors_and_torch_files_in_their_usual_wrappings(released):
    model, state, folder = released
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "b.pth")
    torch.save({"epoch": 3, "state_dict": {"module." + k: v for k, v in state.items()}}, folder / "c.pth")
    torch.save({"model": state}, folder / "d.pth")
    for name in ("a.safetensors", "b.pth", "c.pth", "d.pth"):
        other = create("pvt_micro").load_authors(folder / name)
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_what_does_not_fit_is_named(released):
    _, state, folder = released
    del state["cls_token"]
    state["surplus.weight"] = torch.zeros(1)
    save_file(state, folder / "a.safetensors")
    with pytest.raises(BadCheckpoint, match=r"1 not in it: cls_token; 1 not in the model: surplus\.weight"):
        create("pvt_micro").load_authors(folder / "a.safetensors")


def test_another_number_of_classes_is_explained_and_can_be_skipped(released):
    model, state, folder = released
    save_file(state, folder / "a.safetensors")
    with pytest.raises(BadCheckpoint, match=r'of another shape: head.*skip=\("head\.\*",\)'):
        create("pvt_micro", num_classes=3).load_authors(folder / "a.safetensors")
    other = create("pvt_micro", num_classes=3).load_authors(folder / "a.safetensors", skip=("head.*",))
    assert torch.equal(other.cls_token, model.cls_token)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_a_pickle_that_runs_code_is_refused_and_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "torch.pth")
    with open("plain.pkl", "wb") as f:
        pickle.dump(Bomb(), f)
    for name in ("torch.pth", "plain.pkl"):
        with pytest.raises(BadCheckpoint, match="can't be read safely"):
            create("pvt_micro").load_authors(name)
    assert not (tmp_path / "exploded").exists()


def test_files_that_hold_no_weights(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not really")
    torch.save([1, 2], tmp_path / "b.pth")
    for name, what in [("a.safetensors", "not a safetensors file"), ("b.pth", "no state dict"), ("c.pth", "no such file")]:
        with pytest.raises(BadCheckpoint, match=what):
            read_checkpoint(tmp_path / name)

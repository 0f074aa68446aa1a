import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from formarium import create
from formarium.engine.records import draw, flatten, replay, verify
from formarium.errors import BadInput, UnknownName

PVT = Path(__file__).parent.parent / "parity" / "pvt" / "pvt_tiny.safetensors"


def changed(path: Path, out: Path, header=None, outputs=None) -> Path:
    """The record with its header or outputs changed."""
    with safe_open(str(path), "pt") as f:
        record, tensors = json.loads(f.metadata()["record"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    record.update(header or {})
    for name, change in (outputs or {}).items():
        tensors[name] = change(tensors[name])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out, metadata={"record": json.dumps(record)})
    return out


def test_weights_come_from_their_names():
    assert torch.equal(draw("a", (3, 4), "w"), draw("a", (3, 4), "w"))
    assert not torch.equal(draw("a", (3, 4), "w"), draw("b", (3, 4), "w"))
    assert abs(draw("x", (2000, 50), "w").std().item() * 50**0.5 - 1) < 0.02
    assert abs(draw("x", (5000,), "g").mean().item() - 1) < 0.01 and (draw("x", (99,), "v") >= 1).all()


def test_an_output_that_is_off_fails(tmp_path):
    path = changed(PVT, tmp_path / "pvt" / "a.safetensors", outputs={"out.out": lambda t: t + 1e-3})
    outcome = replay(path)
    assert outcome.ok is False and outcome.worst > 1e-4 and "absmax" in outcome.why
    nan = changed(PVT, tmp_path / "pvt" / "b.safetensors", outputs={"out.out": lambda t: t * float("nan")})
    assert replay(nan).ok is False


def test_another_parameter_count_fails(tmp_path):
    outcome = replay(changed(PVT, tmp_path / "pvt" / "a.safetensors", header={"parameters": 7}))
    assert outcome.ok is False and "the reference has 7" in outcome.why


def test_the_constructor_says_what_the_name_does_not(tmp_path):
    """A record by a name the catalogue doesn't have, or by a name whose variant differs, is built from its constructor."""
    assert replay(changed(PVT, tmp_path / "pvt" / "a.safetensors", header={"variant": "pvt_odd"})).ok
    assert replay(changed(PVT, tmp_path / "pvt" / "b.safetensors", header={"variant": "pvt_large"})).ok


def test_unknown_systems_and_files_are_never_passed(tmp_path):
    assert replay(changed(PVT, tmp_path / "x" / "a.safetensors", header={"system": "nosuch"})).ok is None
    (tmp_path / "x" / "b.safetensors").write_bytes(b"junk")
    assert replay(tmp_path / "x" / "b.safetensors").ok is False


def test_verify_walks_a_folder_it_has_never_seen(tmp_path):
    shutil.copytree(PVT.parent, tmp_path / "anything")
    assert [r.ok for r in verify(["pvt"], tmp_path)] == [True, True]
    with pytest.raises(BadInput, match="no such folder"):
        verify(records=tmp_path / "nothing")
    with pytest.raises(BadInput, match="got none"):
        verify(["pvt"], _empty(tmp_path))
    with pytest.raises(UnknownName, match="pvt"):
        verify(["pwt"], tmp_path)


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_nested_outputs_go_by_dotted_paths():
    found = flatten({"a": [torch.zeros(1), (torch.zeros(2),)], "b": None})
    assert {k: v.shape[0] for k, v in found.items()} == {"a.0": 1, "a.1.0": 2}


def test_replaying_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = create("pvt_micro").cls_token
    torch.manual_seed(3)
    assert torch.equal(create("pvt_micro").cls_token, expected)

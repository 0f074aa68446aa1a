import json

import pytest
import torch

import formarium
from formarium import create, fit
from formarium.engine import runs
from formarium.errors import BadCheckpoint, BadInput, FormariumError, RunExists, UnknownName
from tests.engine import toys
from tests.engine.conftest import equal, weights


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toys.register(monkeypatch)


@pytest.fixture
def run(registered, tmp_path):
    return fit("toy_micro", toys.points(), tmp_path / "run", steps=2)


def test_runs_that_cannot_be_loaded_say_why(tmp_path, run):
    with pytest.raises(BadInput, match="neither"):
        formarium.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"config\.json"):
        formarium.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="of formarium's"):
        formarium.load(tmp_path / "empty")
    (run.path / runs.WEIGHTS).rename(run.path / "elsewhere")
    with pytest.raises(BadInput, match="resume it first"):
        formarium.load(run.path)
    (run.path / runs.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(BadCheckpoint, match="can't be read"):
        formarium.load(run.path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": {"width": 5, "drop_path": 0.0}}, r"body\.0\.weight is \[8, 4\], not \[5, 4\], body\.0\.bias is"),
        ({"config": {"breadth": 5}}, "doesn't fit .*breadth"),
        ({"system": "toygan", "variant": "toygan_micro"}, r"critic\.0\.weight is missing"),
    ],
)
def test_checkpoints_that_do_not_fit_name_what_is_wrong(run, changes, said):
    config = json.loads((run.path / runs.CONFIG).read_text())
    runs.write_json(run.path / runs.CONFIG, {**config, **changes})
    with pytest.raises(BadCheckpoint, match=said):
        formarium.load(run.path)


def test_a_system_this_version_does_not_have_is_named(run):
    config = json.loads((run.path / runs.CONFIG).read_text())
    runs.write_json(run.path / runs.CONFIG, {**config, "system": "toyg"})
    with pytest.raises(UnknownName, match="toygan"):
        formarium.load(run.path)


def test_a_model_can_be_saved_and_loaded_without_a_fit(tmp_path):
    model = create("toy_micro", width=3)
    where = runs.save(model, tmp_path / "saved")
    again = formarium.load(where)
    assert again.config == model.config and equal(dict(again.state_dict()), dict(model.state_dict()))
    assert "not trained" in (where / "README.md").read_text()
    with pytest.raises(RunExists):
        runs.save(model, where)
    assert formarium.load(runs.save(create("toy_micro", width=2), where, overwrite=True)).config.width == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunExists):
        runs.save(model, tmp_path / "mine", overwrite=True)


def test_files_appear_whole_or_not_at_all(tmp_path):
    runs.write_whole(tmp_path / "a", b"first")
    with pytest.raises(RuntimeError), runs.whole(tmp_path / "a") as f:
        f.write(b"sec")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"first"
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [*runs.read_metrics(tmp_path / "m.jsonl")] == [{"step": 1}, {"step": 2}]


def test_what_public_functions_accept(run):
    model = run.model
    assert runs.as_model(model) is model is runs.as_model(run)
    assert equal(weights(run), dict(runs.as_model(run.path).state_dict())) and equal(
        weights(run), dict(runs.as_model(str(run.path)).state_dict())
    )
    assert runs.as_model("toy_micro").variant == "toy_micro"
    with pytest.raises(UnknownName):
        runs.as_model("toy_mikro")
    with pytest.raises(BadInput):
        runs.as_model(str(run.path.parent))


def test_held_out_samples_stay_held_out(tmp_path, monkeypatch):
    """A folder that a run was fitted on with another split seed is split in the same way again."""
    seen = []
    monkeypatch.setattr(toys.task, "read", lambda path, **options: seen.append(options) or _data(path), raising=False)
    data = runs.as_data("photos", "toy", seed=5, strict=True)
    run = fit("toy_micro", data, tmp_path / "run", steps=1)
    assert run.config["data"]["options"] == {"seed": 5}
    for model in (run, tmp_path / "run", formarium.load(tmp_path / "run"), run.model):
        formarium.evaluate(model, "photos", bootstrap=0)
        assert seen[-1] == {"seed": 5}
    fit(tmp_path / "run", "photos", steps=1)
    assert seen[-1] == {"seed": 5}
    formarium.evaluate(run, "other_photos", bootstrap=0)
    assert seen[-1] == {}
    fit("toy_micro", "photos", steps=1, seed=3)  # the fit's seed decides nothing about the split
    assert seen[-1] == {}


def _data(path):
    data = toys.points()
    data.source = {"path": str(path)}
    return data


# the Hub ------------------------------------------------------------------------------------------------------------


class FakeHub:
    """A Hub that keeps what is uploaded in a folder."""

    def __init__(self, folder):
        self.folder, self.refuses = folder, None

    def create_repo(self, repo_id, private, exist_ok):
        if self.refuses:
            raise self.refuses
        return f"https://hub/{repo_id}" + ("?private" if private else "")

    def upload_folder(self, repo_id, folder_path, commit_message):
        import shutil

        shutil.copytree(folder_path, self.folder / repo_id)

    def snapshot_download(self, repo_id, allow_patterns):
        from huggingface_hub.errors import LocalEntryNotFoundError

        if not (self.folder / repo_id).exists():
            raise LocalEntryNotFoundError("not cached, and offline")
        assert {runs.CONFIG, runs.WEIGHTS} <= {*allow_patterns}
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_a_run_goes_to_the_hub_and_comes_back(run, hub):
    assert run.push_to_hub("me/points") == "https://hub/me/points"
    sent = {p.name for p in (hub.folder / "me" / "points").iterdir()}
    assert sent == {"config.json", "model.safetensors", "metrics.jsonl", "README.md"}
    card = (hub.folder / "me" / "points" / "README.md").read_text()
    assert "library_name: formarium" in card and "- error: " in card and "trained on points" in card
    for name in ("me/points", "hf://me/points"):
        assert equal(dict(formarium.load(name).state_dict()), weights(run))
    assert formarium.evaluate("me/points", toys.points()).metrics == run.summary
    runs.push_to_hub(create("toy_micro"), "me/fresh", private=True)
    assert formarium.load("me/fresh").variant == "toy_micro"


def test_what_the_hub_refuses_is_one_line(run, hub):
    from unittest.mock import MagicMock

    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with pytest.raises(BadInput, match=r"no such folder, and LocalEntryNotFoundError"):
        formarium.load("me/nothing")
    for name in ("a/b/c", "hf://a", "../x/y", "a b/c"):
        with pytest.raises(BadInput, match="neither"):
            formarium.load(name)
    hub.refuses = HFValidationError("a name of 200 letters")
    with pytest.raises(BadInput, match="200 letters"):
        run.push_to_hub("me/points")
    hub.refuses = HfHubHTTPError("401 Unauthorized\nmany lines", response=MagicMock(headers={}))
    with pytest.raises(FormariumError, match=r"refused me/points: 401 Unauthorized \(log in"):
        run.push_to_hub("me/points")


def test_snapshots_are_read_in_order(tmp_path):
    run = fit("toy_micro", toys.points(), tmp_path / "run", steps=11, snapshots=11)
    assert [*runs.load_run(tmp_path / "run").snapshots()] == [*range(12)] == [*run.snapshots()]
    assert torch.equal(run.snapshots()[11]["body.0.weight"], run.model.body[0].weight)

"""Run directories: what a fit leaves behind, and how it is loaded again, from disk or from the Hugging Face Hub.

config.json        system, variant, config, preprocessing, class names, recipe, what was measured
model.safetensors  the weights (the averaged ones where the recipe averages)
metrics.jsonl      one line a logged step; TensorBoard's events.* beside it
README.md          a model card
checkpoint/        where to go on from       snapshots/STEP.safetensors, where asked for
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes

import formarium
from formarium.catalogue import cards, create, freeze, make_config, model_class, system_class
from formarium.errors import BadCheckpoint, BadInput, FormariumError, RunExists, UnknownName
from formarium.model import Model
from formarium.task import Data, task

CONFIG, WEIGHTS, METRICS, STATE, README = "config.json", "model.safetensors", "metrics.jsonl", "checkpoint/state.pt", "README.md"
SNAPSHOTS = "snapshots"


@dataclass
class Run:
    """A fitted model and what is known of how it went. `path` is None where nothing was written."""

    model: Model
    path: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)  # snapshots, where nothing was written

    @property
    def summary(self) -> dict[str, float]:
        """The held-out metrics at the end."""
        return self.config.get("summary", {})

    @property
    def data(self) -> dict[str, Any]:
        """What it was fitted on: name, where it came from, sizes of the splits, notes."""
        return self.config.get("data", {})

    def snapshots(self) -> dict[int, dict[str, torch.Tensor]]:
        """Step -> state dict, as kept by fit(snapshots=...)."""
        folder = self.path / SNAPSHOTS if self.path else None
        if folder is None or not folder.is_dir():
            return dict(self.kept)
        return {int(p.stem): read_weights(p) for p in sorted(folder.glob("[0-9]*.safetensors"), key=lambda p: int(p.stem))}

    def curve(self, key: str, split: str = "train") -> list[tuple[int, float]]:
        """(step, value) of one logged number."""
        return [(row["step"], row[key]) for row in self.history if row.get("split") == split and key in row]

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        return push_to_hub(self, repo_id, private)


# writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that appears under its name whole or not at all, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)
    if hasattr(os, "O_DIRECTORY"):  # the new name must be on the disk too
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def reached(directory: Path) -> int:
    """The step that a run directory's weights are of, 0 where it has none."""
    if not (directory / WEIGHTS).exists():
        return 0
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    return int(config.get("stopped_at") or config.get("steps") or 0)


def write_whole(path: Path, data: bytes) -> None:
    with whole(path) as f:
        f.write(data)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, default=_plain) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else str(value)


def write_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    write_whole(path, save_bytes({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}))


def save(model: Model | Run, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model or run as a run directory (config, weights, model card), which `load` and the Hub take. Returns the directory.

    Raises RunExists where the directory holds a run already (unless `overwrite`), or other files.
    """
    run, out = as_run(model), Path(path)
    config = run.config or describe(run.model)
    claim(out, config, overwrite=overwrite)
    if overwrite:
        clear(out)
    write_json(out / CONFIG, config)
    write_whole(out / README, model_card(config).encode())
    if run.history:
        write_whole(out / METRICS, "".join(json.dumps(row) + "\n" for row in run.history).encode())
    write_weights(out / WEIGHTS, run.model.state_dict())
    return out


def model_card(config: Mapping[str, Any]) -> str:
    """The README.md of a run, in the Hub's form."""
    card = cards().get(config["system"])
    names = [*map(str, config.get("names", []))]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    metrics = "\n".join(f"- {k}: {v:.4f}" for k, v in config.get("summary", {}).items()) or "- not measured"
    trained = f"trained on {config['data']['name']}" if "data" in config else "not trained by formarium"
    paper = f" ([arXiv {card.paper['arxiv']}](https://arxiv.org/abs/{card.paper['arxiv']}))" if card and card.paper.get("arxiv") else ""
    return f"""---
library_name: formarium
tags: [formarium, {config["system"]}, {config["task"]}]
---
# {config["variant"]}

{card.title if card else config["system"]}{paper}. Made with formarium {config["formarium"]}, {trained}.
{f"Classes: {shown}." if names else ""}

Held-out metrics:

{metrics}

```python
import formarium

model = formarium.load("this repository or folder")
formarium.predict(model, ["a file"])
```
"""


def describe(model: Model, data: Data | None = None) -> dict[str, Any]:
    """What config.json says of a model."""
    if model.card is None:
        raise BadInput("model", expected="one made by formarium.create", got=type(model).__name__)
    said: dict[str, Any] = {
        "formarium": formarium.__version__,
        "system": model.card.slug,
        "variant": model.variant,
        "task": model.task,
        "config": model.config_dict(),
        "preprocessing": model.preprocessing,
        "names": [*(data.names if data else getattr(model, "names", ()))],
    }
    if model.changes:
        said["changes"] = model.changes
    if data is not None:
        said["data"] = {"name": data.name, **data.source, "sizes": {k: len(v) for k, v in data.splits.items()}, "notes": data.notes}
    return said


# taking a directory -------------------------------------------------------------------------------------------------

_SAME = ("system", "variant", "config", "recipe", "seed", "names", "steps")  # what makes two runs the same


def claim(out: Path, config: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
    """See that `out` may be written to: new, empty, or a run that may be gone on with or replaced. Changes nothing.

    Raises RunExists for a directory of other files, for a run where neither is asked for, and where the one to go on with is another
    run; BadInput for a file.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(str(out), expected="a directory", got="a file")
    if not out.exists() or not any(p for p in out.iterdir() if not p.name.endswith(".part")):
        return
    found = read_config(out)
    if found is None:
        raise RunExists(f"{out} holds other files, and no run; give another directory")
    if resume:
        new = json.loads(json.dumps(config, default=_plain))
        for key in _SAME:
            if found.get(key) != new.get(key):
                raise RunExists(f"{out} holds a run with another {key}; give the same arguments to resume it, or overwrite it")
    elif not overwrite:
        raise RunExists(f"{out} already holds a run; resume it, overwrite it, or give another directory (--resume, --overwrite, --out)")


def clear(out: Path) -> None:
    """Empty a directory that is a run; any other stays as it is. What says that it is one goes last."""
    if out.is_dir() and read_config(out) is not None:
        for p in sorted(out.iterdir(), key=lambda p: p.name == CONFIG):
            shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()


def read_config(folder: Path) -> dict[str, Any] | None:
    """A run directory's config.json; None where there is none, or another program's."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and {"formarium", "system", "variant"} <= {*config} else None


# reading ------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Model:
    """The model of a run directory, or of a Hub repository in the same layout ("org/name", "hf://org/name"), ready to predict.

    `model.names` has the class names. Raises BadInput where nothing is there, BadCheckpoint where it doesn't fit.
    """
    return load_run(path).model


def load_run(path: str | Path) -> Run:
    """The same with all that is known of the run."""
    folder = Path(path) if Path(path).is_dir() else _from_hub(str(path))
    config = read_config(folder)
    if config is None:
        raise BadInput(str(path), expected=f"a run directory, with a {CONFIG} of formarium's", got="a folder without one")
    model = build(config)
    if (folder / WEIGHTS).is_file():
        load_weights(model, read_weights(folder / WEIGHTS), folder / WEIGHTS)
    elif (folder / STATE).is_file():
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        load_weights(model, state["averaged"] or state["model"], folder / STATE)
        warnings.warn(f"{folder} isn't finished: these are the weights of step {state['step']} of {config['steps']}", stacklevel=2)
    else:
        raise BadInput(str(path), expected="a run with weights", got=f"one without {WEIGHTS}", fix="resume it first")
    model.precision = config.get("precision", {}).get("predict")
    model.fitted_on = config.get("data", {})
    return Run(model.eval(), folder, config, [*read_metrics(folder / METRICS)])


def build(config: Mapping[str, Any], **changes: Any) -> Model:
    """The model that a config.json describes (but for some config fields), with fresh weights."""
    if config.get("system") not in cards():
        raise UnknownName("system", str(config.get("system")), cards())
    card = cards()[config["system"]]
    cls = model_class(card)
    try:
        model: Model = cls(make_config(cls.Config, {**config["config"], **changes}))
    except (TypeError, KeyError) as e:
        made = config.get("formarium", "?")
        raise BadCheckpoint(f"{config['variant']}'s {CONFIG} (of formarium {made}) doesn't fit {formarium.__version__}: {e}") from None
    model.adopt(card, config["variant"], config.get("preprocessing", {}))
    model.names = [*config.get("names", [])]
    for change in config.get("changes", []):
        model = system_class(cards()[change["method"]])(**change["options"]).apply(model)
    return model


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise BadCheckpoint(f"{path} can't be read: {e}") from None


def load_weights(model: Model, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raises BadCheckpoint, naming the keys or shapes that don't fit."""
    own = model.state_dict()
    wrong = [
        *(f"{k} is missing" for k in own if k not in state),
        *(f"{k} is unknown" for k in state if k not in own),
        *(f"{k} is {[*state[k].shape]}, not {[*v.shape]}" for k, v in own.items() if k in state and state[k].shape != v.shape),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BadCheckpoint(f"{source} doesn't fit {model.variant}: {', '.join(wrong[:3])}{more}")
    model.load_state_dict(state)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The logged rows; a last line that a crash cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


# the Hugging Face Hub -----------------------------------------------------------------------------------------------


def push_to_hub(model: str | Path | Model | Run, repo_id: str, private: bool = False) -> str:
    """Upload a model or run (weights, config, metrics, model card) to a Hub repository, made where it isn't there; returns its address.

    Raises BadInput where the name can't be one, FormariumError with the Hub's reason where it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    run = as_run(model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(run, Path(scratch) / "run")
        try:
            url = HfApi().create_repo(repo_id, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"{run.model.variant} by formarium")
        except HFValidationError as e:
            raise BadInput(repo_id, expected="a Hub repository (org/name)", got=str(e)) from None
        except HfHubHTTPError as e:
            raise FormariumError(f"the Hub refused {repo_id}: {str(e).splitlines()[0]} (log in with `hf auth login`)") from None
    return str(url)


def _from_hub(repo: str) -> Path:
    name = repo.removeprefix("hf://")
    wrong = BadInput(repo, expected="a run directory or a Hub repository (org/name)", got="neither")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise wrong
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, METRICS, README]))
    except HFValidationError:
        raise wrong from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        got = f"no such folder, and {type(e).__name__} from the Hub"
        raise BadInput(repo, expected="a run directory or a Hub repository (org/name)", got=got) from None


# what public functions accept ---------------------------------------------------------------------------------------


def as_run(model: str | Path | Model | Run, **overrides: Any) -> Run:
    """A Run from itself, a run directory, a Hub repository, a model, or a name in the catalogue (fresh weights)."""
    if isinstance(model, Run):
        return model
    if isinstance(model, Model):
        return Run(model)
    if isinstance(model, Path) or (Path(model) / CONFIG).exists() or model.startswith("hf://"):
        return load_run(model)
    try:
        return Run(create(str(model), **overrides))
    except UnknownName:
        if "/" in model or Path(model).exists():
            return load_run(model)
        raise


def as_model(model: str | Path | Model | Run, **overrides: Any) -> Model:
    """The model of what `as_run` takes."""
    return as_run(model, **overrides).model


def as_data(data: str | Path | Data, task_name: str, **options: Any) -> Data:
    """Data from itself, "sample:NAME", or a path that the task reads. Options that decide the splits (seed, holdout) stay in `source`."""
    if isinstance(data, Data):
        if data.task != task_name:
            raise BadInput(data.name, expected=f"data for {task_name}", got=f"data for {data.task}")
        return data
    if isinstance(data, str) and data.startswith("sample:"):
        options = {k: v for k, v in options.items() if k == "seed"}
        found = task(task_name).sample(data.removeprefix("sample:"), **options)
    else:
        found = task(task_name).read(data, **options)
    kept = {k: v for k, v in options.items() if k != "strict"}
    found.source = {**found.source, **({"options": kept} if kept else {})}
    return found


def data_for(model: Model, data: str | Path | Data) -> Data:
    """Data for a model; where it was fitted on the same, split as it was then, so that held-out samples stay held out."""
    then = getattr(model, "fitted_on", {})
    if isinstance(data, Data):
        same = False
    elif "sample" in then:
        same = str(data) == f"sample:{then['sample']}"
    else:
        same = "path" in then and Path(data).resolve() == Path(then["path"]).resolve()
    return as_data(data, model.task, **(then.get("options", {}) if same else {}))


def must_fit(model: Model, data: Data) -> None:
    """Raises BadInput where the model's config isn't what the data asks for (another number of classes)."""
    for key, value in data.model_args.items():
        own = getattr(model.config, key, value)
        if freeze(own) != freeze(value):
            raise BadInput(f"{model.variant} on {data.name}", expected=f"{key} = {value}, as the data has", got=f"a model with {own}")

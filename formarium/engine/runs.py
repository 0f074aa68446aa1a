"""Run directories: what a fit leaves behind, and how it is loaded again, from disk or from the Hugging Face Hub.

config.json        system, variant, config, preprocessing, class names, recipe, what was measured
model.safetensors  the weights (the averaged ones where the recipe averages)
metrics.jsonl      one line a logged step
README.md          a model card
checkpoint/        where to go on from       snapshots/STEP.safetensors, where asked for
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

import formarium
from formarium.catalogue import cards, create, make_config, system_class
from formarium.errors import BadCheckpoint, BadInput, RunExists, UnknownName
from formarium.model import Model
from formarium.task import Data, task

CONFIG, WEIGHTS, METRICS, STATE = "config.json", "model.safetensors", "metrics.jsonl", "checkpoint/state.pt"


@dataclass
class Run:
    """A fitted model and what is known of how it went. `path` is None where nothing was written."""

    model: Model
    path: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, float]:
        """The held-out metrics at the end."""
        return self.config.get("summary", {})

    def snapshots(self) -> dict[int, dict[str, torch.Tensor]]:
        """Step -> state dict, as kept by fit(snapshots=...)."""
        folder = self.path / "snapshots" if self.path else None
        found = sorted(folder.glob("*.safetensors"), key=lambda p: int(p.stem)) if folder and folder.is_dir() else []
        return {int(p.stem): load_file(p) for p in found}

    def curve(self, key: str, split: str = "train") -> list[tuple[int, float]]:
        """(step, value) of one logged number."""
        return [(row["step"], row[key]) for row in self.history if row.get("split") == split and key in row]

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the run (weights, config, metrics, model card) to a Hugging Face Hub repository; returns its address."""
        from huggingface_hub import HfApi

        if self.path is None:
            raise BadInput("push_to_hub", expected="a run that was written", got="one without a directory", fix="fit with out=")
        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(self.path), ignore_patterns=["checkpoint/*", "snapshots/*", "events.*"])
        return str(url)


# writing ------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1, default=_plain) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else str(value)


def write_weights(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    write_whole(path, save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}))


def model_card(config: Mapping[str, Any]) -> str:
    """The README.md of a run, in the Hub's form."""
    card = cards().get(config["system"])
    metrics = "\n".join(f"- {k}: {v:.4f}" for k, v in config.get("summary", {}).items())
    names = ", ".join(map(str, config.get("names", [])[:20]))
    title = card.title if card else config["system"]
    return f"""---
library_name: formarium
tags: [formarium, {config["system"]}, {config["task"]}]
---
# {config["variant"]}

{title}. Trained with formarium {config["formarium"]} on {config.get("data", {}).get("name", "?")} ({names}).

Held-out metrics:
{metrics}

```python
import formarium

model = formarium.load("this repository or folder")
formarium.predict(model, ["picture.jpg"])
```
"""


def describe(model: Model, data: Data | None = None) -> dict[str, Any]:
    """What config.json says of a model."""
    if model.card is None:
        raise BadInput("model", expected="one made by formarium.create", got=type(model).__name__)
    said = {
        "formarium": formarium.__version__,
        "system": model.card.slug,
        "variant": model.variant,
        "task": model.task,
        "config": model.config_dict(),
        "preprocessing": model.preprocessing,
        "names": [*(data.names if data else model.names)],
    }
    if data is not None:
        said["data"] = {"name": data.name, **data.source, "sizes": {k: len(v) for k, v in data.splits.items()}, "notes": data.notes}
    return said


def claim_directory(out: Path, resume: bool, overwrite: bool) -> None:
    """Make sure that `out` can be written to: new, empty, or a run that may be gone on with or replaced. RunExists otherwise."""
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        return
    is_run = (out / CONFIG).exists()
    if resume and is_run:
        return
    if not is_run:
        raise RunExists(f"{out} holds other files, and no run; give another directory")
    if not overwrite:
        raise RunExists(f"{out} already holds a run; resume it, overwrite it, or give another directory (--resume, --overwrite, --out)")
    shutil.rmtree(out)
    out.mkdir(parents=True)


# reading ------------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Model:
    """The model of a run directory, or of a Hub repository in the same layout ("org/name"), ready to predict.

    `model.names` has the class names. Raises BadInput where nothing is there, BadCheckpoint where it doesn't fit.
    """
    return load_run(path).model


def load_run(path: str | Path) -> Run:
    folder = Path(path)
    if not folder.is_dir():
        folder = _from_hub(str(path))
    if not (folder / CONFIG).is_file():
        raise BadInput(str(path), expected=f"a run directory (with {CONFIG})", got="a folder without one")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    model = build(config)
    if not (folder / WEIGHTS).is_file():
        raise BadInput(str(path), expected="a finished run", got=f"one without {WEIGHTS}", fix="resume it first")
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError as e:
        raise BadCheckpoint(f"{folder / WEIGHTS} doesn't fit {config['variant']}: {str(e).splitlines()[-1].strip()}") from None
    return Run(model.eval(), folder, config, [*read_metrics(folder / METRICS)])


def build(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes, with fresh weights."""
    if config.get("system") not in cards():
        raise UnknownName("system", str(config.get("system")), cards())
    card = cards()[config["system"]]
    cls = system_class(card)
    model: Model = cls(make_config(cls.Config, config["config"]))
    model.adopt(card, config["variant"], config["preprocessing"])
    model.names = [*config.get("names", [])]
    return model


def _from_hub(repo: str) -> Path:
    name = repo.removeprefix("hf://")
    if name.count("/") != 1 or name.startswith((".", "/")) or Path(name).suffix:
        raise BadInput(repo, expected="a run directory or a Hub repository (org/name)", got="neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, METRICS]))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        reason = f"{type(e).__name__} on the Hub"
        raise BadInput(repo, expected="a run directory or a Hub repository (org/name)", got=f"no such folder, and {reason}") from None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The logged rows; a last line that a crash cut short is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


# what public functions accept ---------------------------------------------------------------------------------------


def as_model(model: str | Path | Model | Run, **overrides: Any) -> Model:
    """A Model from itself, a run, a run directory or a name in the catalogue."""
    if isinstance(model, Model):
        return model
    if isinstance(model, Run):
        return model.model
    if isinstance(model, Path) or (Path(model) / CONFIG).exists():
        return load(model)
    try:
        return create(str(model), **overrides)
    except UnknownName:
        if "/" in str(model):
            return load(model)
        raise


def as_data(data: str | Path | Data, task_name: str, **options: Any) -> Data:
    """Data from itself, "sample:NAME", or a path that the task reads."""
    if isinstance(data, Data):
        return data
    if isinstance(data, str) and data.startswith("sample:"):
        return task(task_name).sample(data.removeprefix("sample:"), seed=options.get("seed", 0))
    return task(task_name).read(data, **options)

"""Journal: what a fit writes into its run directory while it goes, and reads again to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formarium.engine import runs

Row = dict[str, Any]


class Journal:
    """Rows, TensorBoard events, snapshots, checkpoints and the finished model.

    Every file appears whole or not at all, but for metrics.jsonl, which grows by lines. Without a directory, or where another process does
    the writing, rows and snapshots are kept in memory alone.
    """

    def __init__(self, directory: Path | None, writes: bool):
        self.directory = directory
        self.writes = writes and directory is not None
        self.rows: list[Row] = []
        self.kept: dict[int, dict[str, torch.Tensor]] = {}
        self.events: Any = None
        self.last_checkpoint = "there is no checkpoint yet"

    def _at(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / name

    @property
    def finished(self) -> bool:
        return self.directory is not None and self._at(runs.WEIGHTS).exists()

    def begin(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Take the directory, which `runs.claim` has looked at."""
        if self.writes:
            if overwrite:
                runs.clear(self._at("."))
            self._at(runs.WEIGHTS).unlink(missing_ok=True)  # of an earlier stop, from which it goes on
            runs.write_json(self._at(runs.CONFIG), config)

    def row(self, row: Row) -> None:
        """Log a row, whose "split" says what its numbers are of."""
        self.rows.append(row)
        if not self.writes:
            return
        with open(self._at(runs.METRICS), "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.events is None:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(self.directory), purge_step=row["step"])
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch", "seconds"):
                self.events.add_scalar(f"{row['split']}/{key}", value, row["step"])

    def snapshot(self, step: int, state: Mapping[str, torch.Tensor]) -> None:
        if self.writes:
            runs.write_weights(self._at(runs.SNAPSHOTS) / f"{step}.safetensors", state)
        elif self.directory is None:
            self.kept[step] = {k: v.detach().cpu().clone() for k, v in state.items()}

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        if self.writes:
            with runs.whole(self._at(runs.STATE)) as f:
                torch.save(dict(state), f)
            self.last_checkpoint = f"the checkpoint of step {state['step']} is kept"

    def restore(self, device: torch.device) -> dict[str, Any] | None:
        """The last checkpoint, or None. Rows logged after it are forgotten, since those steps are about to happen again."""
        state = None
        if self.directory is not None and self._at(runs.STATE).exists():
            state = torch.load(self._at(runs.STATE), map_location=device, weights_only=True)
            self.last_checkpoint = f"the checkpoint of step {state['step']} is kept"
        if self.directory is not None and self._at(runs.METRICS).exists():
            last = state["step"] if state else 0
            self.rows = [row for row in runs.read_metrics(self._at(runs.METRICS)) if row["step"] <= last]
            if self.writes:
                runs.write_whole(self._at(runs.METRICS), "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return state

    def finish(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        """The weights come last: a directory that has them is a finished run. One that was stopped early keeps its checkpoint."""
        if self.writes:
            runs.write_json(self._at(runs.CONFIG), config)
            runs.write_whole(self._at(runs.README), runs.model_card(config).encode())
            runs.write_weights(self._at(runs.WEIGHTS), state)
            if "stopped_at" not in config:
                self._at(runs.STATE).unlink(missing_ok=True)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
            self.events = None

"""What methods share whose training leaves a smaller network than it began with."""

from __future__ import annotations

from typing import Any

from formarium.methods.wrapping import Wrapped


class Shrinking(Wrapped):
    """A Wrapped that changes its own sizes while it trains, and writes them into its Config.

    `config_dict` always gives the same dict, kept up to date, so that a run that took it at the start has the final sizes at the end.
    """

    def config_dict(self) -> dict[str, Any]:
        said: dict[str, Any] = self.__dict__.setdefault("_said", {})
        now = super().config_dict()
        said.clear()
        said.update(now)
        return said

    def reconfigure(self, **changes: Any) -> None:
        super().reconfigure(**changes)
        self.config_dict()

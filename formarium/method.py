"""Method: changes a model or how it trains (quantisation, early exits, distillation, adapters ...)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from formarium.model import Model


class Method:
    """The contract of every method. Options go to the constructor; `apply` changes the model.

    `needs(model)` gives a sentence saying why this method can't change that model, or "" where it can. A method that trains returns a
    model whose `training_stages()` say how; the engine's `fit` then runs them like any other model's.
    """

    network: ClassVar[type[Model] | None] = None  # the class of what it makes (and then trains), where that is no longer the model's own

    def needs(self, model: Model) -> str:
        return ""

    def apply(self, model: Model, data: Any = None) -> Model:
        """The changed model (the same object where it can be changed in place). Raises BadInput where `needs` gives a reason."""
        raise NotImplementedError

    def settle(self, model: Any, data: Any) -> bool:
        """Choose, on training data, what can only be chosen once the changed model is trained (a threshold, say); whether it did."""
        return False


def remember(model: Any, method: str, **options: Any) -> None:
    """Note in a model which method (by slug, with which options) changed it in place, so that its run directory loads as it was saved."""
    if hasattr(model, "changes"):
        model.changes.append({"method": method, "options": options})

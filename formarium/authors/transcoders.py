"""Transcoders: github.com/jacobdunefsky/transcoder_circuits (sae_training/sparse_autoencoder.py, transcoder_circuits/circuit_analysis.py).

Their parameters have our names. A record holds one transcoder and its losses, or the pieces of an attribution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from formarium.authors import Authors, State
from formarium.lenses.circuits import head_contributions, norm_constant, pull_back
from formarium.nn.transcoder import Transcoder


def _made(state: State, prefix: str = "") -> Transcoder:
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    made = Transcoder(*own["W_enc"].shape[:1], own["W_dec"].shape[1], own["W_enc"].shape[1])
    made.load_state_dict(own)
    return made.eval()


def layer(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    """A transcoder's output, activations and losses; without a target in the inputs, those of an autoencoder."""
    made, x = _made(state), inputs["x"]
    out, z = made(x)
    losses = made.loss(x, inputs.get("target", x), header["reference"]["constructor"].get("l1_coefficient", 0.0))
    return {"out": out, "acts": z, "loss": losses.total, "mse_loss": losses.mse, "l1_loss": losses.l1}


def attribution(header: dict[str, Any], inputs: dict[str, Tensor], state: State) -> dict[str, Tensor]:
    said = header["reference"]["constructor"]
    # the record's heads are those of the first layer
    made, direction, token = _made(state, "tc."), inputs["direction"], said["token"]
    z = made.encode(inputs["ln2"])[0, token]
    invariant = pull_back(made, direction)
    return {
        "pullback": invariant,
        "input_times_gradient": invariant * z,
        "activations": z,
        "ln_constant": norm_constant(direction, inputs["resid_mid"][0, token], inputs["ln2"][0, token]),
        "head_contributions": head_contributions(inputs["v"], inputs["pattern"], state["W_O"][0], direction),
    }


authors = Authors(parts={"transcoders_attribution*": attribution, "*": layer})

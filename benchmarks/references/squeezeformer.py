"""Squeezeformer beside github.com/kssteven418/Squeezeformer, which is Keras: needs tensorflow-cpu and the tf_keras of its version.

Theirs runs through tf.function, as Keras trains and predicts, on as many threads as torch has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from references import Pair, forward, importing, recorded, squares, step

REPOSITORY = "kssteven418/Squeezeformer"
NEEDS = ("tensorflow", "tf_keras")


def pairs(clone: Path) -> Iterator[Pair]:
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(torch.get_num_threads())
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")
    tf.random.set_seed(0)
    with importing(clone, **STUBS):
        from src.models.conformer import ConformerCtc
    r = recorded("squeezeformer", "squeezeformer_xs")
    theirs = made(ConformerCtc, **r.constructor)

    @tf.function(reduce_retracing=True)
    def says(x: Any, length: Any) -> Any:
        return theirs({"inputs": x, "inputs_length": length}, training=False)["logits"]

    optimiser = tf.keras.optimizers.legacy.Adam(1e-5)  # as their training has it

    @tf.function(reduce_retracing=True)
    def trains(x: Any, length: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(theirs({"inputs": x, "inputs_length": length}, training=True)["logits"]))
        optimiser.apply_gradients(zip(tape.gradient(loss, theirs.trainable_variables), theirs.trainable_variables, strict=True))
        return loss

    def as_tf(features: Tensor, length: Tensor) -> tuple[Any, Any]:
        return tf.constant(features.numpy()), tf.constant(length.numpy(), tf.int32)

    x, length = r.inputs[0], r.inputs[1]
    given = as_tf(x, length)
    theirs(dict(zip(("inputs", "inputs_length"), given, strict=True)))  # its layers make and number their weights at the first call
    load(theirs, r.state)
    with torch.no_grad():
        a, b = r.ours.eval()(x.squeeze(-1), length), torch.from_numpy(says(*given).numpy())
    if not torch.allclose(a, b, atol=1e-3 * float(b.abs().max())):
        raise SystemExit(f"squeezeformer_xs says something else than formarium: {(a - b).abs().max():.2g}")
    for utterances in (1, 8):
        features, length = torch.randn(utterances, 600, 80), torch.full((utterances,), 600)
        given, name = as_tf(features[..., None], length), f"squeezeformer_xs, {utterances} of 6 s"
        yield Pair(name, "forward", forward(r.ours, features, length), lambda x=given: says(*x).numpy())
        yield Pair(name, "train", step(r.ours, lambda x=features, n=length: squares(r.ours(x, n))), lambda x=given: trains(*x).numpy())


STUBS: dict[str, Any] = {"src__featurizers": {}, "src__featurizers__speech_featurizers": {}, "src__featurizers__text_featurizers": {}}


def made(cls: Any, vocabulary_size: int, **encoder: Any) -> Any:
    return cls(vocabulary_size, name="conformer", **{f"encoder_{k}": v for k, v in encoder.items()})


def load(theirs: Any, state: dict[str, Tensor]) -> None:
    """The record's weights, which have Keras' names, into theirs."""
    for variable in theirs.variables:
        name = variable.name.removesuffix(":0").removeprefix("conformer/").replace("conformer_", "").replace("/", ".")
        name = name.replace("moving_mean", "running_mean").replace("moving_variance", "running_var")
        variable.assign(state[name].numpy())

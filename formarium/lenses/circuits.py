"""Which paths lead to a transcoder feature (Dunefsky et al., NeurIPS 2024, section 4): weights times activations, layer by layer.

From a feature i of a later layer back to feature j of an earlier one, at the same token, the contribution is
z_j(x) * <f_dec_j, f_enc_i>: the first factor depends on the input, the second doesn't. Through an attention head it is linear once the
pattern is taken as it was; norms are constants, each token's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from formarium.nn.gpt import Activations, DecoderView
from formarium.nn.transcoder import Transcoder


@dataclass(frozen=True)
class Node:
    """A place in the model: an MLP's feature, a head that reads a source token, or the embedding. index: of the feature or head."""

    kind: str  # "mlp", "attention" or "embedding"
    layer: int
    token: int
    index: int = -1

    def __str__(self) -> str:
        where = {"mlp": f"mlp{self.layer}[{self.index}]", "attention": f"attn{self.layer}[{self.index}]", "embedding": "embed"}
        return f"{where[self.kind]}@{self.token}"


@dataclass(frozen=True)
class Step:
    """A node on a path, what it contributes to the feature at the path's start, and the direction in the residual that it reads: float
    [dim], before the attention of `layer` ("before") or behind it ("mid"), at the node's token. invariant: the weights' part of it."""

    node: Node
    contribution: float
    direction: Tensor = field(repr=False)
    place: str
    invariant: float = 1.0

    @property
    def done(self) -> bool:
        return self.node.kind == "embedding" or (self.place == "before" and self.node.layer == 0)


Path = tuple[Step, ...]


def pull_back(transcoder: Transcoder, direction: Tensor) -> Tensor:
    """<f_dec_j, direction> of every feature j, [features]: the input-invariant part."""
    return transcoder.W_dec @ direction


def norm_constant(direction: Tensor, before: Tensor, behind: Tensor) -> Tensor:
    """What a norm multiplies a direction by at one token: <r, norm(x)> / <r, x>, 0 where <r, x> is 0."""
    into = direction @ before
    return torch.where(into == 0, torch.zeros_like(into), (direction @ behind) / into)


def head_contributions(value: Tensor, pattern: Tensor, w_o: Tensor, direction: Tensor) -> Tensor:
    """[batch, heads, destination, source]: what each head brings from each source along a direction.

    value [batch, length, heads, width], pattern [batch, heads, length, length], w_o [heads, width, dim], direction [dim].
    """
    written = torch.einsum("bshw,hw->bhs", value, w_o @ direction)
    return pattern * written[:, :, None, :]


class CircuitFinder:
    """Paths back from one feature on one prompt. found: a run of int64 [1, length]; transcoders: one a layer."""

    def __init__(self, view: DecoderView, transcoders: Sequence[Transcoder], found: Activations):
        self.view, self.transcoders, self.found = view, [*transcoders], found
        self.active = [t.encode(found.norm2[i][0]) for i, t in enumerate(self.transcoders)]  # [length, features] by layer

    def start(self, layer: int, feature: int, token: int) -> Step:
        """The feature itself: its encoder's direction, through the norm before its MLP."""
        token %= self.found.mid[layer].shape[1]
        direction = self.transcoders[layer].W_enc[:, feature].detach()
        direction = direction * norm_constant(direction, self.found.mid[layer][0, token], self.found.norm2[layer][0, token])
        return Step(Node("mlp", layer, token, feature), float(self.active[layer][token, feature]), direction, "mid")

    def contributions(self, step: Step, k: int, ignore_first: bool = True) -> list[Step]:
        """The k largest of everything that writes to where a step reads: features, heads (by source), the embedding.

        ignore_first: leave the first token out as a source, where models park attention that means nothing.
        """
        token, out = step.node.token, []
        for layer in range(step.node.layer):
            out += self._features(step, layer, k)
        for layer in range(step.node.layer + (step.place == "mid")):
            out += self._heads(step, layer, k, ignore_first)
        embedding = float(self.found.before[0][0, token] @ step.direction)
        out.append(Step(Node("embedding", 0, token), embedding, step.direction, "before"))
        return sorted(out, key=lambda s: -s.contribution)[:k]

    def _features(self, step: Step, layer: int, k: int) -> list[Step]:
        token, transcoder = step.node.token, self.transcoders[layer]
        invariant = pull_back(transcoder, step.direction)
        top = (invariant * self.active[layer][token]).topk(min(k, len(invariant)))
        out = []
        for contribution, j in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            direction = transcoder.W_enc[:, j].detach() * invariant[j]
            direction = direction * norm_constant(direction, self.found.mid[layer][0, token], self.found.norm2[layer][0, token])
            out.append(Step(Node("mlp", layer, token, j), contribution, direction, "mid", float(invariant[j])))
        return out

    def _heads(self, step: Step, layer: int, k: int, ignore_first: bool) -> list[Step]:
        token, found = step.node.token, self.found
        w_o = self.view.w_o(layer)
        brought = head_contributions(found.value[layer], found.pattern[layer], w_o, step.direction)[0, :, token, : token + 1]
        if ignore_first:
            brought = brought[:, 1:]
        if not brought.numel():
            return []
        top, w_v, out = brought.flatten().topk(min(k, brought.numel())), self.view.w_v(layer), []
        for contribution, at in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            head, source = divmod(at, brought.shape[1])
            source += ignore_first
            invariant = w_v[head] @ (w_o[head] @ step.direction)
            direction = invariant * found.pattern[layer][0, head, token, source]
            direction = direction * norm_constant(direction, found.before[layer][0, source], found.norm1[layer][0, source])
            out.append(Step(Node("attention", layer, source, head), contribution, direction, "before"))
        return out

    @torch.no_grad()
    def paths(self, layer: int, feature: int, token: int, length: int = 3, branches: int = 5, capped: bool = True) -> list[list[Path]]:
        """The strongest paths of 2, 3, ... `length` + 1 nodes, `branches` of each, found greedily.

        capped: no step counts for more than the weakest feature behind it, which is what taking that feature out would take away.
        """
        current: list[Path] = [(self.start(layer, feature, token),)]
        out: list[list[Path]] = []
        for _ in range(length):
            longer: list[Path] = []
            for path in current:
                if path[-1].done:
                    continue
                cap = min((s.contribution for s in path if s.node.kind == "mlp"), default=float("inf")) if capped else float("inf")
                steps = self.contributions(path[-1], branches)
                longer += [(*path, replace(s, contribution=min(s.contribution, cap))) for s in steps]
            if not longer:
                break
            current = sorted(longer, key=lambda p: -p[-1].contribution)[:branches]
            out.append(current)
        return out

    @torch.no_grad()
    def accounts(self, layer: int, direction: Tensor, token: int) -> dict[str, float]:
        """What makes up <direction, residual before the MLP of `layer`> at a token, all of it: features, their decoders' biases and errors
        (what a transcoder doesn't say of its MLP), heads, attention's biases, the embedding. The parts add up to "total" exactly."""
        found = self.found
        features = biases = errors = heads = 0.0
        for i, transcoder in enumerate(self.transcoders[:layer]):
            said, z = transcoder(found.norm2[i][0, token])
            features += float(z @ pull_back(transcoder, direction))
            biases += float(transcoder.b_dec_out @ direction)
            errors += float((found.mlp_out[i][0, token] - said) @ direction)
        attention_bias = 0.0
        for i in range(layer + 1):
            heads += float(head_contributions(found.value[i], found.pattern[i], self.view.w_o(i), direction)[0, :, token].sum())
            attention_bias += float(self.view.blocks[i].attn.c_proj.bias @ direction)
        return {
            "features": features, "transcoder biases": biases, "errors": errors, "heads": heads, "attention biases": attention_bias,
            "embedding": float(found.before[0][0, token] @ direction), "total": float(found.mid[layer][0, token] @ direction),
        }  # fmt: skip


def graph(paths: Sequence[Sequence[Path]]) -> tuple[dict[Node, float], dict[tuple[Node, Node], float]]:
    """Paths merged where they share nodes: (node -> contribution, (from, to) -> contribution), each path's beginning counted once."""
    nodes: dict[Node, float] = {}
    edges: dict[tuple[Node, Node], float] = {}
    seen: set[tuple[Node, ...]] = set()
    for path in (p for same in paths for p in same):
        for end in range(1, len(path) + 1):
            prefix = tuple(s.node for s in path[:end])
            if prefix in seen:
                continue
            seen.add(prefix)
            nodes[prefix[-1]] = nodes.get(prefix[-1], 0.0) + path[end - 1].contribution
            if end > 1:
                edge = (prefix[-1], prefix[-2])
                edges[edge] = edges.get(edge, 0.0) + path[end - 1].contribution
    return nodes, edges


def de_embed(view: DecoderView, transcoder: Transcoder, feature: int, layer: int | None = None, head: int | None = None) -> Tensor:
    """How much each word of the vocabulary excites a feature directly, [vocabulary]; with layer and head, how much it does through that
    head (its value and output weights). Weights alone: the same for every prompt."""
    direction = transcoder.W_enc[:, feature]
    if layer is not None and head is not None:
        direction = view.w_v(layer)[head] @ (view.w_o(layer)[head] @ direction)
    return (view.embedding @ direction).detach()

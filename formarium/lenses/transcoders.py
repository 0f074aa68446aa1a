"""Transcoders (Dunefsky et al., NeurIPS 2024, arXiv 2406.11944): a lens that trains. For each layer a wide, sparse layer learns what the
MLP does (nn/transcoder.py); how faithful it is, is measured in the model's own loss; and from its weights follow circuits (circuits.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from formarium.errors import BadInput
from formarium.lens import Lens, Report, Table
from formarium.lenses.circuits import CircuitFinder, Node, de_embed, graph
from formarium.nn.gpt import GPT, Activations, DecoderView, next_token_loss, train_gpt
from formarium.nn.transcoder import Transcoder, train_transcoder


class Transcoders(Lens):
    """features: of each transcoder (the paper's are 32 times the width). l1, lr, steps, batch: of their training; batch counts tokens.
    layer, feature: whose circuit to show; by default the last layer's feature that is most active at the prompt's last token.
    prompt: which row of the tokens the circuit is of. names: what to call each token (a list or a dict), for tables and figures.
    tokens: at most so many are learnt from; an eighth is held out. length, branches: of the paths.
    """

    def __init__(
        self,
        features: int = 512,
        l1: float = 1e-3,
        lr: float = 1e-3,
        steps: int = 600,
        batch: int = 512,
        layer: int | None = None,
        feature: int | None = None,
        prompt: int = -1,
        names: Sequence[str] | Mapping[int, str] | None = None,
        tokens: int = 60_000,
        length: int = 3,
        branches: int = 6,
        seed: int = 0,
    ):
        for name, value in (("features", features), ("steps", steps), ("batch", batch), ("length", length), ("branches", branches)):
            if value < 1:
                raise BadInput(name, expected="at least 1", got=str(value))
        self.features, self.l1, self.lr, self.steps, self.batch = features, l1, lr, steps, batch
        self.layer, self.feature, self.prompt, self.names = layer, feature, prompt, names
        self.tokens, self.length, self.branches, self.seed = tokens, length, branches, seed
        self.transcoders: list[Transcoder] = []  # of the last look, one a layer

    def needs(self, model: Any) -> str:
        return DecoderView.why_not(model)

    def look(
        self,
        model: Any,
        data: Any,
        before: Any = None,
        snapshots: Mapping[int, Any] | None = None,
        others: Mapping[str, Any] | Sequence[Any] = (),
    ) -> Report:
        """model: a GPT-2-like decoder. data: token ids, int64 [texts, length], eight texts or more.

        Raises BadInput where the model isn't one, or the tokens are of another shape or outside its vocabulary.
        """
        if reason := self.needs(model):
            raise BadInput(f"Transcoders on {type(model).__name__}", expected="a GPT-2-like decoder", got=reason)
        view = DecoderView(model)
        ids = self._ids(view, data)
        held = max(1, len(ids) // 8)
        train, test = ids[:-held], ids[-held:]
        seen, fresh = self._read(view, train), self._read(view, test)
        histories = []
        self.transcoders = []
        for i in range(len(view.blocks)):
            x, y = (torch.cat([a.flatten(0, 1) for a in part[i]]) for part in seen)
            made, history = train_transcoder(
                x, y, self.features, l1=self.l1, lr=self.lr, steps=self.steps, batch=self.batch, seed=self.seed + i
            )
            self.transcoders.append(made)
            histories.append(history)
        layers = [self._fidelity(view, i, test, fresh) for i in range(len(view.blocks))]
        return self._report(view, test, layers, histories)

    def _ids(self, view: DecoderView, data: Any) -> Tensor:
        if not isinstance(data, Tensor) or data.dtype != torch.int64 or data.ndim != 2 or data.shape[0] < 8 or data.shape[1] < 4:
            got = f"{data.dtype} {[*data.shape]}" if isinstance(data, Tensor) else type(data).__name__
            raise BadInput("tokens", expected="int64 [texts, length], eight texts of four tokens or more", got=got)
        if int(data.min()) < 0 or int(data.max()) >= len(view.embedding):
            raise BadInput("tokens", expected=f"ids from 0 to {len(view.embedding) - 1}", got=f"{int(data.min())} to {int(data.max())}")
        return data[: max(8, self.tokens // data.shape[1])]

    @staticmethod
    def _read(view: DecoderView, ids: Tensor, size: int = 32) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Inputs and outputs of every MLP, by layer and batch."""
        x: list[list[Tensor]] = [[] for _ in view.blocks]
        y: list[list[Tensor]] = [[] for _ in view.blocks]
        for start in range(0, len(ids), size):
            found = view.run(ids[start : start + size])
            for i in range(len(view.blocks)):
                x[i].append(found.norm2[i])
                y[i].append(found.mlp_out[i])
        return x, y

    @torch.no_grad()
    def _fidelity(self, view: DecoderView, layer: int, ids: Tensor, fresh: Any) -> dict[str, float]:
        """Held out: features that fire a token (l0), the share of the output's variance left unexplained, dead features, and the model's
        loss as it is, with the MLP replaced, and with it left out."""
        made = self.transcoders[layer]
        x, y = (torch.cat([a.flatten(0, 1) for a in part[layer]]) for part in fresh)
        out, z = made(x)
        own = float(next_token_loss(view.run(ids).logits, ids))
        with view.replaced(layer, lambda h: made(h)[0]):
            kept = float(next_token_loss(view.run(ids).logits, ids))
        with view.replaced(layer, torch.zeros_like):
            without = float(next_token_loss(view.run(ids).logits, ids))
        return {
            "l0": float((z > 0).float().sum(1).mean()),
            "unexplained": float((out - y).square().sum() / (y - y.mean(0)).square().sum()),
            "dead": float((z.sum(0) == 0).float().mean()),
            "loss": own,
            "loss_transcoder": kept,
            "loss_without": without,
            "gap": (kept - own) / max(1e-9, without - own),
        }

    # the report -------------------------------------------------------------------------------------------------------

    def _report(self, view: DecoderView, ids: Tensor, layers: list[dict[str, float]], histories: list[Any]) -> Report:
        prompt = ids[self.prompt % len(ids)][None]
        found = view.run(prompt)
        finder = CircuitFinder(view, self.transcoders, found)
        layer = len(view.blocks) - 1 if self.layer is None else self.layer
        if not 0 <= layer < len(view.blocks):
            raise BadInput("layer", expected=f"0 to {len(view.blocks) - 1}", got=str(layer))
        last = prompt.shape[1] - 1
        feature = int(finder.active[layer][last].argmax()) if self.feature is None else self.feature
        if not 0 <= feature < self.features:
            raise BadInput("feature", expected=f"0 to {self.features - 1}", got=str(feature))
        paths = finder.paths(layer, feature, last, self.length, self.branches)
        nodes, edges = graph(paths)
        accounts = finder.accounts(layer, finder.start(layer, feature, last).direction, last)
        words = de_embed(view, self.transcoders[0], int(finder.active[0][last].argmax()))
        top = words.topk(min(8, len(words)))
        excited = self._excited(view, ids, layer, feature)
        numbers = {
            "layers": layers,
            "circuit": {
                "layer": layer,
                "feature": feature,
                "token": last,
                "activation": float(finder.active[layer][last, feature]),
                "nodes": {str(n): c for n, c in sorted(nodes.items(), key=lambda p: -p[1])},
                "accounts": accounts,
            },
            "de_embedding": {self._name(int(i)): float(v) for v, i in zip(top.values, top.indices, strict=True)},
            "excited_by": excited,
        }
        rows = [[i, *(round(r[k], 4) for k in ("l0", "unexplained", "dead", "loss", "loss_transcoder", "loss_without"))]
                for i, r in enumerate(layers)]  # fmt: skip
        tables = [
            Table(["layer", "L0", "unexplained variance", "dead", "loss", "with transcoder", "without MLP"], rows, "Sparsity and fidelity"),
            Table(["path", "contribution"], [[" <- ".join(self._said(s.node, prompt[0]) for s in p), round(p[-1].contribution, 4)]
                                             for same in paths for p in same], f"Paths to feature {feature} of layer {layer}"),
            Table(["part", "share"], [[k, round(v, 4)] for k, v in accounts.items()], "What the feature's input is made of"),
        ]  # fmt: skip
        figures = {
            "Losses with a layer's MLP replaced": _fidelity_figure(layers),
            "Training": _training_figure(histories),
            "The circuit": _circuit_figure(nodes, edges, [self._name(int(t)) for t in prompt[0]], len(view.blocks)),
        }
        return Report("Transcoders", self._words(numbers), numbers, tables, figures)

    def _excited(self, view: DecoderView, ids: Tensor, layer: int, feature: int, most: int = 5) -> list[dict[str, Any]]:
        """The held-out places where a feature is most active, with what stands before them."""
        found: Activations = view.run(ids)
        z = self.transcoders[layer].encode(found.norm2[layer])[..., feature].detach()
        out = []
        for value, at in zip(*(t.tolist() for t in z.flatten().topk(min(most, z.numel()))), strict=True):
            row, place = divmod(at, ids.shape[1])
            context = "".join(self._name(int(t)) for t in ids[row, max(0, place - 15) : place + 1])
            out.append({"activation": value, "context": context})
        return out

    def _name(self, token: int) -> str:
        if self.names is None:
            return f"<{token}>"
        if isinstance(self.names, Mapping):
            return self.names.get(token, f"<{token}>")
        return self.names[token] if token < len(self.names) else f"<{token}>"

    def _said(self, node: Node, prompt: Tensor) -> str:
        return f"{node} {self._name(int(prompt[node.token]))!r}"

    @staticmethod
    def _words(numbers: Mapping[str, Any]) -> list[str]:
        layers, circuit = numbers["layers"], numbers["circuit"]
        worst = max(range(len(layers)), key=lambda i: layers[i]["gap"])
        mean = sum(r["l0"] for r in layers) / len(layers)
        said = [
            f"With {mean:.0f} features a token the transcoders stand in for the MLPs; the worst (layer {worst}) gives up "
            f"{layers[worst]['gap']:.0%} of what its MLP is worth to the model's loss."
        ]
        top = [n for n in circuit["nodes"]][1:4]
        said.append(
            f"Feature {circuit['feature']} of layer {circuit['layer']} is at {circuit['activation']:.2f} on the last token of the prompt, "
            + (f"most of it by way of {', '.join(top)}." if top else "with nothing behind it.")
        )
        if numbers["excited_by"] and numbers["excited_by"][0]["activation"] > 0:
            said.append(f"It is most active behind {numbers['excited_by'][0]['context']!r}.")
        if worst_dead := [i for i, r in enumerate(layers) if r["dead"] > 0.5]:
            said.append(f"More than half of the features never fire in layers {', '.join(map(str, worst_dead))}: fewer would do.")
        return said


def sample_language_model(steps: int = 250, seed: int = 0) -> tuple[GPT, Tensor, list[str]]:
    """A small letter-by-letter GPT trained here on Python's own help texts; its tokens, int64 [texts, 64], and its letters."""
    from pydoc_data.topics import topics

    text = "".join(topics[k] for k in sorted(topics))[:300_000].lower()
    letters = sorted({*text})
    ids = torch.tensor([letters.index(c) for c in text])
    model = train_gpt(ids, len(letters), steps=steps, seed=seed, context=64, dim=64, layers=2, heads=4)
    return model, ids[: len(ids) // 64 * 64].view(-1, 64)[:600], letters


# figures ------------------------------------------------------------------------------------------------------------


def _fidelity_figure(layers: Sequence[Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for shift, (key, label, colour) in enumerate(
        [("loss", "as it is", "#6b7280"), ("loss_transcoder", "with transcoder", "#0f766e"), ("loss_without", "without MLP", "#b45309")]
    ):
        axes.bar([i + 0.27 * (shift - 1) for i in range(len(layers))], [r[key] for r in layers], 0.25, label=label, color=colour)
    axes.set_xticks(range(len(layers)), [f"layer {i}" for i in range(len(layers))])
    axes.set_ylabel("next-token loss")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _training_figure(histories: Sequence[Sequence[Mapping[str, float]]]) -> Figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for i, history in enumerate(histories):
        axes.plot([h["step"] for h in history], [h["mse"] for h in history], label=f"layer {i}")
    axes.set_xlabel("step")
    axes.set_ylabel("squared error over length")
    axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _circuit_figure(nodes: Mapping[Node, float], edges: Mapping[tuple[Node, Node], float], words: Sequence[str], layers: int) -> Figure:
    """Nodes by token (across) and depth (up); a line's width is what passes along it."""
    used = sorted({n.token for n in nodes})
    across = {t: i for i, t in enumerate(used)}
    depth = {"embedding": -1.0, "attention": 0.0, "mlp": 0.5}
    crowd: dict[tuple[int, float], int] = {}
    at: dict[Node, tuple[float, float]] = {}
    for n in nodes:
        place = (across[n.token], n.layer + depth[n.kind])
        at[n] = (place[0] + 0.16 * crowd.get(place, 0), place[1])
        crowd[place] = crowd.get(place, 0) + 1
    figure = Figure(figsize=(max(4.5, 1.2 * len(used) + 2), 1.4 * layers + 1.6), layout="constrained")
    axes = figure.subplots()
    most = max((abs(v) for v in edges.values()), default=1.0) or 1.0
    for (low, high), value in edges.items():
        (x0, y0), (x1, y1) = at[low], at[high]
        axes.plot([x0, x1], [y0, y1], color="#0f766e" if value >= 0 else "#be123c", lw=0.4 + 3 * abs(value) / most, alpha=0.6, zorder=1)
    for n, (x, y) in at.items():
        axes.scatter([x], [y], s=34, color={"mlp": "#1d4ed8", "attention": "#b45309", "embedding": "#57534e"}[n.kind], zorder=2)
        axes.annotate(str(n).split("@")[0], (x, y), xytext=(3, 4), textcoords="offset points", fontsize=6)
    axes.set_xticks(range(len(used)), [f"{words[t]!r}\n{t}" for t in used], fontsize=7)
    axes.set_yticks([-1, *range(layers)], ["embedding", *(f"layer {i}" for i in range(layers))], fontsize=7)
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure

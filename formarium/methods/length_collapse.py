"""Length collapse (Zhou et al., ACL 2025, arXiv 2410.24200): are a model's embeddings of long texts more alike than those of short ones,
and
what does attention as a low-pass filter have to do with it? A lens on any text encoder; TempScale's effect beside it.

Two views: texts as they are, binned by their length, and the same texts cut to one length after another, where nothing but the length
differs. For each length: mean cosine between different texts; sigma_a, the largest singular value of the high-frequency part of every
attention matrix (an upper bound for what a layer lets through); the part it lets through of its own values; whether the first half of a
text finds its second half among those of the others (so that a temperature that only spreads vectors, and loses their meaning, shows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.errors import BadInput
from formarium.lens import Lens, Report, Table
from formarium.methods.length_collapse_figures import cosine_figure, filter_figure, layer_figure, map_figure
from formarium.methods.tempscale import TempScale
from formarium.methods.text_encoder import TextEncoder
from formarium.nn.softmax_attention import SoftmaxAttention
from formarium.nn.spectra import entropy, filter_rate, high_share, passed

FEWEST = 4  # texts; a mean over fewer pairs says little


@dataclass
class Seen:
    """What one model does with texts of one length."""

    texts: int
    cosine: float  # mean over pairs of different texts
    low: float  # of the pairs' cosines, the 5% and 95% quantiles
    high: float
    matched: float | None = None  # first halves that find their second half; None where it wasn't looked at
    sigma: list[float] = field(default_factory=list)  # by layer, mean over heads and texts
    passed: list[float] = field(default_factory=list)  # by layer; empty where the values can't be seen
    entropy: list[float] = field(default_factory=list)  # by layer, as a share of log(tokens)
    high_share: float | None = None  # of the last layer's tokens: 0 where all are equal
    embeddings: Tensor | None = None

    def numbers(self) -> dict[str, Any]:
        found = {k: v for k, v in vars(self).items() if k != "embeddings"}
        return {**found, "sigma_mean": mean(self.sigma), "passed_mean": mean(self.passed)}


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


class LengthCollapse(Lens):
    """Measure length collapse in a `TextEncoder`, at one or more temperatures.

    lengths: tokens (special ones included) that texts are cut to, and the bins' upper edges; those longer than the model takes are left
    out.
    temperatures: beside the model as it is (1.0), which comes first. attention_texts: how many texts a length attention is read on (the
    embeddings are of all). most: texts a length at most, spread evenly over those given.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (16, 32, 64, 128, 256, 512),
        temperatures: Sequence[float] = (1.0, 0.9, 0.8),
        attention_texts: int = 4,
        most: int = 64,
        batch: int = 16,
    ):
        if not lengths or min(lengths) < 6 or len(lengths) < 2:
            raise BadInput("lengths", expected="two or more numbers of tokens, each at least 6", got=repr(tuple(lengths)))
        self.lengths = tuple(sorted({int(n) for n in lengths}))
        self.temperatures = tuple(dict.fromkeys((1.0, *(TempScale(t).temperature for t in temperatures))))
        self.attention_texts, self.most, self.batch = attention_texts, most, batch

    def needs(self, model: Any) -> str:
        if not isinstance(model, TextEncoder):
            return "it isn't a TextEncoder (formarium.methods.text_encoder wraps a transformers model, its tokeniser and pooling)"
        return TempScale(1.0).needs(model)

    def look(
        self,
        model: Any,
        data: Any,
        before: Any = None,
        snapshots: Mapping[int, Any] | None = None,
        others: Mapping[str, Any] | None = None,
    ) -> Report:
        """data: a list of texts, short and long ones; at least four have to be as long as the second of `lengths`.

        before, snapshots, others: not used. Raises BadInput where the model is no TextEncoder or the texts are too few or too short.
        """
        if reason := self.needs(model):
            raise BadInput(f"LengthCollapse on {type(model).__name__}", expected="a model it can look into", got=reason)
        ids = model.tokens(list(data))
        documents, lengths = self._documents(ids, model)
        natural = self._bins(ids)
        network = deepcopy(model).eval()
        cut: dict[float, dict[int, Seen]] = {}
        as_is: dict[float, dict[str, Seen]] = {}
        for temperature in self.temperatures:
            TempScale(temperature).apply(network)
            cut[temperature] = {n: self._cut(network, [shortened(d, n) for d in documents]) for n in lengths}
            as_is[temperature] = {name: seen_of(network.encode_ids(texts, self.batch)) for name, texts in natural.items()}
        return report(cut, as_is, len(documents))

    def _documents(self, ids: list[list[int]], model: TextEncoder) -> tuple[list[list[int]], list[int]]:
        """Texts that are as long as the longest length that enough of them reach, and the lengths up to it."""
        possible = [n for n in self.lengths if n <= model.max_tokens and sum(len(i) >= n for i in ids) >= FEWEST]
        if len(possible) < 2:
            raise BadInput(
                "texts",
                expected=f"{FEWEST} or more of at least {self.lengths[1]} tokens",
                got=f"{len(ids)} texts, the longest of {max(map(len, ids))} tokens",
                fix="give longer texts, or smaller lengths=",
            )
        enough = [n for n in possible if sum(len(i) >= n for i in ids) >= min(self.most, 16)]
        longest = max(enough) if len(enough) > 1 else max(possible)  # rather more texts than the last length
        return spread([i for i in ids if len(i) >= longest], self.most), [n for n in possible if n <= longest]

    def _bins(self, ids: list[list[int]]) -> dict[str, list[list[int]]]:
        edges, found = (0, *self.lengths), {}
        for low, high in pairwise(edges):
            texts = [i for i in ids if low < len(i) <= high]
            if len(texts) >= FEWEST:
                found[f"{low + 1}-{high}"] = spread(texts, self.most)
        return found

    @torch.no_grad()
    def _cut(self, network: TextEncoder, ids: list[list[int]]) -> Seen:
        seen = seen_of(network.encode_ids(ids, self.batch))
        middle = len(ids[0]) // 2
        first, last = [shortened(i, middle) for i in ids], [[i[0], *i[middle:]] if len(i) > 3 else i for i in ids]
        seen.matched = matched(network.encode_ids(first, self.batch), network.encode_ids(last, self.batch))
        chosen = torch.tensor(spread(ids, self.attention_texts), device=next(network.parameters()).device)
        layers: list[tuple[Tensor, Tensor | None]] = []
        with SoftmaxAttention(watch=lambda probabilities, value: layers.append((probabilities, value))):
            hidden = network.hidden(chosen, torch.ones_like(chosen))
        layers = [(p, v) for p, v in layers if p.ndim == 4 and p.shape[-1] == chosen.shape[1]]
        seen.sigma = [filter_rate(p).mean().item() for p, _ in layers]
        seen.entropy = [(entropy(p).mean() / np.log(p.shape[-1])).item() for p, _ in layers]
        seen.passed = [passed(p, v).mean().item() for p, v in layers if v is not None]
        seen.high_share = high_share(hidden.float()).mean().item()
        return seen


def shortened(ids: list[int], length: int) -> list[int]:
    """A text of that many tokens: its first ones, and its last, which closes it."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most that many of the items, evenly over the list."""
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def pair_cosines(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of different rows, float [pairs]."""
    unit = F.normalize(embeddings.float(), dim=1)
    rows, columns = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.T)[rows, columns]


def seen_of(embeddings: Tensor) -> Seen:
    pairs = pair_cosines(embeddings)
    low, high = torch.quantile(pairs, torch.tensor([0.05, 0.95])).tolist()
    return Seen(len(embeddings), pairs.mean().item(), low, high, embeddings=embeddings)


def matched(first: Tensor, second: Tensor) -> float:
    """The share of rows of `first` whose nearest row of `second` (by cosine) is their own."""
    scores = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T
    return (scores.argmax(1) == torch.arange(len(scores))).float().mean().item()


def gaussian_filter_rate(tokens: int, temperature: float = 1.0, deviation: float = 1.0, draws: int = 8, seed: int = 0) -> float:
    """sigma_a of attention whose scores are independent normal numbers, the model of the paper's theorem: falls with the number of
    tokens."""
    scores = torch.randn(draws, tokens, tokens, generator=torch.Generator().manual_seed(seed)) * deviation
    return filter_rate((scores / temperature).softmax(-1)).mean().item()


def report(cut: dict[float, dict[int, Seen]], as_is: dict[float, dict[str, Seen]], documents: int) -> Report:
    plain, lengths = cut[1.0], [*cut[1.0]]
    short, long = lengths[0], lengths[-1]
    theory = {n: gaussian_filter_rate(n) for n in lengths}
    numbers = {
        "documents": documents,
        "lengths": lengths,
        "cut": {str(t): {str(n): s.numbers() for n, s in by.items()} for t, by in cut.items()},
        "as_they_are": {str(t): {n: s.numbers() for n, s in by.items()} for t, by in as_is.items()},
        "gaussian_sigma": {str(n): v for n, v in theory.items()},
    }
    findings = [*_collapse(plain, short, long, documents), *_filtering(plain, short, long), *_temperatures(cut, long)]
    columns = ["temperature", "tokens", "texts", "cosine", "5%", "95%", "halves matched", "sigma_a", "let through", "tokens' HC share"]
    rows = [
        [t, n, s.texts, *_round(s.cosine, s.low, s.high, s.matched, mean(s.sigma), mean(s.passed), s.high_share)]
        for t, by in cut.items()
        for n, s in by.items()
    ]
    tables = [Table(columns, rows, f"The same {documents} texts, cut to one length after another (attention: mean over layers and heads)")]
    if as_is[1.0]:
        natural = [[t, n, s.texts, *_round(s.cosine, s.low, s.high)] for t, by in as_is.items() for n, s in by.items()]
        tables.append(Table(["temperature", "tokens", "texts", "cosine", "5%", "95%"], natural, "Texts as they are, by their length"))
    figures = {
        "Cosine between different texts": cosine_figure(cut, as_is),
        "What attention lets through": filter_figure(cut, theory),
        "Filter rate by layer": layer_figure({n: s.sigma for n, s in plain.items()}),
        "Embeddings by length": map_figure({n: s.embeddings for n, s in plain.items()}),
    }
    return Report("Length collapse", findings, numbers, tables, figures)


def _collapse(plain: dict[int, Seen], short: int, long: int, documents: int) -> list[str]:
    a, b = plain[short].cosine, plain[long].cosine
    said = (
        f"The mean cosine between different texts, the same {documents} cut to {short} and to {long} tokens, goes from {a:.3f} to {b:.3f}"
    )
    if b > a + 0.02:
        return [f"{said}: embeddings of long texts crowd together (length collapse)."]
    return [f"{said}: no length collapse on these texts."]


def _filtering(plain: dict[int, Seen], short: int, long: int) -> list[str]:
    a, b = mean(plain[short].sigma), mean(plain[long].sigma)
    if a is None or b is None:
        return ["Its attention could not be read, so nothing is said about filtering."]
    out = [
        f"The most that attention can let through of what differs between tokens (sigma_a, mean over layers and heads) "
        f"{'falls' if b < a else 'rises'} from {a:.2f} at {short} tokens to {b:.2f} at {long}."
    ]
    c, d = mean(plain[short].passed), mean(plain[long].passed)
    if c is not None and d is not None:
        out.append(f"Of the differences between its own values it lets through {c:.0%} at {short} tokens and {d:.0%} at {long}.")
    return out


def _temperatures(cut: dict[float, dict[int, Seen]], long: int) -> list[str]:
    plain = cut[1.0][long]
    out = []
    for t, by in cut.items():
        if t == 1.0:
            continue
        seen = by[long]
        out.append(
            f"At temperature {t:g} the cosine at {long} tokens is {seen.cosine:.3f} (instead of {plain.cosine:.3f}), and "
            f"{seen.matched:.0%} of the texts' halves find each other (instead of {plain.matched:.0%})."
        )
    if len(cut) > 1:
        best = max(cut, key=lambda t: (round(cut[t][long].matched or 0, 3), -cut[t][long].cosine))
        out.append(
            f"By the halves found at {long} tokens (then by the lower cosine) {best:g} is the best of {', '.join(f'{t:g}' for t in cut)}; "
            "settle it on your own task before you keep it."
        )
    return out


def _round(*values: float | None) -> list[Any]:
    return ["" if v is None else round(v, 3) for v in values]

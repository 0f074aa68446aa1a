"""TabPFN (Hollmann et al., ICLR 2023, arXiv 2207.01848): a transformer that classifies small tables in one forward pass.

Every row is a token: Linear(x), and for labelled rows + Linear(y). No positions, so the context is a set. In each layer all rows
attend to the labelled rows only. The network is trained once, on tables drawn from a prior over causal models, to minimise

    - log q(y_query | x_query, {(x_i, y_i)})          (eq. 2)

and then approximates Bayesian prediction under that prior; at prediction no weight moves. What is done to a table before (scaling,
power transform, shifted columns and classes, an average over several such views) is the published prediction interface.
Key names and numbers follow github.com/automl/TabPFN.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import Dropout
from formarium.tasks.tabular_classification.model import UNKNOWN, TableLabels
from formarium.tasks.tabular_classification.scaling import clip_outliers, normalise, power_transform, varying

TEMPERATURE = 0.8
AT_ONCE = 32  # views of tables in one forward


class ContextAttention(nn.Module):
    """Multi-head attention of all rows to the rows that `seen` allows. x: float [batch, rows, dim]. Returns the same shape."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, keys: int, seen: Tensor | None, dropout: float = 0.0) -> Tensor:
        """keys: only the first so many rows can be keys. seen: bool, broadcast to [batch, heads, rows, keys], True where a key is
        attended to."""
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        attended = F.scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], attn_mask=seen, dropout_p=dropout)
        return self.out(merge_heads(attended))


class Block(nn.Module):
    """Attention and feed-forward, each added to its input and normalised after (or, with pre_norm, before). x: [batch, rows, dim]."""

    def __init__(self, c: TabPFN.Config):
        super().__init__()
        self.pre_norm, self.rate = c.pre_norm, c.dropout
        self.attention = ContextAttention(c.dim, c.heads)
        self.fc1, self.fc2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.drop = Dropout(c.dropout)
        self.activation = {"gelu": F.gelu, "relu": F.relu}[c.activation]
        if c.zero_init:  # every layer starts as the identity
            for layer in (self.attention.out, self.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.tap = Tap()

    def forward(self, x: Tensor, keys: int, seen: Tensor | None) -> Tensor:
        rate = self.rate if self.training else 0.0
        if self.pre_norm:
            x = x + self.drop(self.attention(self.norm1(x), keys, seen, rate))
            x = x + self.drop(self.feed_forward(self.norm2(x)))
        else:
            x = self.norm1(x + self.drop(self.attention(x, keys, seen, rate)))
            x = self.norm2(x + self.drop(self.feed_forward(x)))
        return self.tap(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.activation(self.fc1(x))))


class View(NamedTuple):
    """One way to look at a table: its features scaled [rows, num_features], its context's labels [context], how to undo the label shift."""

    x: np.ndarray
    label: np.ndarray
    shift: int


class TabPFN(Model):
    task = "tabular-classification"
    channel_axes = (2, None, None)

    @dataclass(frozen=True)
    class Config:
        num_features: int = 100  # columns at most; fewer are padded with zeros
        max_classes: int = 10
        dim: int = 512
        heads: int = 4
        hidden: int = 1024
        depth: int = 12
        dropout: float = 0.0
        activation: str = "gelu"  # or relu
        pre_norm: bool = False
        efficient_masking: bool = True  # False: the older mask, by which a query also attends to itself
        full_attention: bool = False  # every row attends to every row
        global_tokens: int = 0  # learned tokens; labelled rows attend to them only, and they to the labelled rows
        input_norm: bool = False  # batch norm of the tokens
        root_scale: bool = False  # columns are scaled by the root of num_features / columns, not by the ratio
        zero_init: bool = True
        ensemble: int = 3  # views of a table that a prediction averages
        seed: int = 0  # of the views' order
        subsample_features: bool = False  # tables with more columns: a random choice of them, instead of a refusal

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.embed_x, self.embed_y = nn.Linear(c.num_features, c.dim), nn.Linear(1, c.dim)
        if c.global_tokens:
            self.global_tokens = nn.Parameter(torch.randn(c.global_tokens, c.dim))
        self.input_norm = nn.BatchNorm1d(c.dim) if c.input_norm else nn.Identity()
        self.tokens = Tap()
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.features = Tap()
        self.decoder = nn.Sequential(nn.Linear(c.dim, c.hidden), nn.GELU(), nn.Linear(c.hidden, c.max_classes))

    def forward(self, x: Tensor, label: Tensor, context: Tensor) -> Tensor:
        """x: float [batch, rows, num_features], scaled and zero-padded. label: float [batch, rows], class numbers, not read beyond the
        context.
        context: int64 [batch], labelled rows. Returns logits [batch, rows, max_classes]; those of queries are the prediction."""
        rows = x.shape[1]
        labelled = torch.arange(rows, device=x.device) < context[:, None]  # b n
        y = self.embed_y(label.to(x.dtype).masked_fill(~labelled, 0).unsqueeze(-1))
        x = self.embed_x(x) + y * labelled.unsqueeze(-1)
        more = self.config.global_tokens
        if more:
            x = torch.cat([self.global_tokens.expand(len(x), -1, -1), x], 1)
        if self.config.input_norm:
            x = self.input_norm(x.flatten(0, 1)).view_as(x)
        x = self.tokens(x)
        keys, seen = self._who_sees_whom(labelled, context)
        for block in self.blocks:
            x = block(x, keys, seen)
        return self.decoder(self.features(x[:, more:]))

    def _who_sees_whom(self, labelled: Tensor, context: Tensor) -> tuple[int, Tensor | None]:
        """How many rows can be keys, and which of them each row attends to (None: all)."""
        rows, c = labelled.shape[1], self.config
        if c.full_attention:
            return rows, None
        if c.global_tokens:
            globals_ = torch.arange(c.global_tokens + rows, device=labelled.device) < c.global_tokens  # g+n
            known = F.pad(labelled, (c.global_tokens, 0), value=False)  # b g+n
            to_known = known[:, None] & ~known[:, :, None]  # the labelled rows are seen by all but themselves
            itself = torch.eye(len(globals_), dtype=torch.bool, device=labelled.device) & ~known[:, :, None]
            return len(globals_), (to_known | itself | globals_)[:, None]
        seen = labelled[:, None, None]  # b 1 1 n
        if not c.efficient_masking:
            return rows, seen | torch.eye(rows, dtype=torch.bool, device=labelled.device)
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or labelled.device.type == "cuda":
            return rows, seen
        least, most = context.min(), context.max()  # on the CPU the look is free, and keys that nobody sees are left out
        return int(most), None if least == most else seen[..., : int(most)]

    # training ---------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy of the query rows' labels over all `max_classes`, mean over a table's rows, then over tables. The prior's
        columns are normalised already; here they are only scaled and padded."""
        logits = self.forward_batch(batch).float()
        at = torch.arange(logits.shape[1], device=logits.device)
        query = (at >= batch["context"][:, None]) & (at < batch["rows"][:, None])
        target = batch["label"].masked_fill(~query, UNKNOWN)
        self._must_know(batch)
        each = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=UNKNOWN, reduction="none")  # b n
        loss = (each.sum(1) / query.sum(1).clamp_min(1)).mean()
        return Losses(loss, {"cross_entropy": loss})

    def forward_batch(self, batch: Batch) -> Tensor:
        """The network on a batch's tables as they are: missing values 0, columns scaled and padded."""
        x = torch.nan_to_num(batch["x"], nan=0.0)
        if x.shape[2] > self.config.num_features:
            raise BadInput("features", expected=f"at most {self.config.num_features}", got=str(x.shape[2]))
        ratio = self.config.num_features / batch["features"].to(x.dtype)
        x = x * (ratio.sqrt() if self.config.root_scale else ratio)[:, None, None]
        x = F.pad(x, (0, self.config.num_features - x.shape[2]))
        return self(x, batch["label"].clamp_min(0).to(x.dtype), batch["context"])

    # prediction -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> TableLabels:
        """Class probabilities of the rows behind each table's context, averaged over the ensemble of views."""
        self._must_know(batch)
        tables, contexts, counts = [], batch["context"].tolist(), batch["classes"].tolist()
        for x, label, context, rows, columns in zip(
            batch["x"].cpu(), batch["label"].cpu(), contexts, batch["rows"].tolist(), batch["features"].tolist(), strict=True
        ):
            tables.append((x[:rows, :columns].double().numpy(), label[:context].numpy()))
        logits = self.logits_of(tables, counts)
        out = batch["x"].new_zeros(*batch["label"].shape, max(counts), dtype=torch.float32)
        said = torch.full_like(batch["label"], UNKNOWN)
        for i, (scores, context) in enumerate(zip(logits, contexts, strict=True)):
            out[i, context : context + len(scores), : counts[i]] = scores.softmax(-1).float()
            said[i, context : context + len(scores)] = scores.argmax(-1)
        return TableLabels(out, said)

    def logits_of(self, tables: list[tuple[np.ndarray, np.ndarray]], classes: list[int], **settings: Any) -> list[Tensor]:
        """Averaged logits [queries, classes] of tables (x float [rows, columns], labels int [context]), at the published temperature.
        settings: what differs from the Config in how tables are viewed (ensemble, seed, subsample_features)."""
        c = replace(self.config, **settings)
        of_each = [views(x, label, count, c) for (x, label), count in zip(tables, classes, strict=True)]
        every = [v for mine in of_each for v in mine]
        out: list[Tensor] = []
        for i in range(0, len(every), AT_ONCE):
            out += self._look(every[i : i + AT_ONCE])
        undone = iter(zip(out, every, strict=True))
        logits = []
        for mine, count in zip(of_each, classes, strict=True):
            turned = [torch.roll(o[:, :count] / TEMPERATURE, -v.shift, -1) for o, v in itertools.islice(undone, len(mine))]
            logits.append(torch.stack(turned).mean(0))
        return logits

    def _look(self, views: list[View]) -> list[Tensor]:
        """The network's logits [queries, max_classes] of some views."""
        parameter, longest = next(self.parameters()), max(len(v.x) for v in views)
        x = np.zeros((len(views), longest, self.config.num_features))
        label = np.zeros((len(views), longest))
        for i, v in enumerate(views):
            x[i, : len(v.x)], label[i, : len(v.label)] = v.x, v.label
        tensors = (torch.from_numpy(a).to(parameter.device, parameter.dtype) for a in (x, label))
        context = torch.tensor([len(v.label) for v in views], device=parameter.device)
        logits = self(*tensors, context)
        return [o[len(v.label) : len(v.x)] for o, v in zip(logits, views, strict=True)]

    # inputs -----------------------------------------------------------------------------------------------------------

    def _must_know(self, batch: Batch) -> None:
        most = int(batch["classes"].max())
        if most > self.config.max_classes:
            raise BadInput("classes", expected=f"at most {self.config.max_classes}", got=str(most), fix="leave out or join classes")

    def example(self, batch: int = 1, rows: int = 24) -> tuple[Tensor, ...]:
        context = torch.full((batch,), 2 * rows // 3, device=self.device) - torch.arange(batch, device=self.device) % 3
        label = torch.randint(min(3, self.config.max_classes), (batch, rows), device=self.device).float()
        return torch.randn(batch, rows, self.config.num_features, device=self.device), label, context

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{rows} rows": self.example(2, rows) for rows in (8, 60)}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, object]:
        """Tables whose class is decided by the first column."""
        g, rows, columns = torch.Generator().manual_seed(seed), 40, min(4, self.config.num_features)
        x = torch.randn(batch, rows, columns, generator=g)
        x[:, 0, 0], x[:, 1, 0] = -1.0, 1.0
        tensors = {
            "x": x,
            "label": (x[..., 0] > 0).long(),
            "context": torch.full((batch,), 28),
            "rows": torch.full((batch,), rows),
            "features": torch.full((batch,), columns),
            "classes": torch.full((batch,), 2),
            "categorical": torch.zeros(batch, columns, dtype=torch.bool),
        }
        named = {"class_names": [("low", "high")] * batch, "id": [f"example {i}" for i in range(batch)]}
        return {**{k: v.to(self.device) for k, v in tensors.items()}, **named}

    def check_input(self, x: Tensor, label: Tensor, context: Tensor) -> None:
        check_tensor("x", x, "batch rows features", sizes={2: self.config.num_features})
        check_tensor("label", label, "batch rows", sizes=dict(enumerate(x.shape[:2])))
        check_tensor("context", context, "batch", sizes={0: x.shape[0]}, dtype=lambda d: d in (torch.int64, torch.int32))
        if context.device.type == "cpu" and not (int(context.min()) >= 1 and int(context.max()) <= x.shape[1]):
            got = f"{int(context.min())} to {int(context.max())}"
            raise BadInput("context", expected=f"1 to {x.shape[1]} labelled rows", got=got, fix="give at least one labelled row")


# views of a table ------------------------------------------------------------------------------------------------------


def views(x: np.ndarray, label: np.ndarray, classes: int, c: TabPFN.Config) -> list[View]:
    """The ensemble: cyclic shifts of classes and of columns in a random order, each with and without the power transform."""
    context, generator = len(label), torch.Generator().manual_seed(c.seed)
    if x.shape[1] > c.num_features:
        if not c.subsample_features:
            fix = "give fewer columns, or create the model with subsample_features=True"
            raise BadInput("features", expected=f"at most {c.num_features}", got=str(x.shape[1]), fix=fix)
        chosen = np.random.default_rng(c.seed).choice(x.shape[1], c.num_features, replace=False)
        x = x[:, np.sort(chosen)]
    column_shifts = torch.randperm(x.shape[1], generator=generator).tolist()
    class_shifts = torch.randperm(classes, generator=generator).tolist()
    order = [*itertools.product(class_shifts, column_shifts)]
    random.Random(c.seed).shuffle(order)
    chosen_views = [*itertools.product(order, (False, True))][: c.ensemble]
    scaled = {power: _scaled(x, context, power, c) for power in {power for _, power in chosen_views}}
    found = []
    for (class_shift, column_shift), power in chosen_views:
        table = np.concatenate([scaled[power][:, column_shift:], scaled[power][:, :column_shift]], 1)
        padded = np.pad(table, ((0, 0), (0, c.num_features - table.shape[1])))
        found.append(View(padded, (label + class_shift) % classes, class_shift))
    return found


def _scaled(x: np.ndarray, context: int, power: bool, c: TabPFN.Config) -> np.ndarray:
    """Normalised by the context, columns without variation dropped, outliers drawn in, scaled to what num_features columns would add up
    to."""
    x = normalise(x, context)
    x = x[:, varying(x, context)]
    if power:
        x = power_transform(x, context)
    x = clip_outliers(x, context)
    ratio = c.num_features / max(1, x.shape[1])
    return np.nan_to_num(x, nan=0.0) * (ratio**0.5 if c.root_scale else ratio)

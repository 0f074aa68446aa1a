r"""PROSE-FD: a multimodal foundation model for fluids in two dimensions (Liu et al., NeurIPS 2024 workshop, arXiv 2409.09811).

Frames of several fields are cut into patches (a convolution), patches of all frames and words of the equations are encoded apart and fused
by one transformer; its decoder is an operator: every patch of every frame that is asked for is a query, place plus time, which sees what
was fused and no other query. A transposed convolution makes patches fields again. Pre-norm blocks with RMS norms throughout.
Fields are normalised by their own mean and deviation over what is given, x' = (x - m) / s, and the loss is the squared error of x'. Frames
beyond those of one pass are rolled out: what was said is given next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, check_tensor
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import Dropout
from formarium.nn.mlp import between
from formarium.nn.sinusoids import sinusoid_table
from formarium.tasks.operator_learning.model import OperatorLearner, Solutions
from formarium.tasks.operator_learning.symbols import PAD, fluid_vocabulary

LONGEST, EPS, TINY = 1024, 1e-5, 1e-8  # words; of the norms in blocks; beside a deviation


class Attention(nn.Module):
    """Multi-head attention within x, or from x to a source.

    x: float [b, n, dim], source: float [b, m, dim], mask: bool, True where to look, broadcast to [b, heads, n, m], or None.
    """

    def __init__(self, dim: int, heads: int, cross: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        if cross:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None) -> Tensor:
        if source is None:
            q, k, v = split_heads(self.qkv(x), self.heads, 3)
        else:
            (q,), (k, v) = split_heads(self.q(x), self.heads), split_heads(self.kv(source), self.heads, 2)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)))


class Block(nn.Module):
    """Pre-norm: attention (within, or to a source), feed-forward."""

    def __init__(self, c: PROSEFD.Config, cross: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.dim, eps=EPS)
        self.attention = Attention(c.dim, c.heads, cross, c.dropout)
        self.norm = nn.RMSNorm(c.dim, eps=EPS)
        self.lin1, self.lin2 = nn.Linear(c.dim, c.hidden), nn.Linear(c.hidden, c.dim)
        self.dropout = Dropout(c.dropout)
        self.tap = Tap()

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, source))
        return self.tap(x + self.dropout(self.feed_forward(self.norm(x))))

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.training and self.dropout.p:
            return self.lin2(self.dropout(F.gelu(self.lin1(x))))
        return between(x, self.lin1, self.lin2)


class Transformer(nn.Module):
    """Blocks and a last norm. x: float [b, n, dim], kept: bool [b, m], of the source where there is one, or None for all."""

    def __init__(self, c: PROSEFD.Config, layers: int, cross: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(c, cross) for _ in range(layers))
        self.norm = nn.RMSNorm(c.dim)

    def forward(self, x: Tensor, kept: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        mask = None if kept is None else kept[:, None, None]
        for block in self.blocks:
            x = block(x, mask, source)
        return self.norm(x)


class Places(nn.Module):
    """What a token stands for: its patch's place (a learned table) plus its frame's time, a learned table by order, or a small network of
    the time itself. times: float [b, frames]. Returns float [b or 1, frames * patches, dim]."""

    def __init__(self, c: PROSEFD.Config, patches: int):
        super().__init__()
        dim = c.dim
        self.places = nn.Parameter(c.place_std * torch.randn(1, 1, patches, dim))
        self.order = None if c.continuous else nn.Parameter(c.place_std * torch.randn(1, c.frames, 1, dim))
        self.clock = nn.Sequential(nn.Linear(1, dim), nn.GELU(), nn.Linear(dim, dim)) if c.continuous else None

    def forward(self, times: Tensor) -> Tensor:
        if self.clock is not None:
            when = self.clock(times[..., None])[:, :, None]
        else:
            assert self.order is not None
            when = self.order[:, : times.shape[1]]
        return (when + self.places).flatten(1, 2)


class PROSEFD(OperatorLearner):
    channel_axes = (4, None, None, None)

    @dataclass(frozen=True)
    class Config:
        vocabulary: tuple[str, ...] = fluid_vocabulary()
        dims: int = 4  # fields, at most
        grid: int = 128 * 128  # points of a square field
        patches: int = 8  # along a side, of what is given
        patches_out: int = 16  # and of what is asked for
        dim: int = 1024
        hidden: int = 2048  # of feed-forwards
        heads: int = 8
        data_encoder_layers: int = 2
        text_encoder_layers: int = 1
        fusion_layers: int = 8
        decoder_layers: int = 8
        conv_dim: int = 32  # between patches and fields
        text: bool = True  # without: data in, data out (the released 1to1)
        frames: int = 10  # at most, given or said in one pass, where they are known by order
        ahead: int = 10  # frames that one pass gives; more are rolled out (1: the released model for rollouts)
        continuous: bool = False  # frames known by their times
        place_std: float = 1.0  # of fresh places and orders; small ones let a small model hear its inputs from the start
        carry_last: bool = False  # what is said is what is added to the last frame
        normalise: str = "meanvar"  # or "range", "" for none
        loss_weight: str = ""  # relative to each frame's "l2" or "linfty" norm
        square_loss: bool = True  # of a weighted loss: squares, or norms
        denormalise: bool = False  # the loss in the data's own units
        dropout: float = 0.0

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.size = math.isqrt(c.grid)
        if self.size**2 != c.grid or self.size % c.patches or self.size % c.patches_out:
            raise BadInput("grid", expected=f"a square whose side {c.patches} and {c.patches_out} divide", got=str(c.grid))
        if c.normalise not in ("meanvar", "range", "") or c.loss_weight not in ("l2", "linfty", ""):
            raise BadInput(
                "normalise, loss_weight", expected="meanvar, range or ''; l2, linfty or ''", got=f"{c.normalise}, {c.loss_weight}"
            )
        side, side_out = self.size // c.patches, self.size // c.patches_out
        self.patch = nn.Sequential(nn.Conv2d(c.dims, c.dim, side, side), nn.GELU(), nn.Conv2d(c.dim, c.dim, 1))
        self.given = Places(c, c.patches**2)
        self.tokens = Tap()
        self.data_encoder = Transformer(c, c.data_encoder_layers)
        if c.text:
            self.embed = nn.Embedding(len(c.vocabulary), c.dim)
            nn.init.normal_(self.embed.weight, std=c.dim**-0.5)
            self.register_buffer("positions", sinusoid_table(LONGEST, c.dim), persistent=False)
            self.text_encoder = Transformer(c, c.text_encoder_layers)
            self.fusion_types = nn.Parameter(torch.randn(2, c.dim) * c.dim**-0.5)
            self.fusion = Transformer(c, c.fusion_layers)
        self.asked = Places(c, c.patches_out**2)
        self.decoder = Transformer(c, c.decoder_layers, cross=True)
        self.features = Tap()
        self.head = nn.Sequential(
            nn.ConvTranspose2d(c.dim, c.conv_dim, side_out, side_out),
            nn.GELU(),
            nn.Conv2d(c.conv_dim, c.conv_dim, 1),
            nn.GELU(),
            nn.Conv2d(c.conv_dim, c.dims, 1),
        )

    # the network ----------------------------------------------------------------------------------------------------------

    def fuse(self, fields: Tensor, times: Tensor, skeleton: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the decoder sees, float [b, frames * patches + words, dim], and which of it is no padding."""
        b = fields.shape[0]
        x = self.patch(fields.movedim(-1, 2).flatten(0, 1))  # (b frames) dim y x
        x = x.flatten(2).transpose(1, 2).reshape(b, -1, self.config.dim)
        x = self.data_encoder(self.tokens(x + self.given(times)))
        if not self.config.text:
            return x, None
        there = skeleton != PAD
        y = self.text_encoder(self.embed(skeleton) + self.positions[: skeleton.shape[1]], there)  # type: ignore[index]
        kept = torch.cat([torch.ones_like(x[..., 0], dtype=torch.bool), there], 1)
        return self.fusion(torch.cat([x + self.fusion_types[0], y + self.fusion_types[1]], 1), kept), kept

    def forward(self, fields: Tensor, times: Tensor, skeleton: Tensor, query: Tensor) -> Tensor:
        """fields: float [b, frames, side, side, dims], normalised. times, query: float [b, frames], when they are and are asked for.
        skeleton: int64 [b, words]. Returns float [b, frames asked for, side, side, dims], normalised as well."""
        source, kept = self.fuse(fields, times, skeleton)
        b, n = fields.shape[0], query.shape[1]
        place = self.asked(query - times[:, -1:]).expand(b, -1, -1)
        x = self.features(self.decoder(place, kept, source))
        x = x.reshape(b * n, self.config.patches_out, self.config.patches_out, -1).permute(0, 3, 1, 2)  # (b frames) dim y x
        said = self.head(x).unflatten(0, (b, n)).movedim(2, -1)
        return said + fields[:, -1:] if self.config.carry_last else said

    # training and prediction ----------------------------------------------------------------------------------------------

    def normaliser(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and size of each field over all that is given, float [b, 1, 1, 1, dims]."""
        if self.config.normalise == "meanvar":
            return fields.mean((1, 2, 3), keepdim=True), fields.std((1, 2, 3), keepdim=True) + TINY
        if self.config.normalise == "range":
            low, high = fields.amin((1, 2, 3), keepdim=True), fields.amax((1, 2, 3), keepdim=True)
            return (low + high) / 2, (high - low) / 2 + TINY
        return torch.zeros_like(fields[:, :1, :1, :1]), torch.ones_like(fields[:, :1, :1, :1])

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(fields, times, skeleton, mask of the fields there are [b, 1, 1, 1, dims]) of a batch with as many fields as the model has."""
        data, dims = batch["data"], batch["dims"]
        check_tensor("data", data, "batch steps channels", sizes={2: 1 + self.config.grid * dims.shape[1]})
        if not bool(batch["observed"].all()):
            raise BadInput("observed", expected="as many frames of every sample as of the others", got="padding")
        mask = F.pad(dims, (0, self.config.dims - dims.shape[1]))[:, None, None, None].to(data.dtype)
        return self.square(data[..., 1:], dims.shape[1]), data[..., 0], batch["skeleton"], mask

    def square(self, flat: Tensor, dims: int) -> Tensor:
        """[b, frames, grid * dims] to [b, frames, side, side, all dims]."""
        return F.pad(flat.unflatten(2, (self.size, self.size, dims)), (0, self.config.dims - dims))

    def forward_batch(self, batch: Batch) -> Tensor:
        batch = self.prepared(batch, equation=False)
        fields, times, skeleton, _ = self.inputs(batch)
        centre, size = self.normaliser(fields)
        return self((fields - centre) / size, times, skeleton, batch["query"][:, : self.config.ahead])

    def loss(self, batch: Batch) -> Losses:
        """data: the mean squared error of the normalised fields there are; weighted: each frame's relative to its norm, summed."""
        c = self.config
        fields, _, _, mask = self.inputs(self.prepared(batch, equation=False))
        centre, size = self.normaliser(fields)
        true = self.square(batch["target"][:, : c.ahead], batch["dims"].shape[1])
        said = self.forward_batch(batch).float()
        if c.denormalise:
            said = said * size + centre
        else:
            true = (true - centre) / size
        said = said * mask
        if not c.loss_weight:
            data = ((said - true) ** 2).sum() / mask.expand_as(said).count_nonzero()
        else:
            norm = true.abs().amax((2, 3)) if c.loss_weight == "linfty" else torch.linalg.vector_norm(true, dim=(2, 3))
            off = torch.linalg.vector_norm(said - true, dim=(2, 3))
            data = (off**2 / (norm**2 + 1e-6) if c.square_loss else off / (norm + 1e-6)).sum() / len(true)
        return Losses(data, {"data": data})

    @torch.no_grad()
    def predict(self, batch: Batch) -> Solutions:
        """The frames at the queries, `ahead` of them a pass; what was said takes the place of the oldest given frames of the next pass."""
        batch = self.prepared(batch, equation=False)
        fields, times, skeleton, mask = self.inputs(batch)
        self.check_words(skeleton)
        query, steps = batch["query"], fields.shape[1]
        for start in range(0, query.shape[1], self.config.ahead):
            window, when = fields[:, -steps:], times[:, -steps:]
            centre, size = self.normaliser(window)
            asked = query[:, start : start + self.config.ahead]
            said = (self((window - centre) / size, when, skeleton, asked) * mask * size + centre) * mask
            fields, times = torch.cat([fields, said.to(fields.dtype)], 1), torch.cat([times, asked], 1)
        found = fields[:, steps:, ..., : batch["dims"].shape[1]].flatten(2)
        b = len(found)
        return Solutions(found, [[] for _ in range(b)], [""] * b, [False] * b)

    # examples and checks --------------------------------------------------------------------------------------------------

    def example(self, batch: int = 1, frames: int = 4, times: int = 3, **size: Any) -> tuple[Tensor, ...]:
        b = self.example_batch(batch, frames=frames, times=times)
        return self.square(b["data"][..., 1:], self.config.dims), b["data"][..., 0], b["skeleton"], b["query"]

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {"one frame": self.example(1, 1, 1), "as many as there can be": self.example(2, self.config.frames, self.config.frames)}

    def example_batch(self, batch: int = 2, seed: int = 0, frames: int = 4, times: int = 3) -> dict[str, Any]:
        c, g = self.config, torch.Generator().manual_seed(seed)
        x = torch.arange(self.size) * 2 * math.pi / self.size
        phase, t = 2 * torch.rand(batch, 1, 1, 1, c.dims, generator=g), torch.arange(frames + times) * 0.2
        angle = x[:, None, None] + 2 * x[None, :, None]
        u = torch.sin(angle + phase + t[None, :, None, None, None]).flatten(2)  # b frames (side side dims)
        words = torch.randint(4, len(c.vocabulary), (batch, 7), generator=g)
        words[-1, 5:] = PAD
        t = t.expand(batch, -1)
        held: dict[str, Any] = {"data": torch.cat([t[:, :frames, None], u[:, :frames]], 2), "query": t[:, frames:], "target": u[:, frames:]}
        held |= {"observed": torch.ones(batch, frames, dtype=torch.bool), "dims": torch.ones(batch, c.dims, dtype=torch.bool)}
        return {
            **{k: v.to(self.device) for k, v in held.items()},
            "skeleton": words.to(self.device),
            "id": [f"example {i}" for i in range(batch)],
        }

    def check_input(self, fields: Any, times: Any, skeleton: Any, query: Any) -> None:
        check_tensor("fields", fields, "batch frames side side dims", sizes={2: self.size, 3: self.size, 4: self.config.dims})
        sizes = {0: len(fields)}
        check_tensor("times", times, "batch frames", sizes=sizes | {1: fields.shape[1]})
        check_tensor("skeleton", skeleton, "batch words", sizes=sizes, dtype=lambda d: d == torch.int64)
        check_tensor("query", query, "batch times", sizes=sizes)
        self.check_words(skeleton)
        for what, n in (("fields", fields.shape[1]), ("query", query.shape[1])):
            if n > self.config.frames and not self.config.continuous:
                raise BadInput(what, expected=f"at most {self.config.frames} frames", got=str(n))

    def check_words(self, ids: Tensor) -> None:
        words = len(self.config.vocabulary)
        if ids.shape[1] > LONGEST:
            raise BadInput("skeleton", expected=f"at most {LONGEST} words", got=str(ids.shape[1]))
        if ids.device.type == "cpu" and (int(ids.min()) < 0 or int(ids.max()) >= words):
            raise BadInput("skeleton", expected=f"ids from 0 to {words - 1}", got=f"{int(ids.min())} to {int(ids.max())}")

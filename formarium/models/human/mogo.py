"""Mogo, text to motion (Fu 2024, arXiv 2412.07797).

Two stages. A residual VQ-VAE turns a motion into six codes a frame, each level coding what those before it left over. A hierarchical causal
transformer then speaks codes: level i has its own Transformer-XL decoder, whose input at a step is the sum of the embeddings of codes
0..i of that step, after two prefix tokens, the caption and the level. One pass over the past gives all codes of the next step, so a step
costs one forward, and deeper levels need fewer layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Stage, Turn, check_tensor
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import Dropout
from formarium.nn.quantise import Quantised, ResidualQuantiser
from formarium.tasks.motion_generation.model import MotionGenerator, Motions, within

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
NORMS = ("", "LN", "GN", "BN")


# stage one: motions as codes ----------------------------------------------------------------------------------------


class Norm1d(nn.Module):
    """A normalisation of maps [batch, channels, time] by name; LN is over channels."""

    def __init__(self, kind: str, dim: int):
        super().__init__()
        self.kind = kind
        if kind == "LN":
            self.norm = nn.LayerNorm(dim)
        elif kind == "GN":
            self.norm = nn.GroupNorm(32, dim, eps=1e-6)
        elif kind == "BN":
            self.norm = nn.BatchNorm1d(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if not self.kind:
            return x
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if self.kind == "LN" else self.norm(x)


class DilatedBlock(nn.Module):
    """x + conv1(act(norm(conv3(act(norm(x)))))). x: float [batch, dim, time]."""

    def __init__(self, c: Mogo.Config, dilation: int):
        super().__init__()
        self.norm1, self.norm2 = Norm1d(c.norm, c.width), Norm1d(c.norm, c.width)
        self.act = ACTIVATIONS[c.activation]()
        self.conv1 = nn.Conv1d(c.width, c.width, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(c.width, c.width, 1)
        self.dropout = Dropout(c.conv_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv2(self.act(self.norm2(self.conv1(self.act(self.norm1(x)))))))


def dilated_blocks(c: Mogo.Config) -> nn.Sequential:
    """The widest dilation first."""
    return nn.Sequential(*(DilatedBlock(c, c.dilation_growth**i) for i in reversed(range(c.conv_depth))))


class Tokeniser(nn.Module):
    """The residual VQ-VAE: encoder, quantiser, decoder. Motions are float [batch, time, motion_dim], normalised; without strides every
    frame has its codes."""

    def __init__(self, c: Mogo.Config):
        super().__init__()
        self.stride = c.stride**c.down
        self.embed = nn.Conv1d(c.motion_dim, c.width, 3, padding=1)
        self.downs = nn.ModuleList([nn.ModuleList([nn.Conv1d(c.width, c.width, 3, c.stride, 1), dilated_blocks(c)]) for _ in range(c.down)])
        self.to_code = nn.Conv1d(c.width, c.code_dim, 3, padding=1)
        self.quantiser = ResidualQuantiser(
            c.quantisers, c.codes, c.code_dim, c.shared_codebook, c.quantiser_dropout, c.codebook_decay, c.code_temperature
        )
        self.from_code = nn.Conv1d(c.code_dim, c.width, 3, padding=1)
        self.ups = nn.ModuleList([nn.ModuleList([dilated_blocks(c), nn.Conv1d(c.width, c.width, 3, padding=1)]) for _ in range(c.down)])
        self.last = nn.Conv1d(c.width, c.width, 3, padding=1)
        self.out = nn.Conv1d(c.width, c.motion_dim, 3, padding=1)

    def encode(self, motion: Tensor) -> Tensor:
        """[batch, time, motion_dim] to vectors [batch, steps, code_dim]."""
        x = F.relu(self.embed(motion.transpose(1, 2)))
        for conv, blocks in self.downs:
            x = blocks(conv(x))
        return self.to_code(x).transpose(1, 2)

    def decode(self, vectors: Tensor) -> Tensor:
        """[batch, steps, code_dim] to motions [batch, steps, motion_dim]."""
        x = F.relu(self.from_code(vectors.transpose(1, 2)))
        for blocks, conv in self.ups:
            x = conv(blocks(x))
        return self.out(F.relu(self.last(x))).transpose(1, 2)

    def codes(self, motion: Tensor) -> Tensor:
        """The nearest codes, int64 [batch, steps, quantisers], as in eval mode and without gradient."""
        was = self.training
        self.eval()
        with torch.no_grad():
            found = self.quantiser.encode(self.encode(motion))
        self.train(was)
        return found

    def forward(self, motion: Tensor) -> tuple[Tensor, Quantised]:
        quantised = self.quantiser(self.encode(motion))
        return self.decode(quantised.vectors), quantised


# stage two: a causal transformer a level ----------------------------------------------------------------------------


class RelativeAttention(nn.Module):
    """Transformer-XL's attention (Dai et al. 2019): (q_i + u) k_j + (q_i + v) r_(i-j), causal, u and v shared by a level's layers.

    x: float [batch, steps, dim], the last steps of a sequence; distances: float [keys, dim], position codes of distances keys-1 .. 0.
    cache: keys and values of the steps before, [batch, heads, before, width] each, or None.
    """

    def __init__(self, c: Mogo.Config):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.distance = nn.Linear(c.dim, c.dim, bias=False)
        self.out = nn.Linear(c.dim, c.dim, bias=False)

    def forward(
        self, x: Tensor, distances: Tensor, u: Tensor, v: Tensor, cache: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, value = split_heads(self.qkv(x), self.heads, 3)
        if cache is not None:
            k, value = torch.cat([cache[0], k], 2), torch.cat([cache[1], value], 2)
        (r,) = split_heads(self.distance(distances)[None], self.heads)  # 1 h keys w
        places = shift((q + v[:, None]) @ r.transpose(2, 3)) * q.shape[-1] ** -0.5  # b h queries keys
        queries, keys = places.shape[2:]
        if queries > 1:
            ahead = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(1 + keys - queries)
            places = places.masked_fill(ahead, -torch.inf)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q + u[:, None], k, value, attn_mask=places, dropout_p=dropout)
        return self.out(merge_heads(y)), (k, value)


def shift(scores: Tensor) -> Tensor:
    """Scores [b, h, queries, distances falling to 0] to [b, h, queries, keys]: row i, of the last `queries` steps, moves so that each key
    stands at its distance (what is ahead of a query is arbitrary)."""
    b, h, queries, keys = scores.shape
    return F.pad(scores, (1, 0)).view(b, h, keys + 1, queries)[:, :, 1:].reshape(b, h, queries, keys)


class Block(nn.Module):
    """Relative attention and a GELU feed-forward network, LayerNorm after each sum (or, Config.pre_norm, before each branch)."""

    def __init__(self, c: Mogo.Config):
        super().__init__()
        self.pre_norm = c.pre_norm
        self.attention = RelativeAttention(c)
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.fc1, self.fc2 = nn.Linear(c.dim, c.inner), nn.Linear(c.inner, c.dim)
        self.dropout = Dropout(c.dropout)
        self.tap = Tap()

    def forward(self, x: Tensor, distances: Tensor, u: Tensor, v: Tensor, cache: tuple[Tensor, Tensor] | None = None):
        y, cache = self.attention(self.norm1(x) if self.pre_norm else x, distances, u, v, cache)
        x = x + self.dropout(y)
        x = x if self.pre_norm else self.norm1(x)
        y = self.fc1(self.norm2(x) if self.pre_norm else x)
        x = x + self.dropout(self.fc2(self.dropout(F.gelu(y))))
        return self.tap(x if self.pre_norm else self.norm2(x)), cache


class Level(nn.Module):
    """One level's decoder. x: float [batch, steps, dim]; caches: one a block, from the steps before. Returns the same shape, and the
    caches."""

    def __init__(self, c: Mogo.Config, depth: int):
        super().__init__()
        width = c.dim // c.heads
        self.u, self.v = nn.Parameter(torch.empty(c.heads, width)), nn.Parameter(torch.empty(c.heads, width))
        self.blocks = nn.ModuleList([Block(c) for _ in range(depth)])
        self.dropout = Dropout(c.dropout)
        self.features = Tap()
        # Transformer-XL's own word table and softmax bias: nothing reads them, but they are in the released weights
        self.unused_table, self.unused_bias = nn.Parameter(torch.empty(c.codes + 1, c.dim)), nn.Parameter(torch.empty(c.codes + 1))

    def forward(self, x: Tensor, caches: Sequence[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        keys = x.shape[1] + (caches[0][0].shape[2] if caches else 0)
        distances = self.dropout(distance_codes(keys, x.shape[2], x.device, x.dtype))
        x, kept = self.dropout(x), []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, distances, self.u, self.v, caches[i] if caches else None)
            kept.append(cache)
        return self.features(self.dropout(x)), kept


def distance_codes(keys: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of the distances keys-1 .. 0: float [keys, dim]."""
    frequencies = 1 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    angles = torch.arange(keys - 1, -1, -1, dtype=torch.float32, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1).to(dtype)


# the system ---------------------------------------------------------------------------------------------------------


class Mogo(MotionGenerator):
    @dataclass(frozen=True)
    class Config:
        part: str = "all"  # "all"; "tokeniser" or "transformer" alone
        motion_dim: int = 263
        text_dim: int = 512  # CLIP ViT-B/32's sentence vector
        max_length: int = 196  # frames
        # the tokeniser
        quantisers: int = 6
        codes: int = 512
        code_dim: int = 512
        width: int = 512
        down: int = 1
        stride: int = 1
        conv_depth: int = 3
        dilation_growth: int = 3
        activation: str = "relu"
        norm: str = ""
        shared_codebook: bool = False
        conv_dropout: float = 0.2
        quantiser_dropout: float = 0.2
        codebook_decay: float = 0.99
        code_temperature: float = 0.5  # of choosing codes in training
        # the transformer
        dim: int = 1024
        layers: tuple[int, ...] = (18, 10, 6, 4, 2, 2)  # of each level
        heads: int = 16
        inner: int = 4096
        dropout: float = 0.15
        pre_norm: bool = False
        # objective and sampling
        joint_weight: float = 0.5
        commitment_weight: float = 0.02
        corruption: float = 0.5  # share of a training input's codes replaced by random ones
        text_dropout: float = 0.0  # how often training takes no caption (in the released code 0.1, but never applied)
        tokeniser_share: float = 0.4  # of a fit's steps
        temperature: float = 0.6

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        for what, value, known in (("part", c.part, ("all", "tokeniser", "transformer")), ("activation", c.activation, ACTIVATIONS)):
            if value not in known:
                raise BadInput(f"Config.{what}", expected=" or ".join(known), got=repr(value))
        if c.norm not in NORMS:
            raise BadInput("Config.norm", expected="LN, GN, BN or none", got=repr(c.norm))
        if c.part != "tokeniser" and (len(c.layers) != c.quantisers or c.dim % c.heads):
            raise BadInput(
                "Config.layers", expected=f"{c.quantisers} levels, and heads that divide dim", got=f"{c.layers}, {c.heads} heads"
            )
        self.tokens = Tap()
        self.__dict__["borrowed"] = None
        if c.part != "transformer":
            self.tokeniser = Tokeniser(c)
        if c.part != "tokeniser":
            self.text_embed = nn.Linear(c.text_dim, c.dim)
            self.level_embed = nn.Linear(c.quantisers, c.dim)
            self.code_embed = nn.Embedding(c.codes + 1, c.dim)
            self.levels = nn.ModuleList([Level(c, depth) for depth in c.layers])
            self.head = nn.Linear(c.dim, c.codes, bias=False)
            self._init_transformer()

    def _init_transformer(self) -> None:
        for name, p in self.named_parameters():
            if name.startswith("tokeniser."):
                continue
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif "norm" not in name:
                nn.init.zeros_(p)

    @property
    def channel_axes(self) -> tuple[int | None, ...]:  # type: ignore[override]
        return (2,) if self.config.part == "tokeniser" else (1, None)

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """Of the transformer: captions' vectors x float [batch, text_dim] and codes int64 [batch, steps, quantisers], 0 steps or more, to
        logits [batch, steps + 2, codes, quantisers]; those at place j + 1 are of step j, told by the steps before it. Of the tokeniser
        alone: a normalised motion x [batch, time, motion_dim] to its reconstruction."""
        if codes is None:
            return self._autoencode(x)[0]
        return self._logits(*self._embed(x, codes))[0]

    def _autoencode(self, motion: Tensor) -> tuple[Tensor, Quantised]:
        quantised = self.tokeniser.quantiser(self.tokeniser.encode(motion))
        return self.tokeniser.decode(self.tokens(quantised.vectors)), quantised

    def _embed(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Prefixes [batch, levels, 2, dim] and the running sums of the codes' embeddings over levels [batch, levels, steps, dim]."""
        b, steps, levels = codes.shape
        start = (self.level_embed.weight.T + self.level_embed.bias).expand(b, -1, -1)  # b levels d
        prefix = torch.stack([self.text_embed(text)[:, None].expand_as(start), start], 2)
        embedded = self.code_embed(codes)
        if steps:
            embedded = self.tokens(embedded.flatten(1, 2)).view(b, steps, levels, -1)
        return prefix, embedded.cumsum(2).transpose(1, 2)

    def _logits(self, prefix: Tensor, tokens: Tensor, caches: list[list[tuple[Tensor, Tensor]]] | None = None):
        """Logits [batch, places, codes, levels] of the places given, and the levels' caches."""
        out, kept = [], []
        for i, level in enumerate(self.levels):
            x, cache = level(torch.cat([prefix[:, i], tokens[:, i]], 1), caches[i] if caches else None)
            out.append(self.head(x))
            kept.append(cache)
        return torch.stack(out, -1), kept

    def forward_batch(self, batch: Batch) -> Tensor:
        motion = self.normalised(batch)
        return self(motion) if self.config.part == "tokeniser" else self(self.text_of(batch), self._tokeniser().codes(motion))

    def _tokeniser(self) -> Tokeniser:
        if self.config.part != "transformer":
            return self.tokeniser
        if self.borrowed is None:
            raise BadInput("a transformer alone", expected="a tokeniser, too", got="none", fix="call model.use_tokeniser(tokeniser_model)")
        return self.borrowed.tokeniser

    def use_tokeniser(self, other: Mogo) -> Mogo:
        """Give a transformer alone the tokeniser of another model (a variant with one); returns self."""
        ours, theirs = self.config, getattr(other, "config", None)
        if not hasattr(other, "tokeniser") or (ours.codes, ours.quantisers) != (theirs.codes, theirs.quantisers):  # type: ignore[union-attr]
            raise BadInput(
                "tokeniser", expected=f"a Mogo with one, {ours.quantisers} levels of {ours.codes} codes", got=type(other).__name__
            )
        self.__dict__["borrowed"] = other
        self.mean.copy_(other.mean)
        self.std.copy_(other.std)
        return self

    # what it learns

    def training_stages(self) -> Sequence[Stage]:
        tokeniser = Stage("tokeniser", (Turn("tokeniser_loss", ("tokeniser.*",)),), self.config.tokeniser_share)
        spoken = ("text_embed.*", "level_embed.*", "code_embed.*", "levels.*", "head.*")
        transformer = Stage("transformer", (Turn("transformer_loss", spoken),), 1 - self.config.tokeniser_share)
        return {"all": (tokeniser, transformer), "tokeniser": (tokeniser,), "transformer": (transformer,)}[self.config.part]

    def loss(self, batch: Batch) -> Losses:
        return self.tokeniser_loss(batch) if self.config.part == "tokeniser" else self.transformer_loss(batch)

    def tokeniser_loss(self, batch: Batch) -> Losses:
        """Smooth L1 of the features, again of the joint positions among them, and the commitment to the codes. Positions after a motion's
        end don't count."""
        motion = self.normalised(batch)
        made, quantised = self.tokeniser(motion)
        weight = within(batch["length"], motion.shape[1])[..., None].float()
        error = F.smooth_l1_loss(made, motion, reduction="none") * weight
        share = weight.mean().clamp_min(1e-6)
        terms = {"reconstruction": error.mean() / share, "joints": error[..., 4:67].mean() / share, "commitment": quantised.commitment}
        c = self.config
        total = terms["reconstruction"] + c.joint_weight * terms["joints"] + c.commitment_weight * terms["commitment"]
        return Losses(total, {**terms, "perplexity": quantised.perplexity})

    def transformer_loss(self, batch: Batch) -> Losses:
        """Cross entropy of every level's code at every step, a mean within each motion and over motions; the past is told with errors."""
        c, codes, text = self.config, self._tokeniser().codes(self.normalised(batch)), self.text_of(batch)
        past = codes[:, :-1]
        if self.training:
            wrong = torch.rand(past.shape, device=past.device) < c.corruption
            past = torch.where(wrong, torch.randint_like(past, c.codes), past)
            if c.text_dropout:
                text = text * (torch.rand(len(text), 1, device=text.device) >= c.text_dropout)
        logits = self(text, past)[:, 1:]  # b steps codes levels
        there = within(batch["length"], codes.shape[1])[..., None].float()
        entropy = F.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none") * there  # b steps levels
        count = there.sum((1, 2)) * codes.shape[2]
        loss = (entropy.sum((1, 2)) / count).mean()
        right = ((logits.argmax(2) == codes) * there).sum() / count.sum()
        return Losses(loss, {"cross_entropy": loss, "accuracy": right})

    # what a person gets

    def stream(
        self, text: Tensor, steps: int, temperature: float | None = None, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Codes int64 [batch, quantisers], step by step, each drawn from what the past says; a step costs one place, as keys and values are
        kept. temperature: 0 for the likeliest code."""
        heat = self.config.temperature if temperature is None else temperature
        prefix, tokens = self._embed(text, torch.zeros(len(text), 0, self.config.quantisers, dtype=torch.int64, device=text.device))
        logits, caches = self._logits(prefix, tokens)
        for step in range(steps):
            last = logits[:, -1].transpose(1, 2).float()  # b levels codes
            if heat <= 0:
                codes = last.argmax(-1)
            else:
                shares = (last / heat).softmax(-1)
                codes = torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(shares.shape[:2])
            yield codes
            if step + 1 < steps:
                prefix, tokens = self._embed(text, codes[:, None])
                logits, caches = self._logits(prefix[:, :, :0], tokens, caches)

    def generate(self, text: Tensor, length: Tensor, temperature: float | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Features float [batch, frames, motion_dim] of motions as long as asked for, zeros after their ends."""
        if int(length.min()) < 1:
            raise BadInput("length", expected="at least 1 frame", got=str(int(length.min())))
        stride = self._tokeniser().stride
        codes = torch.stack([*self.stream(text, -(-int(length.max()) // stride), temperature, generator)], 1)
        return self.spoken(codes, length)

    def spoken(self, codes: Tensor, length: Tensor) -> Tensor:
        """Codes [batch, steps, quantisers] as features; motions of one length are decoded together, so that no end touches another
        motion."""
        tokeniser = self._tokeniser()
        out = torch.zeros(len(codes), int(length.max()), self.config.motion_dim, device=codes.device)
        for frames in length.unique().tolist():
            chosen = (length == frames).nonzero()[:, 0]
            vectors = tokeniser.quantiser.lookup(codes[chosen, : -(-frames // tokeniser.stride)])
            made = tokeniser.decode(vectors).repeat_interleave(tokeniser.stride, 1)[:, :frames]
            out[chosen, :frames] = made.float() * self.std + self.mean
        return out

    def predict(self, batch: Batch) -> Motions:
        """Motions of the captions, as long as the batch says; of the tokeniser alone, the batch's motions as the codes keep them."""
        from formarium.tasks.motion_generation.skeleton import to_joints

        length = batch["length"]
        reconstruction = torch.zeros(len(length), 0, self.config.motion_dim, device=length.device)
        if "motion" in batch:
            reconstruction = self.spoken(self._tokeniser().codes(self.normalised(batch)), length)
        elif self.config.part == "tokeniser":
            raise BadInput("batch", expected="motions to code", got="none")
        made = reconstruction if self.config.part == "tokeniser" else self.generate(self.text_of(batch), length)
        there = within(length, made.shape[1])
        joints = torch.from_numpy(to_joints(made.detach().cpu().numpy())).to(made.device)
        return Motions(made, joints * there[..., None, None], length, reconstruction)

    # examples and checks

    def example(self, batch: int = 1, steps: int = 11) -> tuple[Tensor, ...]:
        c = self.config
        if c.part == "tokeniser":
            return (torch.randn(batch, steps, c.motion_dim, device=self.device),)
        return torch.randn(batch, c.text_dim, device=self.device), torch.randint(c.codes, (batch, steps, c.quantisers), device=self.device)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{steps} steps": self.example(2, steps) for steps in (1, 2, 40)}

    def check_input(self, x: Tensor, codes: Tensor | None = None) -> None:
        c = self.config
        if c.part == "tokeniser" and codes is None:
            return check_tensor("motion", x, "batch time features", sizes={2: c.motion_dim})
        if c.part == "tokeniser" or codes is None:
            wanted = "a motion alone" if c.part == "tokeniser" else "captions' vectors and codes"
            raise BadInput(f"inputs of Mogo's {c.part}", expected=wanted, got="codes, too" if codes is not None else "one tensor")
        check_tensor("text", x, "batch channels", sizes={1: c.text_dim})
        if not (isinstance(codes, Tensor) and codes.ndim == 3 and codes.shape[1] == 0 and len(codes)):  # no steps yet
            check_tensor("codes", codes, "batch steps quantisers", sizes={0: len(x), 2: c.quantisers}, dtype=lambda d: d == torch.int64)
        if codes.numel() and codes.device.type == "cpu" and not 0 <= int(codes.min()) <= int(codes.max()) <= c.codes:
            raise BadInput("codes", expected=f"0 to {c.codes}", got=f"{int(codes.min())} to {int(codes.max())}")

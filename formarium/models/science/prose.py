r"""PROSE: predicting operators and symbolic expressions (Liu, Zhang, Schaeffer; Neural Networks 2024, arXiv 2309.16816).

Two kinds of input, noisy samples of a solution and a guess of its equations, and two kinds of output, the solution at any later time and
the equations with numbers. Five transformers: a data encoder over samples (t, u), a text encoder over prefix words, a fusion over both
(type embeddings tell them apart), a data decoder whose queries are times and see the fused samples only, and a causal text decoder over the
fused words. Queries don't see one another (sec. 2.3): the output at a time is an operator's value there.
Training: data_weight * mean_b(|u' - u|^2 / (|u|^2 + 1e-5)) + cross entropy of the next word. With `grid` it is the variant for PDEs
(prose_pde): a state is a field on a grid, given and asked for whole at every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, check_tensor
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.beam import KVCache, beam_search, decode
from formarium.nn.drop import Dropout
from formarium.nn.sinusoids import sinusoid_table
from formarium.tasks.operator_learning.model import OperatorLearner, Solutions
from formarium.tasks.operator_learning.symbols import BOS, EOS, PAD, infix, is_valid, vocabulary

LONGEST, EPS = 512, 1e-12  # positions in a table; of the layer norms


class Attention(nn.Module):
    """Multi-head attention within x, or from x to a source of another width. scaled: cosine similarity times a learned scale.

    x: float [b, n, dim], source: float [b, m, source_dim], mask: bool, True where to look, broadcast to [b, heads, n, m].
    """

    def __init__(self, dim: int, heads: int, source_dim: int | None, scaled: bool, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        if source_dim is None:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(source_dim, 2 * dim)
        self.scale = nn.Parameter(torch.tensor((dim // heads) ** -0.5)) if scaled else None
        self.out = nn.Linear(dim, dim)

    def memory(self, source: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.kv(source), self.heads, 2)

    def forward(self, x: Tensor, mask: Tensor | None, memory: tuple[Tensor, ...] | None = None, cache: KVCache | None = None) -> Tensor:
        """memory: keys and values of the source, where it has one. cache: earlier steps' keys and values."""
        if memory is None:
            q, k, v = split_heads(self.qkv(x), self.heads, 3)
        else:
            (q,), (k, v) = split_heads(self.q(x), self.heads), memory
        if cache is not None:
            k, v = cache.append(k, v)
        scale = None
        if self.scale is not None:
            q, k, scale = F.normalize(q, dim=-1) * self.scale, F.normalize(k, dim=-1), 1.0
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)))


class FeedForward(nn.Module):
    """dim to 4 dim (GELU, `hidden` layers there) and back."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.lin1 = nn.Linear(dim, 4 * dim)
        self.mid = nn.ModuleList(nn.Linear(4 * dim, 4 * dim) for _ in range(hidden - 1))
        self.lin2 = nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.lin1(x))
        for layer in self.mid:
            x = F.gelu(layer(x))
        return self.dropout(self.lin2(x))


@dataclass(frozen=True)
class Shape:
    """What one of the five transformers is made of. first, second: attention "self" or "cross", second "" for none."""

    dim: int
    layers: int
    heads: int
    hidden: int
    positions: str = ""  # "", "sinusoidal", "learnable"
    first: str = "self"
    second: str = ""
    source_dim: int = 0


class Block(nn.Module):
    """Post-norm: attention, perhaps a second one, feed-forward."""

    def __init__(self, s: Shape, c: PROSE.Config):
        super().__init__()
        self.kinds = [k for k in (s.first, s.second) if k]
        make = [Attention(s.dim, s.heads, s.source_dim if k == "cross" else None, c.cosine, c.attention_dropout) for k in self.kinds]
        self.attentions = nn.ModuleList(make)
        self.attention_norms = nn.ModuleList(nn.LayerNorm(s.dim, eps=EPS) for _ in make)
        self.ffn = FeedForward(s.dim, s.hidden, c.dropout)
        self.norm = nn.LayerNorm(s.dim, eps=EPS)
        self.dropout = Dropout(c.dropout)
        self.tap = Tap()

    def memory(self, source: Tensor) -> list[tuple[Tensor, ...] | None]:
        return [a.memory(source) if k == "cross" else None for k, a in zip(self.kinds, self.attentions, strict=True)]  # type: ignore[operator]

    def forward(self, x: Tensor, masks: dict[str, Tensor | None], memory: list[Any], cache: KVCache | None = None) -> Tensor:
        for kind, attention, norm, kept in zip(self.kinds, self.attentions, self.attention_norms, memory, strict=True):
            x = norm(x + self.dropout(attention(x, masks[kind], kept, cache if kind == "self" else None)))
        return self.norm(x + self.ffn(x))


class Positions(nn.Module):
    """A table of 512 positions to add: learned, or fixed sines and cosines."""

    table: Tensor

    def __init__(self, dim: int, kind: str):
        super().__init__()
        if kind == "learnable":
            self.table = nn.Parameter(torch.randn(LONGEST, dim) * dim**-0.5)
        else:
            self.register_buffer("table", sinusoid_table(LONGEST, dim), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        return x + self.table[start : start + x.shape[1]]


class Transformer(nn.Module):
    """Embedded tokens through the blocks. Padded places are 0 after every block, as released.

    x: float [b, n, dim], kept: bool [b, n] or None for all, masks and source: see Block. Returns float [b, n, dim].
    """

    def __init__(self, s: Shape, c: PROSE.Config):
        super().__init__()
        self.positions = Positions(s.dim, s.positions) if s.positions else None
        self.norm = nn.LayerNorm(s.dim, eps=EPS)
        self.dropout = Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(s, c) for _ in range(s.layers))

    def start(self, x: Tensor, at: int = 0) -> Tensor:
        return self.dropout(self.norm(x if self.positions is None else self.positions(x, at)))

    def forward(self, x: Tensor, kept: Tensor | None, masks: dict[str, Tensor | None], source: Tensor | None = None) -> Tensor:
        x = self.start(x)
        x = x if kept is None else x * kept[..., None]
        for block in self.blocks:
            memory = [None] * len(block.kinds) if source is None else block.memory(source)  # type: ignore[arg-type,operator]
            x = block(x, masks, memory)
            x = block.tap(x if kept is None else x * kept[..., None])  # type: ignore[operator]
        return x


class TextTransformer(Transformer):
    """A transformer over words; with `output` it has the layer to words, by default the embedding itself (and a bias)."""

    def __init__(self, s: Shape, c: PROSE.Config, output: bool):
        super().__init__(s, c)
        words = len(c.vocabulary)
        self.embed = nn.Embedding(words, s.dim, padding_idx=PAD)
        nn.init.normal_(self.embed.weight, std=s.dim**-0.5)
        with torch.no_grad():
            self.embed.weight[PAD] = 0
        self.features = Tap() if output else None
        self.output_bias = nn.Parameter(torch.zeros(words)) if output else None
        self.output_weight = nn.Parameter(torch.randn(words, s.dim) * s.dim**-0.5) if output and not c.shared_output else None

    def logits(self, x: Tensor) -> Tensor:
        assert self.features is not None
        return F.linear(self.features(x), self.embed.weight if self.output_weight is None else self.output_weight, self.output_bias)


class ReversibleNorm(nn.Module):
    """Instance normalisation over time that is undone behind the decoder (Kim et al. 2022). data: float [b, n, 1 + channels]."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = data[..., 1:]
        mean, deviation = values.mean(1, keepdim=True), (values.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return torch.cat([data[..., :1], self.gain * (values - mean) / deviation + self.bias], -1), mean, deviation

    def undo(self, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        return (x - self.bias) / self.gain * deviation + mean


class PROSE(OperatorLearner):
    channel_axes = (2, None, None, None, None)

    @dataclass(frozen=True)
    class Config:
        vocabulary: tuple[str, ...] = vocabulary()
        dims: int = 3  # of a state, at most
        grid: int = 0  # points of a PDE's field that is asked for; 0: an ODE
        patch: int = 0  # points that a sample gives; 0: as many as grid
        dim: int = 512  # of data encoder, text encoder and fusion
        text_decoder_dim: int = 0  # 0: as dim
        data_decoder_dim: int = 0
        text_encoder_layers: int = 4
        text_decoder_layers: int = 8
        data_encoder_layers: int = 2
        data_decoder_layers: int = 8
        fusion_layers: int = 8
        text_encoder_heads: int = 8
        text_decoder_heads: int = 8
        data_encoder_heads: int = 8
        data_decoder_heads: int = 8
        fusion_heads: int = 8
        text_encoder_hidden: int = 1  # layers of 4 dim in a feed-forward
        text_decoder_hidden: int = 1
        data_encoder_hidden: int = 1
        data_decoder_hidden: int = 1
        fusion_hidden: int = 1
        text_encoder_positions: str = "sinusoidal"
        text_decoder_positions: str = "sinusoidal"
        data_encoder_positions: str = ""
        data_decoder_positions: str = ""
        fusion_positions: str = ""
        type_embeddings: bool = True
        split_text: bool = True  # the text decoder sees fused words only
        split_data: bool = True  # the data decoder sees fused samples only
        residual_features: bool = False  # a small network more between fusion and data decoder
        query_attention: bool = False  # queries see one another
        shared_output: bool = True
        cosine: bool = False  # attention by cosine similarity with a learned scale
        fused_projections: bool = True  # how released weights are stored: one projection for q, k, v, or three
        text: bool = True  # without: data in, data out
        write: bool = True  # writes the equations
        solve: bool = True  # gives the solution
        normalise: bool = False  # reversible instance normalisation of the data
        dropout: float = 0.0
        attention_dropout: float = 0.0
        data_weight: float = 6.0
        relative: bool = True  # the data's squared error relative to each sample's size; else its plain mean
        max_len: int = 200
        beams: int = 1  # 1: the likeliest word at every step
        alpha: float = 1.0

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        channels = c.dims * max(1, c.grid)
        given = self.given
        text_dim, data_dim = c.text_decoder_dim or c.dim, c.data_decoder_dim or c.dim
        self.normaliser = ReversibleNorm(given) if c.normalise else None
        self.embedder = nn.Sequential(nn.Linear(1 + given, c.dim), nn.GELU(), nn.Linear(c.dim, c.dim))
        self.tokens = Tap()
        data = Shape(c.dim, c.data_encoder_layers, c.data_encoder_heads, c.data_encoder_hidden, c.data_encoder_positions)
        self.data_encoder = Transformer(data, c)
        if c.text:
            text = Shape(c.dim, c.text_encoder_layers, c.text_encoder_heads, c.text_encoder_hidden, c.text_encoder_positions)
            self.text_encoder = TextTransformer(text, c, output=False)
            self.fusion = Transformer(Shape(c.dim, c.fusion_layers, c.fusion_heads, c.fusion_hidden), c)
            self.fusion_types = nn.Parameter(torch.randn(2, c.dim) * c.dim**-0.5) if c.type_embeddings else None
            self.fusion_data_positions = Positions(c.dim, c.fusion_positions) if c.fusion_positions else None
            self.fusion_text_positions = Positions(c.dim, c.fusion_positions) if c.fusion_positions else None
        if c.text and c.write:
            made = c.text_decoder_layers, c.text_decoder_heads, c.text_decoder_hidden, c.text_decoder_positions
            self.text_decoder = TextTransformer(Shape(text_dim, *made, "self", "cross", c.dim), c, output=True)
        if c.solve:
            made = c.data_decoder_layers, c.data_decoder_heads, c.data_decoder_hidden, c.data_decoder_positions
            self.data_decoder = Transformer(Shape(data_dim, *made, "cross", "self" if c.query_attention else "", c.dim), c)
            self.query = nn.Linear(1, data_dim)
            self.data_features = nn.ModuleDict({"features": Tap()})
            wide = nn.Sequential(nn.Linear(data_dim, 4 * data_dim), nn.Linear(4 * data_dim, channels)) if c.grid else None
            self.head = wide or nn.Linear(data_dim, channels)
            if c.residual_features:
                both = c.text and not c.split_data
                self.data_residual = residual(data_dim)
                self.text_residual = residual(data_dim) if both else None

    @property
    def given(self) -> int:
        """Numbers in a sample, beside its time."""
        return self.config.dims * max(1, self.config.patch or self.config.grid)

    # the five transformers ------------------------------------------------------------------------------------------------

    def fuse(self, data: Tensor, observed: Tensor, skeleton: Tensor) -> Tensor:
        """Fused features float [b, steps + words, dim] (samples only where there is no text)."""
        x = self.tokens(self.embedder(data))
        x = self.data_encoder(x, observed, {"self": observed[:, None, None]})
        if not self.config.text:
            return x
        there = skeleton != PAD
        y = self.text_encoder(self.text_encoder.embed(skeleton), there, {"self": there[:, None, None]})
        if self.fusion_data_positions is not None and self.fusion_text_positions is not None:
            x, y = self.fusion_data_positions(x), self.fusion_text_positions(y)
        if self.fusion_types is not None:
            x, y = x + self.fusion_types[0], y + self.fusion_types[1]
        kept = torch.cat([observed, there], 1)
        return self.fusion(torch.cat([x, y], 1), kept, {"self": kept[:, None, None]})

    def solution(self, fused: Tensor, observed: Tensor, skeleton: Tensor, query: Tensor) -> Tensor:
        """Values float [b, times, dims * grid] at query float [b, times]."""
        c, n = self.config, observed.shape[1]
        source, kept = fused[:, :n], observed
        if c.residual_features:
            source = source + self.data_residual(source)
        if c.text and not c.split_data:
            words = fused[:, n:]
            if c.residual_features and self.text_residual is not None:
                words = words + self.text_residual(words)
            source, kept = torch.cat([source, words], 1), torch.cat([observed, skeleton != PAD], 1)
        x = self.data_decoder(self.query(query[..., None]), None, {"cross": kept[:, None, None], "self": None}, source)
        return self.head(self.data_features["features"](x))

    def words_source(self, fused: Tensor, observed: Tensor, skeleton: Tensor) -> tuple[Tensor, Tensor]:
        """What the text decoder sees, and which of it is no padding."""
        there = skeleton != PAD
        if self.config.split_text:
            return fused[:, observed.shape[1] :], there
        return fused, torch.cat([observed, there], 1)

    def writing(self, fused: Tensor, observed: Tensor, skeleton: Tensor, equation: Tensor) -> Tensor:
        """Logits of the next word float [b, words, vocabulary], teacher-forced with equation int64 [b, words]."""
        source, kept = self.words_source(fused, observed, skeleton)
        causal = torch.ones(equation.shape[1], equation.shape[1], dtype=torch.bool, device=equation.device).tril()
        decoder = self.text_decoder
        x = decoder(decoder.embed(equation), equation != PAD, {"self": causal, "cross": kept[:, None, None]}, source)
        return decoder.logits(x)

    def forward(self, data: Tensor, observed: Tensor, skeleton: Tensor, query: Tensor, equation: Tensor) -> tuple[Tensor, ...]:
        """See the task's batch. Returns (solution [b, times, dims * grid], logits [b, words, vocabulary]), without what it doesn't do."""
        mean = deviation = None
        if self.normaliser is not None:
            data, mean, deviation = self.normaliser(data)
        fused = self.fuse(data, observed, skeleton)
        out = []
        if self.config.solve:
            u = self.solution(fused, observed, skeleton, query)
            out.append(u if self.normaliser is None else self.normaliser.undo(u, mean, deviation))
        if self.config.text and self.config.write:
            out.append(self.writing(fused, observed, skeleton, equation))
        return tuple(out)

    # training and prediction ----------------------------------------------------------------------------------------------

    def forward_batch(self, batch: Batch) -> tuple[Tensor, ...]:
        batch = self.prepared(batch)
        return self(*(batch[k] for k in ("data", "observed", "skeleton", "query", "equation")))

    def loss(self, batch: Batch) -> Losses:
        """data: relative squared error, averaged over samples, or the mean squared error. text: cross entropy of every word behind <BOS>
        (where the equation is known)."""
        batch = self.prepared(batch)
        out, terms = [*self.forward_batch(batch)], {}
        if self.config.solve:
            there = self._dims(batch)[:, None].float()
            true = batch["target"]
            off = (((out.pop(0).float() - true) * there) ** 2).flatten(1).sum(1)
            if self.config.relative:
                terms["data"] = (off / (((true * there) ** 2).flatten(1).sum(1) + 1e-5)).mean()
            else:
                terms["data"] = off.sum() / there.expand_as(true).sum()
        total = self.config.data_weight * terms["data"] if terms and out else terms.get("data", 0.0)
        if out:
            logits, next_word = out[0][:, :-1].float(), batch["equation"][:, 1:]
            said = F.cross_entropy(logits.flatten(0, 1), next_word.flatten(), ignore_index=PAD, reduction="sum")
            terms["text"] = said / (next_word != PAD).sum().clamp_min(1)
            total = total + terms["text"]
        return Losses(total, terms)

    def _dims(self, batch: Batch) -> Tensor:
        dims = batch["dims"]
        return dims.repeat(1, max(1, self.config.grid))  # (grid dims)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Solutions:
        """The solution at the queries, and the equations: the likeliest word at every step, or by beam search."""
        asked = batch["dims"].shape[1] * max(1, self.config.grid)
        batch = self.prepared(batch, equation=False)
        data, observed, skeleton = batch["data"], batch["observed"], batch["skeleton"]
        self.check_data(data, observed, skeleton, batch["query"])
        mean = deviation = None
        if self.normaliser is not None:
            data, mean, deviation = self.normaliser(data)
        fused = self.fuse(data, observed, skeleton)
        b = len(data)
        u = data.new_zeros(b, batch["query"].shape[1], asked)
        if self.config.solve:
            u = self.solution(fused, observed, skeleton, batch["query"])
            u = (u if self.normaliser is None else self.normaliser.undo(u, mean, deviation)) * self._dims(batch)[:, None]
        words: list[list[str]] = [[] for _ in range(b)]
        if self.config.text and self.config.write:
            words = [[self.config.vocabulary[i] for i in row] for row in self.write(fused, observed, skeleton)]
        dims = batch["dims"].sum(1).tolist()
        valid = [bool(w) and is_valid(w, d if not self.config.grid else None) for w, d in zip(words, dims, strict=True)]
        return Solutions(u[..., :asked], words, [infix(w) for w in words], valid)

    def write(self, fused: Tensor, observed: Tensor, skeleton: Tensor) -> list[list[int]]:
        """Word ids of every sample's equations, decoded with cached keys and values."""
        c, decoder = self.config, self.text_decoder
        source, kept = self.words_source(fused, observed, skeleton)
        source, kept = source.repeat_interleave(c.beams, 0), kept.repeat_interleave(c.beams, 0)
        memory = [block.memory(source) for block in decoder.blocks]  # type: ignore[operator]
        caches, at = [KVCache() for _ in decoder.blocks], 0

        def step(token: Tensor, parents: Tensor | None) -> Tensor:
            nonlocal at
            if parents is not None and c.beams > 1:
                for cache in caches:
                    cache.reorder(parents)
            x = decoder.start(decoder.embed(token[:, None]), at)
            for block, kept_memory, cache in zip(decoder.blocks, memory, caches, strict=True):
                x = block.tap(block(x, {"self": None, "cross": kept[:, None, None]}, kept_memory, cache))  # type: ignore[operator]
            at += 1
            return decoder.logits(x)[:, 0]

        start = torch.full((len(fused),), BOS, device=fused.device)
        length = min(c.max_len, LONGEST)
        if c.beams == 1:
            tokens, lengths = decode(step, start, torch.full_like(start, EOS), max_len=length, pad=PAD)
        else:
            found = beam_search(step, start, torch.full_like(start, EOS), beams=c.beams, max_len=length, alpha=c.alpha, pad=PAD)
            tokens, lengths = found.tokens[:, 0], found.lengths[:, 0]
        return [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]

    # examples and checks --------------------------------------------------------------------------------------------------

    def example(self, batch: int = 1, steps: int = 12, times: int = 7) -> tuple[Tensor, ...]:
        b = self.example_batch(batch, steps=steps, times=times)
        return tuple(b[k] for k in ("data", "observed", "skeleton", "query", "equation"))

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {"one sample, one time": self.example(1, 1, 1), "more of both": self.example(2, 33, 50)}

    def example_batch(self, batch: int = 2, seed: int = 0, steps: int = 12, times: int = 7) -> dict[str, Any]:
        c, g = self.config, torch.Generator().manual_seed(seed)
        channels, words = max(self.given, c.dims * c.grid), len(c.vocabulary)
        t = torch.linspace(0, 2, steps).expand(batch, steps)
        phase = torch.rand(batch, 1, channels, generator=g)
        query = torch.linspace(2, 4, times).expand(batch, times)
        text, equation = (torch.randint(4, words, (batch, n), generator=g) for n in (6, 9))
        text[-1, 4:], equation[:, 0], equation[:, -1] = PAD, BOS, EOS
        if batch > 1:
            equation[-1, -2], equation[-1, -1] = EOS, PAD
        wave = lambda at: torch.sin(at[..., None] + 6 * phase)  # noqa: E731
        observed = torch.ones(batch, steps, dtype=torch.bool)
        observed[-1, -2:] = steps < 4
        held = {"data": torch.cat([t[..., None], wave(t)[..., : self.given]], -1), "observed": observed, "skeleton": text, "query": query}
        held |= {"dims": torch.ones(batch, c.dims, dtype=torch.bool), "target": wave(query), "equation": equation}
        return {**{k: v.to(self.device) for k, v in held.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_data(self, data: Any, observed: Any, skeleton: Any, query: Any) -> None:
        check_tensor("data", data, "batch steps channels", sizes={2: 1 + self.given})
        sizes = {0: len(data)}
        check_tensor("observed", observed, "batch steps", sizes=sizes | {1: data.shape[1]}, dtype=lambda d: d == torch.bool)
        check_tensor("skeleton", skeleton, "batch words", sizes=sizes, dtype=lambda d: d == torch.int64)
        check_tensor("query", query, "batch times", sizes=sizes)
        self._check_words("skeleton", skeleton)

    def check_input(self, data: Any, observed: Any, skeleton: Any, query: Any, equation: Any) -> None:
        self.check_data(data, observed, skeleton, query)
        check_tensor("equation", equation, "batch words", sizes={0: len(data)}, dtype=lambda d: d == torch.int64)
        self._check_words("equation", equation)

    def _check_words(self, what: str, ids: Tensor) -> None:
        words = len(self.config.vocabulary)
        if ids.shape[1] > LONGEST:
            raise BadInput(what, expected=f"at most {LONGEST} words", got=str(ids.shape[1]))
        if ids.device.type == "cpu" and (int(ids.min()) < 0 or int(ids.max()) >= words):
            raise BadInput(what, expected=f"ids from 0 to {words - 1}", got=f"{int(ids.min())} to {int(ids.max())}")


def residual(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

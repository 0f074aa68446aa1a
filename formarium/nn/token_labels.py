"""Token labels: patches of a detector's maps learn what covers them (Jiang et al., NeurIPS 2021, as ViDT+ has it)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.matching import sigmoid_focal


def token_losses(tokens: Sequence[Tensor], masks: Tensor, labels: Tensor, total: Tensor) -> dict[str, Tensor]:
    """Focal and Dice losses of the patches' class logits (one [batch, h, w, classes] a level) against the share of each patch that a
    class's masks cover. masks: bool [batch, objects, height, width], the first counts where they overlap. labels: int64 [batch, objects],
    below 0 where there is none. Class 0 stands for "some object". total: the number of objects that the sums are divided by."""
    earlier = (masks.cumsum(1) - masks.long()) > 0
    own = (masks & ~earlier & (labels >= 0)[..., None, None]).float()
    focal, dice = [], []
    for logits in tokens:
        _, h, w, classes = logits.shape
        shares = F.adaptive_avg_pool2d(own, (h, w))  # b n h w
        kinds = F.one_hot(labels.clamp_min(0), classes).to(shares.dtype)
        wanted = torch.einsum("bnhw,bnc->bhwc", shares, kinds)
        wanted = torch.cat([shares.sum(1)[..., None], wanted[..., 1:]], -1).clamp(0, 1)
        said = logits.float()
        focal.append(sigmoid_focal(said, wanted).flatten(1, 2).mean(1).sum() / total)
        p, t = said.sigmoid().flatten(1), wanted.flatten(1)
        dice.append((1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).sum() / total)
    return {"token_focal": torch.stack(focal).sum(), "token_dice": torch.stack(dice).sum()}

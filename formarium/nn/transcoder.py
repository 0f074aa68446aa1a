"""The transcoder (Dunefsky et al., NeurIPS 2024, arXiv 2406.11944): a wide, sparse layer that does what an MLP does, feature by feature.

z(x) = ReLU((x - b_dec) W_enc + b_enc),   out = z W_dec + b_dec_out
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

ROWS = 512  # of the decoder that are worked on at a time: they stay in the cache from one operation to the next


class TranscoderLosses(NamedTuple):
    """Scalars: total = mse + l1 + ghost."""

    total: Tensor
    mse: Tensor
    l1: Tensor
    ghost: Tensor


class Transcoder(nn.Module):
    """dim_in: of the MLP's input (behind its norm), dim_out: of its output, features: how many there are to choose from."""

    def __init__(self, dim_in: int, dim_out: int, features: int):
        super().__init__()
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(dim_in, features)))
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(features, dim_out)))
        self.b_dec = nn.Parameter(torch.zeros(dim_in))
        self.b_dec_out = nn.Parameter(torch.zeros(dim_out))
        self.unit_rows()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float [..., dim_in] -> (out [..., dim_out], activations [..., features])."""
        z = self.encode(x)
        return z @ self.W_dec + self.b_dec_out, z

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.before(x))

    def before(self, x: Tensor) -> Tensor:
        """Activations before the ReLU."""
        return torch.addmm(self.b_enc, (x - self.b_dec).reshape(-1, x.shape[-1]), self.W_enc).view(*x.shape[:-1], -1)

    def loss(self, x: Tensor, target: Tensor, l1: float, dead: Tensor | None = None) -> TranscoderLosses:
        """x [rows, dim_in], target [rows, dim_out] (the MLP's outputs); the squared error is over each target's length, as the authors'.

        l1: weight of the sum of activations. dead: bool [features], those that have been silent for long: they get a gradient from what the
        others leave over (ghost gradients).
        """
        before = self.before(x)
        z = torch.relu(before)
        out = z @ self.W_dec + self.b_dec_out
        error = (out - target).square() / target.norm(dim=-1, keepdim=True)
        mse, sparsity = error.mean(), l1 * z.sum(1).mean()
        ghost = mse.new_zeros(())
        if dead is not None and bool(dead.any()):
            ghost = self._ghost(before, (target - out).detach(), error, dead)
        return TranscoderLosses(mse + sparsity + ghost, mse, sparsity, ghost)

    def _ghost(self, before: Tensor, residual: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        out = before[:, dead].exp() @ self.W_dec[dead]
        length = residual.norm(dim=-1, keepdim=True)
        out = out * (length / (1e-6 + 2 * out.norm(dim=-1, keepdim=True))).detach()
        ghost = (out - residual).square() / length
        return (ghost * (error / (ghost + 1e-6)).detach()).mean()

    @torch.no_grad()
    def unit_rows(self) -> None:
        """Decoder rows of length 1: without it the sparsity's price could be paid by large rows."""
        for rows in self.W_dec.split(ROWS):
            rows.div_(rows.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """What of the decoder's gradient would only change a row's length."""
        if self.W_dec.grad is not None:
            for grad, rows in zip(self.W_dec.grad.split(ROWS), self.W_dec.split(ROWS), strict=True):
                grad.addcmul_((grad * rows).sum(1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def centre(self, x: Tensor, target: Tensor) -> None:
        """Biases at the means of inputs and outputs, to start from."""
        self.b_dec.copy_(x.mean(0))
        self.b_dec_out.copy_(target.mean(0))


def train_transcoder(
    x: Tensor,
    target: Tensor,
    features: int,
    *,
    l1: float = 1e-3,
    lr: float = 4e-4,
    steps: int = 1000,
    batch: int = 1024,
    warmup: int = 50,
    silent: int = 200,
    seed: int = 0,
) -> tuple[Transcoder, list[dict[str, float]]]:
    """A transcoder of an MLP's inputs x [rows, dim_in] to its outputs [rows, dim_out], and its losses over the steps.

    silent: steps after which a feature that hasn't fired is taken for dead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Transcoder(x.shape[1], target.shape[1], features).to(x.device)
        made.centre(x, target)
        optimiser = torch.optim.Adam(made.parameters(), lr=lr)
        quiet = torch.zeros(features, dtype=torch.int64, device=x.device)
        history = []
        for step in range(steps):
            rows = torch.randint(len(x), (min(batch, len(x)),)).to(x.device)
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup))
            losses = made.loss(x[rows], target[rows], l1, quiet > silent)
            optimiser.zero_grad()
            losses.total.backward()
            made.drop_parallel_gradient()
            optimiser.step()
            made.unit_rows()
            if step % max(1, steps // 50) == 0 or step == steps - 1:
                history.append({"step": step + 1, **{k: v.item() for k, v in losses._asdict().items()}})
            with torch.no_grad():
                fired = (made.encode(x[rows[:256]]) > 0).any(0)
            quiet = torch.where(fired, 0, quiet + 1)
    return made.eval(), history

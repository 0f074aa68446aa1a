"""DrugGEN (Unlu et al., Nature Machine Intelligence 2025, arXiv 2302.07868).

A GAN over molecular graphs whose generator gets no noise but real molecules, and rewrites them until a critic that knows a target's
inhibitors takes them for such. Both networks are graph transformers whose attention works on every pair of atoms, channel by channel:
s_ij = q_i * k_j / sqrt(d) * (e_ij + 1) * e_ij; softmax over j weighs the values, and a projection of s_ij is what the bonds get.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Stage, Turn
from formarium.nn.drop import Dropout
from formarium.tasks.molecule_generation.model import CHEMBL_ATOMS, CHEMBL_BONDS, MoleculeGenerator

ACTIVATIONS = {"relu": nn.ReLU, "leaky": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
PARTS, CRITICS = ("gan", "generator", "discriminator"), ("graph", "mlp")


class PairAttention(nn.Module):
    """Channel-wise attention over all pairs. x: float [batch, n, dim]; e: float [batch, n, n, dim].

    Returns what nodes get [batch, n, dim] and what edges get [batch, n, n, dim] (None where not `edges`).
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale = (dim // heads) ** -0.5  # all that heads decide: the softmax is per channel
        self.qkv = nn.Linear(dim, 3 * dim)
        self.edge = nn.Linear(dim, dim)
        self.out_nodes, self.out_edges = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, e: Tensor, edges: bool = True) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).chunk(3, -1)
        e = self.edge(e)
        scores = (q * self.scale)[:, :, None] * k[:, None] * (e + 1) * e  # b i j c
        mixed = (scores.softmax(2) * v[:, None]).sum(2)
        return self.out_nodes(mixed), self.out_edges(scores) if edges else None


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), Dropout(dropout))


class Block(nn.Module):
    """Attention and feed-forward, added and normalised, for nodes and edges. The nodes' residual starts from their normalised input, the
    edges' from the raw one. The critic's last block feeds no edges on, and leaves them out."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, dropout: float):
        super().__init__()
        self.norm_in = nn.LayerNorm(dim)
        self.attention = PairAttention(dim, heads)
        self.norm_nodes1, self.norm_edges1 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp_nodes, self.mlp_edges = (FeedForward(dim, dim * mlp_ratio, dropout) for _ in range(2))
        self.norm_nodes2, self.norm_edges2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, e: Tensor, edges: bool = True) -> tuple[Tensor, Tensor]:
        x = self.norm_in(x)
        dx, de = self.attention(x, e, edges)
        x = self.norm_nodes1(x + dx)
        x = self.norm_nodes2(x + self.mlp_nodes(x))
        if de is not None:
            e = self.norm_edges1(e + de)
            e = self.norm_edges2(e + self.mlp_edges(e))
        return x, e


def embedding(features: int, dim: int, act: type[nn.Module], dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 64), act(), nn.Linear(64, dim), act(), Dropout(dropout))


class Encoder(nn.Module):
    """What generator and critic have in common: embeddings of atoms and bonds (the bonds' made symmetric), then blocks."""

    def __init__(self, c: DrugGEN.Config, depth: int, dropout: float):
        super().__init__()
        act = ACTIVATIONS[c.act]
        self.embed_nodes = embedding(len(c.atoms), c.dim, act, dropout)
        self.embed_edges = embedding(len(c.bonds), c.dim, act, dropout)
        self.blocks = nn.ModuleList([Block(c.dim, c.heads, c.mlp_ratio, dropout) for _ in range(depth)])

    def embed(self, bonds: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        e = self.embed_edges(bonds)
        return self.embed_nodes(atoms), (e + e.transpose(1, 2)) / 2


class Generator(Encoder):
    """bonds: float [batch, n, n, bond types], atoms: float [batch, n, atom types], one-hot. Returns node states [batch, n, dim], edge
    states [batch, n, n, dim], atom logits, bond logits."""

    def __init__(self, c: DrugGEN.Config):
        super().__init__(c, c.depth, c.dropout)
        self.to_atoms, self.to_bonds = nn.Linear(c.dim, len(c.atoms)), nn.Linear(c.dim, len(c.bonds))
        self.tokens, self.features = Tap(), Tap()
        for block in self.blocks:
            block.tap = Tap()

    def forward(self, bonds: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, e = self.embed(bonds, atoms)
        x = self.tokens(x)
        for block in self.blocks:
            x, e = block(x, e)
            x = block.tap(x)
        x = self.features(x)
        return x, e, self.to_atoms(x), self.to_bonds(e)


class Critic(Encoder):
    """The same encoder, and a score [batch, 1] of the atoms' states laid end to end (so that it is not blind to their order)."""

    def __init__(self, c: DrugGEN.Config):
        super().__init__(c, c.critic_depth, c.critic_dropout)
        self.score = score_layers((c.max_atoms * c.dim, 64, 32, 16, 1), ACTIVATIONS[c.act])

    def forward(self, bonds: Tensor, atoms: Tensor) -> Tensor:
        x, e = self.embed(bonds, atoms)
        for i, block in enumerate(self.blocks):
            x, e = block(x, e, edges=i + 1 < len(self.blocks))
        return self.score(x.flatten(1))


class PlainCritic(nn.Module):
    """The critic of the model without a target: an MLP over the flattened graph, atoms first. Returns [batch, 1]."""

    def __init__(self, c: DrugGEN.Config):
        super().__init__()
        features = c.max_atoms * len(c.atoms) + c.max_atoms**2 * len(c.bonds)
        self.score = score_layers((features, 256, 128, 64, 32, 16, 1), ACTIVATIONS[c.act])

    def forward(self, bonds: Tensor, atoms: Tensor) -> Tensor:
        return self.score(torch.cat([atoms.flatten(1), bonds.flatten(1)], 1))


def score_layers(sizes: Sequence[int], act: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


class DrugGEN(MoleculeGenerator):
    @dataclass(frozen=True)
    class Config:
        atoms: tuple[int, ...] = CHEMBL_ATOMS  # atomic numbers; 0 is padding
        bonds: tuple[str, ...] = CHEMBL_BONDS  # RDKit's names of bond types; ZERO is no bond. Without AROMATIC, molecules are kekulised
        max_atoms: int = 45
        act: str = "relu"  # of the embeddings and the scores: relu, leaky, sigmoid, tanh
        dim: int = 128
        depth: int = 1
        heads: int = 8
        mlp_ratio: int = 3
        dropout: float = 0.0
        critic: str = "graph"  # or "mlp"
        critic_depth: int = 1
        critic_dropout: float = 0.0
        target: bool = True  # what the critic knows: the target's molecules, or (False) the generator's own input
        gradient_penalty: float = 10.0
        copying: float = 0.0  # share of the steps in which the generator first learns to give back its input; not in the paper
        corrupted: float = 0.0  # share of the atoms that copying finds as another element and must restore; not in the paper
        anchor: float = 0.0  # weight of copying's loss in the generator's turn; not in the paper
        soft: bool = False  # the critic sees probabilities of what was made, rather than logits as in the released code
        gan_lr: tuple[float, float] = (0.0, 0.0)  # of critic and generator, at first; 0: the recipe's, as in the paper
        part: str = "gan"  # or one network alone: "generator", "discriminator"

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        for name, value, known in (("act", c.act, ACTIVATIONS), ("part", c.part, PARTS), ("critic", c.critic, CRITICS)):
            if value not in known:
                raise BadInput(name, expected=" or ".join(known), got=repr(value))
        if c.dim % c.heads:
            raise BadInput("dim", expected=f"a multiple of the {c.heads} heads", got=str(c.dim))
        for name in ("copying", "corrupted"):
            if not 0 <= getattr(c, name) < 1:
                raise BadInput(name, expected="a share from 0 to below 1", got=str(getattr(c, name)))
        if c.part != "discriminator":
            self.generator = Generator(c)
        if c.part != "generator":
            self.discriminator = Critic(c) if c.critic == "graph" else PlainCritic(c)

    def forward(self, bonds: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | Tensor:
        """One-hot molecules, bonds [batch, n, n, bond types] and atoms [batch, n, atom types], to node states, edge states, atom logits and
        bond logits; the discriminator alone gives scores [batch, 1]."""
        if self.config.part == "discriminator":
            return self.discriminator(bonds, atoms)
        return self.generator(bonds, atoms)

    # objective --------------------------------------------------------------------------------------------------------

    def training_stages(self) -> tuple[Stage, ...]:
        """The critic's turn, then the generator's, on each batch; where `copying` asks for it, the generator copies first."""
        self._must_be_whole()
        share, rates = self.config.copying, self.config.gan_lr
        slow = [{"lr": rate} if rate else {} for rate in rates]
        turns = (Turn("critic_loss", ("discriminator.*",), recipe=slow[0]), Turn("generator_loss", ("generator.*",), recipe=slow[1]))
        first = (Stage("copying", (Turn("copying_loss", ("generator.*",)),), share=share),) if share else ()
        return (*first, Stage("adversarial", turns, share=1 - share))

    def critic_loss(self, batch: Batch) -> Losses:
        """mean D(made) - mean D(real) + lambda (|gradient| - 1)^2 between them."""
        self._must_be_whole()
        real = self.real(batch)
        with torch.no_grad():
            made = self.made(batch)
        distance = self.discriminator(*real).mean() - self.discriminator(*made).mean()
        penalty = self.penalty(real, made)
        return Losses(self.config.gradient_penalty * penalty - distance, {"distance": distance, "gradient_penalty": penalty})

    def penalty(self, real: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor]) -> Tensor:
        """(norm of the critic's gradient, bonds and atoms together, - 1)^2, at points between real and made; bonds and atoms are mixed by
        numbers of their own."""
        mixed = []
        for a, b in zip(real, made, strict=True):
            share = torch.rand(len(a), *(1,) * (a.ndim - 1), device=a.device)
            mixed.append((share * a + (1 - share) * b).detach().requires_grad_())
        with torch.enable_grad():
            slopes = torch.autograd.grad(self.discriminator(*mixed).sum(), mixed, create_graph=True)
        norm = torch.cat([s.flatten(1) for s in slopes], 1).float().norm(dim=1)
        return ((norm - 1) ** 2).mean()

    def generator_loss(self, batch: Batch) -> Losses:
        """- mean D(made) + anchor * copying"""
        self._must_be_whole()
        loss = -self.discriminator(*self.made(batch)).mean()
        if not self.config.anchor:
            return Losses(loss, {"adversarial": loss})
        copying = self.copying_loss(batch).total
        return Losses(loss + self.config.anchor * copying, {"adversarial": loss, "copying": copying})

    def copying_loss(self, batch: Batch) -> Losses:
        """Cross entropy of the molecule's own atoms and bonds, where some of its atoms come in as other elements."""
        _, _, atoms, bonds = self.generator(*self.one_hot(batch["bonds"], self.corrupt(batch["atoms"])))
        of_atoms = F.cross_entropy(atoms.flatten(0, -2).float(), batch["atoms"].flatten())
        of_bonds = F.cross_entropy(bonds.flatten(0, -2).float(), batch["bonds"].flatten())
        return Losses(of_atoms + of_bonds, {"atoms": of_atoms, "bonds": of_bonds})

    def corrupt(self, atoms: Tensor) -> Tensor:
        """atoms: int64 [batch, n]. Each but padding is replaced with probability `corrupted`, by an element at random. What stands where
        says so to an atom's neighbours, so that restoring it teaches what may stand there."""
        hit = (torch.rand(atoms.shape, device=atoms.device) < self.config.corrupted) & (atoms > 0)
        return torch.where(hit, torch.randint_like(atoms, 1, len(self.config.atoms)), atoms)

    def loss(self, batch: Batch) -> Losses:
        """Both turns' losses, added."""
        critic, generator = self.critic_loss(batch), self.generator_loss(batch)
        return Losses(critic.total + generator.total, {**critic.terms, **generator.terms})

    def made(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the generator shows the critic: (bonds, atoms)."""
        _, _, atoms, bonds = self.generator(*self.inputs_of(batch))
        return (bonds.float().softmax(-1), atoms.float().softmax(-1)) if self.config.soft else (bonds.float(), atoms.float())

    def real(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the critic is to take for real: the target's molecules, or the input."""
        if not self.config.target:
            return self.inputs_of(batch)
        if "target_atoms" not in batch:
            raise BadInput("training data", expected="molecules of a target (target.smi)", got="none", fix="or train with target=False")
        return self.one_hot(batch["target_bonds"], batch["target_atoms"])

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.config.part == "discriminator":
            raise BadInput("part", expected="a generator", got="a discriminator alone", fix="part='gan'")
        _, _, atoms, bonds = self(*self.inputs_of(batch))
        return atoms, bonds

    def _must_be_whole(self) -> None:
        if self.config.part != "gan":
            raise BadInput("training", expected="both networks", got=f"part={self.config.part!r}", fix="part='gan'")

from pathlib import Path

import pytest
import torch

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.science.druggen import PairAttention
from formarium.task import task

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "druggen").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def micro(**config):
    torch.manual_seed(0)
    return create("druggen_micro", **config).eval()


def test_claim_relabelling_the_atoms_relabels_the_output():
    model = micro()
    bonds, atoms = model.example(2)
    order = torch.randperm(atoms.shape[1])
    with torch.no_grad():
        _, _, a, b = model(bonds, atoms)
        _, _, a2, b2 = model(bonds[:, order][:, :, order], atoms[:, order])
        assert not torch.allclose(
            *(model.discriminator(x, y) for x, y in ((bonds, atoms), (bonds[:, order][:, :, order], atoms[:, order])))
        )
    torch.testing.assert_close(a2, a[:, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(b2, b[:, order][:, :, order], atol=1e-5, rtol=1e-4)


def test_claim_the_output_depends_on_the_molecules_it_starts_from():
    model = micro()
    with torch.no_grad():
        first, second = (model(*model.inputs_of(model.example_batch(2, seed=s)))[2] for s in (0, 1))
    assert (first - second).abs().max() > 0.01


def test_bonds_are_symmetric_before_the_blocks():
    model = micro()
    bonds, atoms = model.example(1)
    lopsided = bonds + torch.randn_like(bonds)
    _, e = model.generator.embed(lopsided, atoms)
    torch.testing.assert_close(e, e.transpose(1, 2))


def test_attention_is_the_formula():
    layer = PairAttention(8, 2)
    x, e = torch.randn(1, 3, 8), torch.randn(1, 3, 3, 8)
    q, k, v = layer.qkv(x).chunk(3, -1)
    links = layer.edge(e)
    nodes, edges = layer(x, e)
    scores = torch.stack([torch.stack([q[0, i] * k[0, j] / 2 * (links[0, i, j] + 1) * links[0, i, j] for j in range(3)]) for i in range(3)])
    mixed = torch.stack([sum(scores[i].softmax(0)[j] * v[0, j] for j in range(3)) for i in range(3)])
    torch.testing.assert_close(nodes[0], layer.out_nodes(mixed), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(edges[0], layer.out_edges(scores), atol=1e-5, rtol=1e-4)


class Linear(torch.nn.Module):
    """A critic whose gradient is the same everywhere, of the given length."""

    def __init__(self, size, length):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((size,), length * size**-0.5))

    def forward(self, bonds, atoms):
        return torch.cat([bonds.flatten(1), atoms.flatten(1)], 1) @ self.weight[:, None]


@pytest.mark.parametrize(("length", "penalty"), [(1.0, 0.0), (3.0, 4.0)])
def test_the_gradient_penalty(length, penalty):
    model = micro()
    real, made = (model.inputs_of(model.example_batch(3, seed=s)) for s in (0, 1))
    model.discriminator = Linear(10 * 10 * 4 + 10 * 8, length)
    assert model.penalty(real, made).item() == pytest.approx(penalty, abs=1e-4)


def test_the_turns_move_one_network_each():
    model = create("druggen_micro")
    copying, adversarial = model.training_stages()
    assert [t.loss for t in adversarial.turns] == ["critic_loss", "generator_loss"] and copying.share == 0.4
    assert len(create("druggen_akt1").training_stages()) == 1  # as published
    batch = model.example_batch(2)
    model.critic_loss(batch).total.backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert any(p.grad is not None for p in model.discriminator.parameters())
    model.generator_loss(batch).total.backward()
    assert all(p.grad is not None for p in model.generator.parameters())


def test_the_critic_sees_the_target_or_the_input():
    batch = micro().example_batch(2)
    assert torch.equal(micro().real(batch)[1].argmax(-1), batch["target_atoms"])
    assert torch.equal(micro(target=False).real(batch)[1].argmax(-1), batch["atoms"])
    without = {k: v for k, v in batch.items() if not k.startswith("target")}
    micro(target=False, critic="mlp").critic_loss(without)
    with pytest.raises(BadInput, match="target"):
        micro().critic_loss(without)


def test_one_network_alone():
    whole, generator = micro(), micro(part="generator")
    theirs = authors_of("druggen").export_state(whole)
    load_state(generator, {k[2:]: v for k, v in theirs.items() if k.startswith("G.")})
    inputs = whole.example(1)
    torch.testing.assert_close(generator(*inputs)[3], whole(*inputs)[3])
    critic = micro(part="discriminator", critic="mlp")
    assert critic(*inputs).shape == (1, 1)
    with pytest.raises(BadInput, match="part"):
        critic.predict(critic.example_batch(1))
    with pytest.raises(BadInput, match="part"):
        generator.training_stages()


def test_predictions_are_what_rdkit_accepts():
    from rdkit import Chem

    model = micro()
    said = model.predict(model.example_batch(8))
    assert len(said.smiles) == 8
    for smiles, repaired, valid in zip(said.smiles, said.repaired, said.valid.tolist(), strict=True):
        assert valid == (smiles != "") and (not smiles or Chem.MolFromSmiles(smiles) is not None)
        assert not repaired or Chem.MolFromSmiles(repaired) is not None


def test_options():
    for act in ("leaky", "sigmoid", "tanh"):
        assert torch.isfinite(micro(act=act)(*micro().example(1))[2]).all()
    for bad in ({"act": "gelu"}, {"heads": 5}, {"copying": 1.0}, {"corrupted": -0.1}, {"part": "both"}, {"atoms": (6, 7)}):
        with pytest.raises(BadInput):
            micro(**bad)


def test_the_critic_sees_logits_or_probabilities():
    batch = micro().example_batch(2)
    bonds, atoms = micro().made(batch)
    torch.testing.assert_close(atoms.sum(-1), torch.ones(2, 10))
    torch.testing.assert_close(bonds.sum(-1), torch.ones(2, 10, 10))
    _, _, logits, _ = micro(soft=False)(*micro().inputs_of(batch))
    torch.testing.assert_close(micro(soft=False).made(batch)[1], logits)
    assert not create("druggen_akt1").config.soft  # as released


def test_copying_restores_what_stands_in_for_another_element():
    model = micro(corrupted=0.5)
    atoms = model.example_batch(64)["atoms"]
    stood_in = model.corrupt(atoms)
    assert (stood_in[atoms == 0] == 0).all() and (stood_in[atoms > 0] > 0).all()  # padding stays, and nothing becomes it
    share = (stood_in != atoms)[atoms > 0].float().mean().item()
    assert 0.3 < share < 0.5  # a half, less those that drew their own
    assert torch.equal(micro(corrupted=0.0).corrupt(atoms), atoms)


def test_the_anchor_is_copying_in_the_generators_turn():
    batch = micro().example_batch(2)
    still = {"corrupted": 0.0}
    bare, anchored = micro(anchor=0.0, **still).generator_loss(batch), micro(anchor=2.0, **still).generator_loss(batch)
    torch.testing.assert_close(anchored.total, bare.total + 2 * micro(**still).copying_loss(batch).total)
    assert set(bare.terms) == {"adversarial"} and set(anchored.terms) == {"adversarial", "copying"}
    published = create("druggen_akt1").config  # as released
    assert published.anchor == published.corrupted == published.copying == 0


def test_rates_of_the_turns():
    assert [t.recipe for t in create("druggen_akt1").training_stages()[0].turns] == [{}, {}]
    assert [t.recipe["lr"] for t in micro().training_stages()[1].turns] == [1e-3, 5e-4]


@pytest.mark.slow
def test_it_learns_to_copy():
    torch.manual_seed(0)
    data = task("molecule-generation").sample("fluorides")
    model = create("druggen_micro", copying=0.95, corrupted=0.0)
    before = formarium.evaluate(model, data).metrics["validity"]
    run = formarium.fit(model, data, progress=False, steps=220, validations=1)
    assert before < 0.5 < formarium.evaluate(run, data).metrics["validity"]


@pytest.mark.slow
def test_what_it_makes_moves_towards_the_target_and_without_a_target_does_not():
    """Held-out molecules, by the demo's recipe; beside the inputs given back, and beside a critic that knows the inputs alone."""
    own = task("molecule-generation")
    data, card = own.sample("fluorides"), formarium.card("druggen")
    found = formarium.evaluate(formarium.fit("druggen_micro", data, progress=False, validations=1), data).metrics
    share = found["motif"] * found["validity"]  # of all that was made
    assert share > found["motif_source"] + 0.15 and found["validity"] > 0.4
    assert found["snn_target"] > found["snn_target_source"] + 0.05 and found["nearer_target"] > 0.3
    assert found["on_target"] > own.baseline(data)[1]["on_target"] + card.demo["margin"]
    torch.manual_seed(0)
    model = create("druggen_micro", **data.model_args, target=False)
    control = formarium.evaluate(formarium.fit(model, data, progress=False, validations=1), data).metrics
    assert control["motif"] * control["validity"] < share / 2
    assert control["snn_target"] < found["snn_target"] - 0.05

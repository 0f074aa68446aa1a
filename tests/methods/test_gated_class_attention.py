from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.catalogue import card
from formarium.engine.recipes import Recipe
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.methods.gated_class_attention import (
    Continual,
    GatedClassAttention,
    GatedContinual,
    Projector,
    annealed,
    fine_tuned,
    gate,
    gradient_factor,
    protected,
    report,
    sparsity,
    summary,
)
from formarium.methods.sampling import labels_of, of_classes
from formarium.task import task

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "gated_class_attention").glob("*.safetensors"))
BACKBONES = card("gated_class_attention").demo["backbones"]


def small(seen: int = 1, **options) -> Continual:
    torch.manual_seed(0)
    return create("gated_class_attention_micro", seen=seen, **options)


def batch_of(model: Continual, samples: int = 24) -> dict:
    batch = model.example_batch(samples)
    return {**batch, "label": torch.arange(samples) % model.config.num_classes}


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(
    ("name", "seen", "count"),
    [
        ("cifar_10splits", 1, 10707766),
        ("cifar_10splits", 3, 11407434),
        ("cifar_5splits", 1, 10702016),
        ("tinyimagenet_10splits", 2, 11120596),
        ("imagenet100_10splits", 1, 11034934),
    ],
)
def test_parameter_counts(name, seen, count):
    with torch.device("meta"):
        assert create(f"gated_class_attention_{name}", seen=seen).parameters_count == count


def test_the_folded_attention_is_the_plain_gated_one():
    torch.manual_seed(0)
    block = GatedClassAttention(12, 3).eval()
    for p in block.parameters():
        p.data.normal_(std=0.5)
    token, x, a, h = torch.randn(2, 12), torch.randn(2, 5, 12), torch.rand(12), torch.rand(48)
    n = block.norm1(torch.cat([token[:, None], x], 1))
    q = (block.q(n[:, 0] * a) * a).view(2, 3, 1, 4)
    k, v = (block.k(n * a) * a).view(2, 6, 3, 4).transpose(1, 2), block.v(n * a).view(2, 6, 3, 4).transpose(1, 2)
    z = ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 12)
    c = token + block.out(z * a) * a
    wanted = c + block.fc2(F.gelu(block.fc1(block.norm2(c) * a)) * h) * a
    torch.testing.assert_close(block(token, block.norm1(x), a, h), wanted, rtol=1e-4, atol=1e-5)


def test_claim_what_earlier_gates_have_opened_stays_bit_by_bit():
    model = small(3).train()
    model.current.fill_(-1)
    model.begin_task()
    model.begin_task()
    m0, m2 = model.used0.bool(), model.used2.bool()
    assert 0 < m0.sum() < len(m0) and torch.equal(m0, model.gates0[0] > 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, model.count, model.dim)
    with torch.no_grad():
        token = model.read(x, 800.0)[0][0]
        assert torch.equal(token, model.read(x, 800.0)[0][0])
    free = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW([*free.values()], lr=1e-2, weight_decay=0.0)
    batch = batch_of(model)
    for step in range(3):
        optimiser.zero_grad()
        model.loss(batch).total.backward()
        optimiser.step()
        model.after_step(step + 1, 3)
    block = model.attention[0]
    for layer, rows, columns in [("q", m0, m0), ("k", m0, m0), ("v", m0, m0), ("out", m0, m0), ("fc1", m2, m0), ("fc2", m0, m2)]:
        now, then = getattr(block, layer).weight, before[f"attention.0.{layer}.weight"]
        held = torch.outer(rows, columns)
        assert torch.equal(now[held], then[held]) and not torch.equal(now[~held], then[~held]), layer
        if layer in ("out", "fc1", "fc2"):
            assert torch.equal(getattr(block, layer).bias[rows], before[f"attention.0.{layer}.bias"][rows])
    with torch.no_grad():  # the first task's token, on fixed features (mapped by no projector)
        assert torch.equal(model.read(x, 800.0, project=False)[0][0], token_of(model, before, x))
    fixed = [k for k in before if k.startswith(("class_tokens.0", "classifiers.0", "norms.0", "attention.0.norm")) or "blocks.0.norm" in k]
    assert fixed and all(torch.equal(before[k], model.state_dict()[k]) for k in fixed)


@torch.no_grad()
def token_of(model: Continual, state: dict, x: torch.Tensor) -> torch.Tensor:
    now = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    token = model.read(x, 800.0, project=False)[0][0]
    model.load_state_dict(now)
    return token


def test_without_protection_they_move():
    model = small(2, protect=False).train()
    model.current.fill_(-1)
    model.begin_task()
    model.begin_task()
    model.loss(batch_of(model)).total.backward()
    held = torch.outer(model.used0, model.used0).bool()
    assert model.attention[0].out.weight.grad[held].abs().sum() > 0
    w = torch.randn(3, 2, requires_grad=True)
    protected(w, torch.tensor([1.0, 0, 1]), torch.tensor([0.0, 1])).sum().backward()
    assert torch.equal(w.grad, torch.tensor([[1.0, 0], [1, 1], [1, 0]]))


@torch.no_grad()
def test_claim_task_c_of_t_goes_through_t_minus_1_minus_c_projectors():
    model = small(4).eval()
    ran = []
    for i, projector in enumerate(model.projectors):
        projector.register_forward_hook(lambda m, a, o, i=i: ran.append(i))
    x = torch.randn(1, model.count, model.dim)
    for c in range(4):
        ran.clear()
        mapped = model.cascade(x, c)
        assert ran == [*range(2, c - 1, -1)]  # newest first, down to the one learned right after task c
    assert torch.equal(model.cascade(x, 3), x)
    ran.clear()
    tokens, _ = model.read(x, 800.0, project=True)
    assert ran == [2, 1, 0]  # each once for all tasks
    a, h = model.gate_pair(1, 800.0)
    wanted = model.attention[0](model.class_tokens[1][:, 0], model.attention[0].norm1(model.cascade(x, 1)), a, h)
    torch.testing.assert_close(tokens[1], wanted)
    assert mapped.shape == x.shape


@torch.no_grad()
def test_claim_gates_end_binary_and_old_ones_are_so_at_any_s():
    model = small(2).eval()
    model.gates0.copy_(model.gates0.sign() * model.gates0.abs().clamp(min=0.05))
    full = gate(model.gates0[1], 800.0)
    assert ((full < 1e-6) | (full > 1 - 1e-6)).all()
    old, new = model.gate_pair(0, 0.1)[0], model.gate_pair(1, 0.1)[0]
    assert ((old == 0) | (old == 1)).all() and ((new > 0) & (new < 1)).all()
    assert annealed(0, 10, 800) == pytest.approx(1 / 800) and annealed(10, 10, 800) == 800


def test_claim_no_drift_costs_nothing():
    model = small(2, memory=True).train()
    model.current.fill_(-1)
    model.begin_task()
    model.begin_task()
    model.projectors[0] = torch.nn.Identity()
    assert model.loss(batch_of(model)).terms["drift"].item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        model.trunk.embed.weight.mul_(1.5)
    drift = model.loss(batch_of(model)).terms["drift"]
    assert drift > 0.1
    drift.backward()
    assert model.trunk.embed.weight.grad.abs().sum() > 0  # it reaches the backbone
    assert "last_embed/weight" in model.state_dict() and sum("last_" in n for n, _ in model.named_parameters()) == 0


def test_a_projector_can_start_as_the_identity():
    torch.manual_seed(0)
    mixing = torch.randn(12, 12)
    x, more = (torch.randn(64, 9, 12) @ mixing + torch.randn(12) for _ in range(2))
    more = more - more.mean((0, 1)) + x.mean((0, 1))
    drawn = Projector(12, 9)

    def lost() -> float:
        return float(((drawn(more).detach() - more) ** 2).sum() / ((more - more.mean((0, 1))) ** 2).sum())

    assert lost() > 0.5
    drawn.start_at(x)
    assert lost() < 0.1


def test_after_the_first_task_the_backbones_norms_rest():
    model = GatedContinual(first_task=4, increment=3).apply(create("efficientvit_micro")).train()
    model.reconfigure(seen=3)
    model._grow()
    norms = [m for m in model.trunk.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    model.current.fill_(-1)
    model.begin_task()
    assert norms and all(m.training and m.weight.requires_grad for m in norms)
    model.begin_task()
    model.train()
    before = [m.running_mean.clone() for m in norms]
    model.loss(batch_of(model))
    assert all(not m.weight.requires_grad and torch.equal(m.running_mean, b) for m, b in zip(norms, before, strict=True))


def test_a_longer_first_task_and_gates_near_the_middle():
    model = small(3, first_share=2.0, gate_std=0.1, later_lr=1e-3)
    assert [s.share for s in model.training_stages()] == [2.0, 1.0, 1.0]
    assert [s.turns[0].recipe.get("lr") for s in model.training_stages()] == [None, 1e-3, 1e-3]
    assert model.gates0.std().item() == pytest.approx(0.1, rel=0.3) and small(gate_std=1.0).gates0.std().item() == pytest.approx(
        1.0, rel=0.3
    )


def test_the_terms_of_the_loss_and_the_gradient_of_the_gates():
    model = small(2, gate_weight=0.5).train()
    model.current.fill_(-1)
    model.begin_task()
    batch = batch_of(model, 20)
    losses = model.loss(batch)
    s = 1 / 800
    out = model.answer(model.normalise(batch["image"][batch["label"] < 2]), s, project=False)
    own = F.binary_cross_entropy_with_logits(out.logits, F.one_hot(batch["label"][batch["label"] < 2], 2).float())
    torch.testing.assert_close(losses.total, own + 0.5 * torch.cat([out.gate, out.hidden_gate]).mean())
    (plain,) = torch.autograd.grad(own + 0.5 * sparsity((out.gate, out.hidden_gate), None), model.gates0)
    (scaled,) = torch.autograd.grad(losses.total, model.gates0)
    torch.testing.assert_close(scaled[0], plain[0] * gradient_factor(model.gates0[0].detach(), s, 800), rtol=1e-3, atol=1e-6)
    assert scaled[1:].abs().max() == 0
    used = [torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1])]
    assert float(sparsity([torch.tensor([0.9, 0.2, 0.4]), torch.tensor([0.6, 0.8])], used)) == pytest.approx((0.2 + 0.4 + 0.6) / 3)
    others = {**batch, "label": batch["label"] * 0 + 9}  # none of this task: nothing is looked at
    assert model.loss(others).total.item() == 0
    with torch.no_grad():
        model.gates0.fill_(9.0)
    model.after_step(1, 2)
    assert model.gates0.max() == 6 and int(model.steps) == 1


@pytest.mark.parametrize("name", BACKBONES)
def test_it_goes_on_models_of_the_catalogue(name):
    torch.manual_seed(0)
    trunk = create(name).eval()
    model = GatedContinual(first_task=4, increment=3).apply(trunk)
    assert model.sizes == [4, 3, 3] and model.config.seen == 1 and model.config.num_tasks == 3
    model.reconfigure(seen=3, memory=True)
    model._grow()
    model.current.fill_(-1)
    model.train()
    for _ in range(2):
        model.begin_task()
        losses = model.loss(batch_of(model))
        losses.total.backward()
    assert torch.isfinite(losses.total) and "drift" in losses.terms
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trunk.parameters())
    with torch.no_grad():
        said = model.eval().predict(model.example_batch(3))
    assert said.probabilities.shape == (3, 10) and (said.probabilities[:, 7:] == 0).all()
    torch.testing.assert_close(said.probabilities.sum(1), torch.ones(3))


@torch.no_grad()
def test_the_order_of_learning():
    model = small(2, order=(9, 8, 7, 6, 5, 4, 3, 2, 1, 0)).eval()
    assert model.classes(0) == [9, 8] and model.classes(1) == [7, 6]
    batch = model.example_batch(3)
    logits, said = model.forward_batch(batch), model.predict(batch)
    assert logits.shape == (3, 4)
    torch.testing.assert_close(said.probabilities[:, [9, 8, 7, 6]], logits.softmax(1))


def test_the_figures_of_forgetting():
    history = [[1.0, -1, -1], [0.6, 0.8, -1], [0.5, 0.9, 0.7]]
    said = summary(history, [[1.0, 1, 1]] * 3, [2, 2, 4])
    assert said["average_incremental"] == pytest.approx((1.0 + 0.7 + (0.5 * 2 + 0.9 * 2 + 0.7 * 4) / 8) / 3)
    assert said["last"] == pytest.approx(0.7) and said["task_aware"] == 1 and said["forgetting"] == pytest.approx((0.5 + 0.0) / 2)


def test_a_fit_goes_through_the_tasks_and_is_saved_whole(tmp_path):
    data = task("image-classification").sample("digits")
    data = replace(data, splits={"train": data.splits["train"], "val": of_classes(data.splits["val"], range(10))})
    data.splits["val"].indices[:] = data.splits["val"].indices[:80]
    model = small()
    assert [s.name for s in model.training_stages()] == ["task 1"]
    run = formarium.fit(model, data, tmp_path / "run", recipe=Recipe(steps=10, batch_size=64), progress=False, validations=1)
    assert int(run.model.current) == 4 and run.model.config.seen == 5 and len(run.model.training_stages()) == 5
    said = report(run.model, data)
    assert {*said} == {"average_incremental", "last", "task_aware", "forgetting"} and (run.model.history.tril() >= 0).all()
    again = formarium.load(tmp_path / "run")
    x = again.example(2)[0]
    with torch.no_grad():
        assert torch.equal(again(x), run.model.eval()(x)) and again(x).shape == (2, 10)
    assert sorted({*labels_of(of_classes(data.splits["train"], [3, 5]))}) == [3, 5]


def test_the_rival_learns_the_tasks_in_turn():
    data = task("image-classification").sample("digits")
    data = replace(data, splits={k: of_classes(v, range(4)) for k, v in data.splits.items()})
    for part in data.splits.values():
        part.indices[:] = part.indices[:48]
    said = fine_tuned(formarium.fit, create("smt_micro"), data, [[0, 1], [2, 3]], recipe=Recipe(steps=2, batch_size=8))
    assert {*said} == {"average_incremental", "last", "task_aware", "forgetting"} and 0 <= said["last"] <= said["task_aware"] <= 1


@pytest.mark.parametrize("seen", [1, 3])
def test_the_authors_names_round_trip(seen):
    model, other = small(seen), small(seen)
    theirs = authors_of("gated_class_attention").export_state(model)
    assert {"embs_0.weight", "sabs.1.attn.gating_param", "tabs.0.mlp.fc1.weight", "class_tokens.0", "head.0.norm.weight"} <= {*theirs}
    if seen > 1:
        assert theirs["projectors.0.0.weight"].shape == (48, 48, 1, 1) and theirs["projectors.1.1.bias"].shape == (48, 1, 16)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_bad_input():
    with pytest.raises(BadInput, match="num_tasks"):
        small(num_tasks=3)
    with pytest.raises(BadInput, match="seen"):
        small(9)
    with pytest.raises(BadInput, match="order"):
        small(order=(1, 2))
    with pytest.raises(BadInput, match="heads"):
        small(heads=5)
    with pytest.raises(BadInput, match="image size"):
        small()(torch.randn(1, 3, 64, 64))
    with pytest.raises(BadInput, match="tasks"):
        model = small()
        model.begin_task()
    with pytest.raises(BadInput, match="measured"):
        report(small(2), task("image-classification").sample("digits"))
    with pytest.raises(UnknownName, match="option"):
        GatedContinual(seen=3)
    with pytest.raises(BadInput, match="already"):
        GatedContinual().apply(small())


@pytest.mark.slow
def test_it_keeps_its_first_task():
    data = task("image-classification").sample("digits")
    recipe = Recipe(steps=440, lr=3e-3, batch_size=128, warmup_epochs=1, weight_decay=1e-6, augment={"shift": 1})
    model = small(first_task=4, increment=3, num_tasks=3)
    run = formarium.fit(model, data, recipe=recipe, progress=False, seed=0, validations=1)
    said = report(run.model, data)
    assert run.model.history[2, 0] > 0.6 and said["forgetting"] < 0.25  # fine-tuning forgets all of it
    assert said["last"] > 0.33  # one that knows its last three classes only has 0.3
    assert said["task_aware"] > 0.7

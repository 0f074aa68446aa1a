from pathlib import Path

import numpy as np
import pytest
import torch

import formarium
from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.graph.graph_transformer import Graph, NeighbourAttention
from formarium.nn.ops.graph import neighbour_attention, scatter_max, scatter_softmax, scatter_sum
from formarium.tasks.graph_prediction.model import class_weights

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "graph_transformer").glob("*.safetensors"))
PATH = np.array([(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)])


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def micro(**config):
    torch.manual_seed(0)
    return create("graph_transformer_micro", **config).eval()


@pytest.mark.parametrize("level", ["graph", "node"])
@pytest.mark.parametrize("edges", ["types", "ones", "none"])
def test_claim_the_order_of_nodes_does_not_matter(level, edges):
    model = micro(level=level, edges=edges, full_graph=False)
    nodes, links, kinds, vectors = model.example(1)
    order = torch.randperm(nodes.shape[1])
    moved = torch.where(links < 0, links, order.argsort()[links.clamp_min(0)])
    shuffle = torch.randperm(links.shape[1])
    with torch.no_grad():
        before = model(nodes, links, kinds, vectors)
        after = model(nodes[:, order], moved[:, shuffle], kinds[:, shuffle], vectors[:, order])
    torch.testing.assert_close(after, before[:, order] if level == "node" else before, atol=1e-5, rtol=1e-4)


def test_claim_a_layer_looks_at_in_neighbours_only():
    model = micro(level="node", depth=1, num_outputs=3)
    nodes, links = torch.zeros(1, 4, dtype=torch.int64), torch.tensor(PATH)[None]
    kinds, vectors = torch.zeros(1, 6, dtype=torch.int64), torch.randn(1, 4, 6)
    other = nodes.clone()
    other[0, 3] = 1  # not a neighbour of 0 and 1
    with torch.no_grad():
        change = (model(nodes, links, kinds, vectors) - model(other, links, kinds, vectors)).abs().sum(-1)[0]
    assert change[:2].max() < 1e-6 and change[2] > 1e-4 and change[3] > 1e-4


def test_attention_with_edges_is_the_formula():
    layer = NeighbourAttention(8, 8, 2, edges=True)
    x, e = torch.randn(4, 8), torch.randn(6, 8)
    source, target = torch.tensor(PATH).unbind(1)
    q, k, v = layer.qkv(x).chunk(3, -1)
    out, scores = layer(x, source, target, e)
    expected = torch.zeros(4, 8)
    for i in range(4):
        for h in (slice(0, 4), slice(4, 8)):
            weights = {
                j: ((k[s, h] * q[i, h] / 2) * layer.edge(e[j])[h]).sum().clamp(-5, 5).exp() for j, (s, t) in enumerate(PATH) if t == i
            }
            total = sum(weights.values()) + 1e-6
            expected[i, h] = sum(w * v[PATH[j][0], h] for j, w in weights.items()) / total
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert scores.shape == (6, 8)  # one a channel: what the edges become


def test_full_graph_attention_is_dense_attention():
    """Without edge features, with every pair joined: softmax attention without the diagonal (scores are far from the clamp here)."""
    layer = NeighbourAttention(8, 8, 2, edges=False)
    x = torch.randn(5, 8)
    source, target = torch.cartesian_prod(torch.arange(5), torch.arange(5)).unbind(1)
    keep = source != target
    out, scores = layer(x, source[keep], target[keep])
    q, k, v = (t.view(5, 2, 4).transpose(0, 1) for t in layer.qkv(x).chunk(3, -1))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=~torch.eye(5, dtype=torch.bool))
    torch.testing.assert_close(out, dense.transpose(0, 1).flatten(1))
    assert scores is None


def test_pitfall_a_node_without_in_edges_gets_nothing_and_no_nan():
    for edges in ("types", "none"):
        model = micro(edges=edges, level="node")
        nodes = torch.zeros(1, 3, dtype=torch.int64)
        links = torch.tensor([[[0, 1], [1, 0]]])
        with torch.no_grad():
            assert torch.isfinite(model(nodes, links, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, 6))).all()
    out = neighbour_attention(torch.ones(1, 1), torch.ones(3, 1, 2), torch.tensor([0]), torch.tensor([1]))
    assert out[0].abs().sum() == 0 and (out[1] == 1).all()


def test_padding_kept_or_dropped_gives_the_same():
    model = micro()
    batch = model.example_batch(4, seed=3)
    inputs = model.inputs_of(batch)
    with torch.no_grad():
        dropped = model(*inputs)
        of = Graph.of
        try:
            Graph.of = staticmethod(lambda nodes, edges, padded: of(nodes, edges, True))
            kept = model(*inputs)
        finally:
            Graph.of = staticmethod(of)
    torch.testing.assert_close(kept, dropped, atol=1e-5, rtol=1e-4)


def test_signs_flip_in_training_only_and_matter():
    model = micro(batch_norm=False, layer_norm=True)
    batch = model.example_batch(4)
    with torch.no_grad():
        still = {model.loss(batch).total.item() for _ in range(4)}
        model.train()
        moving = {round(model.loss(batch).total.item(), 6) for _ in range(8)}
    assert len(still) == 1 and len(moving) > 1


def test_variants_differ_as_they_say():
    assert create("graph_transformer_pattern_full_ln").preprocessing == {
        "laplacian": 2,
        "wl": False,
        "full_graph": True,
        "self_loops": False,
    }
    wl = create("graph_transformer_cluster_wl_bn").eval()
    inputs = wl.example(2)
    assert inputs[3].dtype == torch.int64 and wl(*inputs).shape == (2, 12, 6)
    both = micro(wl=37)
    assert len(both.example(2)) == 5 and both(*both.example(2)).shape == (2, 1)
    full = micro(full_graph=True)
    _, links, kinds, _ = full.example(1, size=5)
    assert int((links >= 0).all(2).sum()) == 20 and int(kinds.max()) == 0
    assert any(isinstance(m, torch.nn.LayerNorm) for m in create("graph_transformer_zinc_ln").modules())
    for readout in ("sum", "max"):
        assert torch.isfinite(micro(readout=readout)(*full.example(2))).all()


def test_losses():
    weights = class_weights(torch.tensor([0, 0, 0, 1]), 3)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75, 0.0]))
    assert class_weights(torch.tensor([1, 1]), 3) is None
    model = micro(level="node", regression=False, num_outputs=3)
    batch = model.example_batch(3)
    loss = model.loss(batch).total
    one_class = {**batch, "label": torch.where(batch["label"] >= 0, 1, -1)}
    assert torch.isfinite(loss) and torch.isfinite(model.loss(one_class).total)
    said = model.predict(batch)
    assert said.label.shape == batch["nodes"].shape and bool(((said.label < 0) == (batch["nodes"] < 0)).all())


def test_wrong_inputs_are_refused():
    model = micro()
    nodes, links, kinds, vectors = model.example(2)
    far = links.clone()
    far[0, 0, 0] = 99
    for bad in [
        (nodes + 9, links, kinds, vectors),
        (nodes, far, kinds, vectors),
        (nodes, links, kinds + 3, vectors),
        (nodes, links, kinds),
    ]:
        with pytest.raises(BadInput):
            model(*bad)
    with pytest.raises(BadInput, match="heads"):
        micro(heads=5)
    with pytest.raises(BadInput, match="residual"):
        micro(out_dim=24)
    assert micro(out_dim=24, residual=False)(nodes, links, kinds, vectors).shape == (2, 1)


def test_scatter():
    x, index = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2])
    assert scatter_sum(x, index, 4).tolist() == [1, 0, 5, 0]
    assert scatter_max(x, index, 3).tolist() == [1, -torch.inf, 3]
    torch.testing.assert_close(scatter_softmax(x, index, 4), torch.cat([torch.ones(1), torch.tensor([2.0, 3.0]).softmax(0)]))


@pytest.mark.slow
def test_it_learns():
    run = formarium.fit("graph_transformer_micro", "sample:molecules", progress=False, epochs=8)
    assert formarium.evaluate(run, "sample:molecules").metrics["score"] > 0.3

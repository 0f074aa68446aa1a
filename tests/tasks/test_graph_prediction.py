import json

import numpy as np
import pytest
import torch

import formarium
from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.graph_prediction.data import from_memory, graph, read
from formarium.tasks.graph_prediction.encodings import Prepare, collate, complete_edges, laplacian_eigenvectors, wl_colours
from formarium.tasks.graph_prediction.metrics import label_scores, value_scores
from formarium.tasks.graph_prediction.sample import VALENCE, molecule, worth

task = task_of("graph-prediction")
TRIANGLE = {"nodes": [0, 1, 2], "edges": [[0, 1], [1, 2], [2, 0]], "edge_types": [0, 1, 0]}


def graphs(count=6, **answer):
    return [{"id": f"g{i}", **TRIANGLE, **{k: v(i) for k, v in answer.items()}} for i in range(count)]


def test_json(tmp_path):
    (tmp_path / "g.json").write_text(json.dumps(graphs(target=lambda i: i / 2)))
    data = read(tmp_path / "g.json")
    assert data.model_args == {"level": "graph", "regression": True, "num_outputs": 1, "num_node_types": 3, "num_edge_types": 2}
    assert len(data.splits["train"]) == 5 and len(data.splits["val"]) == 1
    one = data.splits["train"][0]
    assert one["edges"].shape == (6, 2) and one["target"].shape == (1,)  # the reverses were added
    (tmp_path / "n.json").write_text(json.dumps(graphs(label=lambda i: [0, 1, i % 2])))
    nodes = read(tmp_path / "n.json")
    assert nodes.model_args["level"] == "node" and nodes.model_args["num_outputs"] == 2


def test_csv(tmp_path):
    (tmp_path / "edges.csv").write_text("graph,source,target,type\na,0,1,0\na,1,2,1\nb,0,1,0\n")
    (tmp_path / "nodes.csv").write_text("graph,node,type\na,0,3\na,1,0\na,2,1\nb,0,0\nb,1,1\n")
    (tmp_path / "graphs.csv").write_text("graph,label,split\na,0,train\nb,1,val\n")
    data = read(tmp_path)
    assert data.splits["train"][0]["nodes"].tolist() == [3, 0, 1] and data.splits["val"][0]["label"] == 1
    assert len(data.splits["train"][0]["edges"]) == 4
    assert len(task.inputs([tmp_path])) == 2


def test_pyg_and_dicts_of_tensors(tmp_path):
    pyg = pytest.importorskip("torch_geometric.data")
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    found = [
        pyg.Data(x=torch.eye(3), edge_index=edges, edge_attr=torch.zeros(4, 1, dtype=torch.long), y=torch.tensor([float(i)]))
        for i in range(4)
    ]
    torch.save(found, tmp_path / "list.pt")
    pyg.InMemoryDataset.save(found, tmp_path / "whole.pt")
    torch.save([{"x": d.x, "edge_index": d.edge_index, "y": d.y} for d in found], tmp_path / "dicts.pt")
    for name in ("list", "whole", "dicts"):
        data = read(tmp_path / f"{name}.pt")
        assert len(data.splits["train"]) == 3, name
        assert data.splits["train"][0]["edges"].tolist() == edges.T.tolist() and data.splits["train"][0]["nodes"].tolist() == [0, 1, 2]
    assert from_memory(found[0], 0)["nodes"].tolist() == [0, 1, 2]


def test_networkx():
    import networkx as nx

    assert len(from_memory(nx.cycle_graph(4), 0)["edges"]) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"edges": [[0, 5]], "edge_types": [0]}, "between nodes 0 to 2"),
        ({"edge_types": [0]}, "one for each of 3 edges"),
        ({"nodes": [0.5, 1, 2]}, "whole numbers"),
        ({"nodes": ["C", "N", "O"]}, "whole numbers"),
        ({"nodes": []}, "at least one node"),
        ({"nodes": [-2, 0, 1]}, "types from 0"),
        ({"nodes": [[0.1, 0.9]] * 3}, "one-hot"),
        ({"nodes": None}, "no nodes"),
        ({"label": "high"}, "finite numbers"),
    ],
)
def test_a_graph_that_can_not_be_is_refused_in_one_line(change, said):
    with pytest.raises(BadInput, match=said) as e:
        graph({**TRIANGLE, **change}, "g")
    assert "\n" not in str(e.value)


def test_files_that_can_not_be_read_are_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "none.json").write_text(json.dumps(graphs()))
    (tmp_path / "one.json").write_text(json.dumps(graphs(1, label=lambda i: i)))
    (tmp_path / "same.json").write_text(json.dumps(graphs(label=lambda i: 0)))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "code.pt")
    for name in ("bad.json", "none.json", "one.json", "same.json", "code.pt", "nowhere"):
        with pytest.raises(BadInput) as e:
            read(tmp_path / name)
        assert "\n" not in str(e.value)
    with pytest.raises(BadInput):
        task.inputs([tmp_path / "nowhere.json"])


def test_laplacian_eigenvectors():
    edges = np.array([(i, (i + 1) % 6) for i in range(6)])
    edges = np.concatenate([edges, edges[:, ::-1]])
    found = laplacian_eigenvectors(6, edges, 3)
    adjacency = np.zeros((6, 6))
    adjacency[edges[:, 0], edges[:, 1]] = 1
    laplacian = np.eye(6) - adjacency / 2
    for i, value in enumerate((0.5, 0.5, 1.5)):  # 1 - cos(2 pi k / 6)
        np.testing.assert_allclose(laplacian @ found[:, i], value * found[:, i], atol=1e-5)
    assert laplacian_eigenvectors(2, np.array([(0, 1), (1, 0)]), 4).shape == (2, 4)
    assert np.isfinite(laplacian_eigenvectors(3, np.array([(0, 1), (1, 2)]), 2)).all()  # directed


def test_wl_colours_tell_degrees_apart():
    edges = np.array([(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)])
    colours = wl_colours(4, edges)
    assert colours[0] == colours[3] != colours[1] == colours[2] and set(colours) == {1, 2}
    longer = np.array([(0, 1), (1, 2), (2, 3), (3, 4)])
    assert len(set(wl_colours(5, longer))) == 2 and len(set(wl_colours(5, longer, rounds=2))) == 3


def test_complete_graphs_loops_and_padding():
    raw = graph({**TRIANGLE, "label": 1}, "g")
    small = {**graph({"nodes": [1], "edges": []}, "h"), "label": np.int64(0)}
    raw["label"] = np.int64(raw.pop("y"))
    prepare = Prepare({"laplacian": 2, "wl": True, "full_graph": True, "self_loops": True})
    batch = collate([prepare(s, np.random.default_rng(0)) for s in (raw, small)])
    assert len(complete_edges(4)) == 12
    assert batch["edges"].shape == (2, 9, 2) and batch["edges"][1, 0].tolist() == [0, 0] and batch["edges"][1, 1:].max() == -1
    assert batch["nodes"].tolist() == [[0, 1, 2], [1, -1, -1]] and batch["label"].tolist() == [1, 0]
    assert batch["eigenvectors"].shape == (2, 3, 2) and batch["colours"].shape == (2, 3)


def test_sample_data():
    rng = np.random.default_rng(0)
    for _ in range(50):
        types, bonds = molecule(rng)
        used = np.zeros(len(types), int)
        for a, b, order in bonds:
            used[[a, b]] += order
        assert all(u <= VALENCE[t] for u, t in zip(used, types, strict=True)) and 10 <= len(types) <= 33
    assert worth([0, 0], [(0, 1, 1)]) == pytest.approx(0.8)
    assert worth([0, 2], [(0, 1, 2)]) == pytest.approx(0.4 - 0.9 - 0.6 - 0.9)
    assert worth([0] * 7, [(i, (i + 1) % 7, 1) for i in range(7)]) == pytest.approx(7 * 0.4 - 2 * 0.8)
    pattern, again = task.sample("pattern"), task.sample("pattern")
    one = pattern.splits["train"][0]
    assert pattern.model_args["level"] == "node" and one["label"].sum() == 10
    assert np.array_equal(one["edges"], again.splits["train"][0]["edges"])
    with pytest.raises(UnknownName):
        task.sample("zinc")


def test_scores():
    metrics, each = value_scores(
        [[np.array([[1.0], [2.0], [3.0]])[i : i + 1] for i in range(3)], [np.array([[t]]) for t in (1.0, 2.0, 5.0)]]
    )
    assert metrics["mae"] == pytest.approx(2 / 3) and metrics["score"] == pytest.approx(1 - (2 / 3) / (4 / 3))
    assert each["score"].mean() == pytest.approx(metrics["score"])
    said, true = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    metrics, each = label_scores([(said[:3], true[:3]), (said[3:], true[3:])])
    assert metrics["balanced_accuracy"] == pytest.approx(0.75) and each["score"].mean() == pytest.approx(0.75)
    name, found = task.baseline(task.sample("pattern"))
    assert "logistic" in name and 0.5 < found["score"] < 0.9


def test_predictions_rows_files_and_pictures(tmp_path):
    for name in ("molecules", "pattern"):
        data = task.sample(name)
        model = formarium.create("graph_transformer_micro", **data.model_args)
        model.names = [*data.names]
        rows = formarium.predict(model, [data.splits["val"][i] for i in range(3)])
        assert len(rows) == 3 and (name == "pattern") == ("labels" in rows[0])
        prepare = task.transform(model.preprocessing)
        batch = task.collate([prepare(data.splits["val"][i], np.random.default_rng(0)) for i in range(3)])
        with torch.no_grad():
            said = model.eval().predict(batch)
        picture = task.draw(said, batch, data.names)
        assert len({*picture.get_flattened_data()} if hasattr(picture, "get_flattened_data") else {*picture.getdata()}) > 4
        assert task.details([said], [batch], data.names)
        paths = task.write(said, batch, tmp_path, data.names)
        assert json.loads(paths[0].read_text())["id"] == batch["id"][0]
        assert task.score([said], [batch])[0]["score"] < 1

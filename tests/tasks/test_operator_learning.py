import json

import numpy as np
import pytest
import torch

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.operator_learning.metrics import integrated_error, relative_l2, same_skeleton, score
from formarium.tasks.operator_learning.model import Solutions
from formarium.tasks.operator_learning.sample import trajectories
from formarium.tasks.operator_learning.symbols import (
    disturb,
    encode,
    encode_number,
    fluid_vocabulary,
    infix,
    is_valid,
    parse,
    read_words,
    right_hand_side,
    skeleton,
    to_ids,
    vocabulary,
)

TASK = task_of("operator-learning")
T = np.linspace(0, 1, 12)


def waves(n=6, dims=2):
    return np.stack([np.stack([np.sin(T + i + k) for k in range(dims)], -1) for i in range(n)])


# equations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [(2.5, "+ N250 E-2"), (-0.0314159, "- N314 E-4"), (3, "3"), (-10.0, "-10"), (1234.0, "+ N123 E1"), (0, "0")],
)
def test_numbers_as_words(value, words):
    assert encode_number(value) == words.split()
    assert parse(words.split())[0].value == pytest.approx(value, rel=5e-3)


def test_words_and_trees_round_trip_and_evaluate():
    words = read_words("sub mul 1.5 u_0 mul u_0 u_1 | add neg u_1 pow2 sin u_0", 3)
    assert encode(parse(words)) == words
    u = np.array([[0.5, 2.0], [1.0, -1.0]])
    expected = np.stack([1.5 * u[:, 0] - u[:, 0] * u[:, 1], -u[:, 1] + np.sin(u[:, 0]) ** 2], -1)
    np.testing.assert_allclose(right_hand_side(parse(words), u), expected)
    assert infix(words) == "du_0/dt = ((1.5 * u_0) - (u_0 * u_1)), du_1/dt = (-(u_1) + (sin(u_0))**2)"
    assert " ".join(skeleton(words)).startswith("sub mul <PLACEHOLDER> u_0 mul u_0 u_1 |")


def test_what_is_valid():
    assert is_valid(["mul", "+", "N25", "E-1", "u_0", "|", "u_1"], 2)
    for broken in ("mul u_0", "u_0 u_1", "+ N25 u_0", "u_0 |", "<PLACEHOLDER>", "tanh u_0", "u_0 | u_7"):
        assert not is_valid(broken.split(), 2)
    assert not is_valid(["u_0"], 2)


def test_a_disturbed_guess_has_a_term_more_or_less_and_stays_whole():
    words = skeleton(read_words("add mul 2 u_0 mul 3 u_1 | sub u_0 u_1", 3))
    rng = np.random.default_rng(0)
    seen = {" ".join(disturb(words, rng, 0.4, 0.4)) for _ in range(60)}
    assert " ".join(words) in seen and len(seen) > 4 and all(len(parse(w.split())) == 2 for w in seen)
    assert {len(w.split()) < len(words) for w in seen} == {True, False}
    assert disturb(words, rng, 0, 0) == words


def test_the_vocabulary_has_every_word_once_and_names_what_it_lacks():
    words = vocabulary(2, 1)
    assert (
        words[:4] == ("<BOS>", "<EOS>", "<PAD>", "<PLACEHOLDER>") and len({*words}) == len(words) and "N99" in words and "u_2" not in words
    )
    with pytest.raises(BadInput, match="u_2"):
        to_ids(["u_2"], words)


# files --------------------------------------------------------------------------------------------------------------


def test_npz_json_and_csv_hold_the_same(tmp_path):
    u, equation = waves(), "u_1 | mul -1.5 u_0"
    np.savez(tmp_path / "a.npz", t=T, u=u, equation=np.array([equation] * 6))
    (tmp_path / "b.json").write_text(json.dumps([{"t": T.tolist(), "u": x.tolist(), "equation": equation} for x in u]))
    lines = ["id,t,u_0,u_1,equation"] + [f"{i},{t},{a},{b},{equation}" for i, x in enumerate(u) for t, (a, b) in zip(T, x, strict=True)]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"t": T.tolist(), "u": x.tolist(), "equation": equation}) for x in u))
    held = [TASK.read(tmp_path / name) for name in ("a.npz", "b.json", "c.csv", "d.jsonl")]
    for data in held:
        assert {k: len(v) for k, v in data.splits.items()} == {"train": 5, "val": 1} and data.model_args["dims"] == 2
        for s, first in zip(data.splits["train"].samples, held[0].splits["train"].samples, strict=True):
            np.testing.assert_allclose(s["u"], first["u"])
            assert s["words"] == ["u_1", "|", "mul", "-", "N150", "E-2", "u_0"] and s["input_len"] == 4


def test_splits_fields_and_unknown_equations(tmp_path):
    np.savez(tmp_path / "train.npz", t=T, u=waves(4)[:, :, None].repeat(5, 2))
    np.savez(tmp_path / "val.npz", t=T, u=waves(2)[:, :, None].repeat(5, 2))
    data = TASK.read(tmp_path, input_len=6)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 4, "val": 2}
    assert data.model_args["grid"] == 5 and "6 of 6" in data.notes[0]
    ready = TASK.transform({})(data.splits["val"][0], np.random.default_rng(0))
    assert ready["data"].shape == (6, 11) and ready["target"].shape == (6, 10) and ready["guess"] == ["<PLACEHOLDER>"]
    with pytest.raises(BadInput, match="equation"):
        TASK.read(tmp_path, strict=True)


def test_square_fields_and_their_guesses(tmp_path):
    u = waves(3)[:, :, None, None].repeat(4, 2).repeat(4, 3)  # n steps y x dims
    guess = "add dt U mul U D U | diverg U -- U periodic"
    np.savez(tmp_path / "a.npz", t=T, u=u, guess=np.array([guess] * 3))
    data = TASK.read(tmp_path, input_len=6)
    assert data.model_args["grid"] == 16 and data.model_args["dims"] == 2 and data.model_args["vocabulary"] == fluid_vocabulary()
    ready = TASK.transform({})(data.splits["train"][0], np.random.default_rng(0))
    assert ready["guess"] == guess.split() and ready["data"].shape == (6, 33)
    for broken, says in ((u[:, :, :, :3], "square"), (u, "conditions|periodic")):
        np.savez(tmp_path / "a.npz", t=T, u=broken, guess=np.array([guess + ("" if says == "square" else " p wet")] * 3))
        with pytest.raises(BadInput, match=says):
            TASK.read(tmp_path)


def test_words_of_fluids_and_of_whole_equations():
    said = "add dt U mul + N864 E-5 D2 U | diverg U -- U periodic"
    words = read_words(said, 3)
    assert " ".join(words) == said
    assert infix(["sub", "u_t", "u_xx"]) == "(u_t - u_xx) = 0" and infix(["neg", "u_0"]) == "du_0/dt = -(u_0)"
    assert skeleton(words)[-3:] == ["--", "U", "periodic"]
    with pytest.raises(BadInput, match="condition"):
        read_words("dt U -- U", 3)
    every = fluid_vocabulary()
    assert len(every) == 1130 and every[:4] == every[103:107] and "D2" in every and "exp" not in every
    assert to_ids(["<PAD>", "U"], every)[0] > 100  # of a word that is there twice, the later one


def bad(change):
    u = waves()
    held = [{"t": T.tolist(), "u": x.tolist(), "equation": "u_1 | neg u_0"} for x in u]
    change(held)
    return held


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h[2]["u"][3].__setitem__(0, float("nan")), "NaN"),
        (lambda h: h[1].update(t=T.tolist()[:-2], u=h[1]["u"][:-2]), "10 of"),
        (lambda h: h[1].update(t=T.tolist()[:-2]), "as many states in u"),
        (lambda h: h[0].update(equation="u_1 | tanh u_0"), "unknown symbol 'tanh'"),
        (lambda h: h[0].update(equation="u_1 | mul u_0"), "argument"),
        (lambda h: h[0].update(equation="u_1"), "2 components"),
        (lambda h: h[0].update(equation="u_1 | u_5"), "u_5"),
        (lambda h: h[0].update(t=T[::-1].tolist()), "rise"),
        (lambda h: h[0].pop("t"), "no t"),
        (lambda h: h[0]["u"].__setitem__(1, [1.0]), "as long as the others"),
        (lambda h: h.clear(), "none"),
    ],
)
def test_bad_trajectories_are_said_in_a_line(tmp_path, change, says):
    (tmp_path / "a.json").write_text(json.dumps(bad(change)))
    with pytest.raises(BadInput, match=says) as e:
        TASK.read(tmp_path / "a.json")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "{", "JSONDecodeError"),
        ("a.npz", "no zip", "file of trajectories"),
        ("a.csv", "x,y\n1,2", "columns"),
        ("a.txt", "x", "npz"),
    ],
)
def test_broken_files_are_said(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=says):
        TASK.read(tmp_path / name)
    with pytest.raises(BadInput):
        TASK.inputs([tmp_path / name])


def test_what_is_not_there():
    with pytest.raises(BadInput, match="no such path"):
        TASK.read("/nowhere")
    with pytest.raises(UnknownName):
        TASK.sample("pendulums")
    with pytest.raises(BadInput, match="dict"):
        TASK.from_memory([1, 2], 0)


# sample data, scores, pictures ----------------------------------------------------------------------------------------


def test_sample_trajectories_obey_their_equations():
    for s in trajectories("val", 6, 0):
        rate = np.gradient(s["u"], s["t"], axis=0)[2:-2]
        said = right_hand_side(parse(s["words"]), s["u"])[2:-2]
        assert np.abs(rate - said).max() < 0.05 * np.abs(rate).max() + 0.02
        assert is_valid(s["words"], 2) and 0 < np.abs(s["seen"] - s["u"][:24]).max() < 0.5
    assert trajectories("val", 6, 0)[0]["words"] != trajectories("val", 6, 1)[0]["words"]


def batch_of(n=3):
    ready = TASK.transform({})
    return TASK.collate([ready(s, np.random.default_rng(0)) for s in trajectories("val", n, 0)])


def test_training_adds_noise_and_disturbs_the_guess():
    s = trajectories("val", 3, 0)[1]
    recipe = {"noise": 0.1, "add_term": 0.5, "drop_term": 0.5}
    a, b = (TASK.transform({}, recipe)(s, np.random.default_rng(k)) for k in (0, 1))
    assert np.abs(a["data"] - b["data"])[:, 1:].min() > 0 and (a["data"][:, 0] == b["data"][:, 0]).all()
    share = np.linalg.norm(a["data"][:, 1:] - s["u"][:24]) / np.linalg.norm(s["u"][:24])
    assert share == pytest.approx(0.1, rel=1e-3) and a["guess"] != skeleton(s["words"])


def test_noise_on_targets_as_the_released_trainers_have_it():
    """One draw over the whole trajectory, of a share of its norm; off by default and without a recipe."""
    s = trajectories("val", 3, 0)[1]
    made = TASK.transform({}, {"noise": 0.1, "noise_targets": True})(s, np.random.default_rng(0))
    added = np.concatenate([made["data"][:, 1:], made["target"]]) - s["u"]
    assert np.linalg.norm(added) / np.linalg.norm(s["u"]) == pytest.approx(0.1, rel=1e-3)
    assert np.abs(added[24:]).min() > 0
    for recipe in ({"noise": 0.1}, {"noise_targets": True}, None):
        np.testing.assert_array_equal(TASK.transform({}, recipe)(s, np.random.default_rng(0))["target"], s["u"][24:].astype(np.float32))
    assert np.array_equal(
        TASK.transform({}, {"noise_targets": True})(s, np.random.default_rng(0))["data"][:, 1:], s["seen"].astype(np.float32)
    )


def test_scores_of_the_truth_and_of_nonsense():
    b = batch_of()
    right = Solutions(b["target"], b["words"], [infix(w) for w in b["words"]], [True] * 3)
    metrics, per_sample = score([right], [b])
    assert (
        metrics["relative_l2"] == 0 and metrics["valid"] == metrics["skeleton"] == metrics["r2"] == 1 and metrics["integrated_error"] < 0.01
    )
    wrong = Solutions(2 * b["target"], [["mul"]] * 3, ["mul"] * 3, [False] * 3)
    metrics, per_sample = score([wrong], [b])
    assert metrics["relative_l2"] == pytest.approx(1) and metrics["integrated_error"] == 1 and metrics["valid"] == metrics["skeleton"] == 0
    assert per_sample["relative_l2"].shape == (3,)


def test_written_equations_are_solved_and_compared():
    t = np.linspace(0, 1, 20)
    true = np.exp(-t)[:, None]
    assert integrated_error(["neg", "u_0"], t, true) < 1e-3
    other = np.exp(-2 * t)[:, None]
    expected = relative_l2(other[None], true[None])[0]
    assert integrated_error(["mul", "-2", "u_0"], t, true) == pytest.approx(expected, rel=1e-2)
    for broken in ("mul u_0", "u_0 | u_1", "u_3", "pow3 mul 10 add u_0 1"):
        assert integrated_error(broken.split(), t, true) == 1
    assert not same_skeleton(["u_0"], ["neg", "u_0"]) and same_skeleton(["mul", "2", "u_0"], ["mul", "3", "u_0"])
    assert relative_l2(np.ones((1, 2, 2)), np.full((1, 2, 2), 2.0))[0] == 0.5


def test_rows_files_and_pictures(tmp_path):
    b = batch_of()
    said = Solutions(b["target"] + 0.1, b["words"], [infix(w) for w in b["words"]], [True] * 3)
    rows = TASK.rows(said, b, ())
    assert rows[0]["equation"].startswith("du_0/dt") and len(rows[0]["u"]) == len(rows[0]["t"]) == 40 and rows[0]["relative_l2"] > 0
    paths = TASK.write(said, b, tmp_path)
    again = np.loadtxt(paths[0], delimiter=",", skiprows=1)
    np.testing.assert_allclose(again[:, 1:], b["target"][0].numpy() + 0.1, atol=1e-5)
    assert TASK.draw(said, b).size[0] > 300 and TASK.details([said], [b], ())


def test_prediction_of_a_dict_in_memory():
    from formarium import create

    torch.manual_seed(0)
    model = create("prose_micro", vocabulary=vocabulary(2, 1), dims=2, max_len=10).eval()
    sample = TASK.from_memory({"t": T, "u": waves(1)[0], "query": [2.0, 3.0], "guess": "u_1 | neg u_0"}, 0)
    said = model.predict(TASK.collate([TASK.transform({})(sample, np.random.default_rng(0))]))
    assert said.solution.shape == (1, 2, 2)


def test_the_rival_is_the_nearest_trajectory():
    from formarium.task import Data
    from formarium.tasks.operator_learning.data import Trajectories

    held = [*trajectories("val", 12, 0)]
    data = Data("x", "operator-learning", {"train": Trajectories(held), "val": Trajectories(held[:4])})
    name, metrics = TASK.baseline(data)
    assert "nearest" in name and metrics["relative_l2"] < 1e-6
    held[:] = [{**s, "u": 0 * s["u"] + k + 1, "seen": 0 * s["seen"] + k + 1} for k, s in enumerate(held)]
    still = Data("x", "operator-learning", {"train": Trajectories(held[:4]), "val": Trajectories(held[4:])})
    assert TASK.baseline(still) == ("the last state held", {"relative_l2": 0.0})


def test_fields_solve_their_equations():
    from formarium.tasks.operator_learning import fields

    x = np.arange(fields.GRID) * 2 * np.pi / fields.GRID
    t = np.linspace(0, 1, 5)
    heat = fields.solve(lambda u: fields.SLOPES["heat"](u, 0.2), np.sin(2 * x), t, 16)
    np.testing.assert_allclose(heat, np.exp(-0.2 * 4 * t)[:, None] * np.sin(2 * x), atol=1e-6)
    moved = fields.solve(lambda u: fields.SLOPES["advection"](u, 0.5), np.sin(x), t, 16)
    np.testing.assert_allclose(moved, np.sin(x - 0.5 * t[:, None]), atol=1e-6)
    for family, (make, ranges, _) in fields.FAMILIES.items():  # the fast form is the equation's
        numbers = [sum(r) / 2 for r in ranges]
        np.testing.assert_allclose(fields.SLOPES[family](np.sin(x), *numbers), fields.slope(make(*numbers), np.sin(x)), atol=1e-9)
    np.testing.assert_allclose(fields.derivative(np.cos(3 * x), 2), -9 * np.cos(3 * x), atol=1e-9)


def test_sample_fields_have_their_equations_in_words():
    data = task_of("operator-learning").sample("pdes")
    first = data.splits["val"][2]
    assert first["u"].shape == (48, 32, 1) and first["family"] == "burgers" and data.model_args["grid"] == 32
    assert {*first["words"]} <= {*data.model_args["vocabulary"]} and "u_xx" in first["words"]
    assert np.isfinite(np.stack([data.splits["val"][i]["u"] for i in range(8)])).all()
    _, trivial = task_of("operator-learning").baseline(data)
    assert 0.05 < trivial["relative_l2"] < 2

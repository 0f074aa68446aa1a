import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.formula_recognition.inkml import Ink, draw_ink, read_inkml, write_inkml
from formarium.tasks.formula_recognition.latex import CROHME, check_structure, is_well_formed, skeleton, to_ids, to_tokens, tokenize
from formarium.tasks.formula_recognition.metrics import edits, score
from formarium.tasks.formula_recognition.model import Formulas, bidirectional, pad_rows
from formarium.tasks.formula_recognition.sample import Rendered, formula, render

TASK = task_of("formula-recognition")
RNG = np.random.default_rng(0)
INK = Ink([np.array([[0, 0], [10, 20], [20, 0.0]]), np.array([[30, 10], [40.5, 10]])], "$x^2$", "1_em_1")


# LaTeX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("$x^2$", "x ^ { 2 }"),
        (r"\frac12", r"\frac { 1 } { 2 }"),
        (r"\sqrt[3]{x+1}", r"\sqrt [ 3 ] { x + 1 }"),
        (r"\left( {a} \right)_{ij}", r"( a ) _ { i j }"),
        (r"f'(x) \le \mathrm{a}", r"f ^ { \prime } ( x ) \leq a"),
        (r"\{ x \lt 2 \}", r"\{ x < 2 \}"),
        (r"x^{a_1}_b", r"x ^ { a _ { 1 } } _ { b }"),
    ],
)
def test_what_people_write_in_normal_form(text, tokens):
    assert " ".join(tokenize(text)) == tokens
    check_structure(tokenize(text))
    assert tokenize(tokens) == tokens.split()


@pytest.mark.parametrize(
    ("text", "says"),
    [("x^{2", "never closed"), ("x}", "nothing opened"), ("x^", "argument after"), ("  ", "nothing"), (r"\sqrt[3 x", "never closes")],
)
def test_broken_latex_is_said(text, says):
    with pytest.raises(BadInput, match=says):
        tokenize(text)


def test_ids_begin_behind_the_special_ones():
    assert len(CROHME) == 110 and to_ids(["^", "_", "{", "}", "[", "]", r"\frac", r"\sqrt"], CROHME) == [82, 83, 110, 112, 42, 81, 53, 74]
    assert to_tokens([0, 1, 2, 110], CROHME) == ["<pad>", "<sos>", "<eos>", "{"]
    with pytest.raises(BadInput, match=r"\\zeta"):
        to_ids([r"\zeta"], CROHME)


def test_structure():
    assert skeleton(tokenize("a^{b}+1")) == ["x", "^", "{", "x", "}", "x", "x"]
    assert is_well_formed(tokenize("a^{b}")) and not is_well_formed(["a", "^", "b"]) and not is_well_formed([])


def test_bidirectional_rows():
    rows, targets = bidirectional(pad_rows([[5, 6, 7], [8]]))
    assert rows.tolist() == [[[1, 5, 6, 7], [2, 7, 6, 5]], [[1, 8, 0, 0], [2, 8, 0, 0]]]
    assert targets.tolist() == [[[5, 6, 7, 2], [7, 6, 5, 1]], [[8, 2, 0, 0], [8, 1, 0, 0]]]


# ink and images -----------------------------------------------------------------------------------------------------


def test_inkml_round_trip_and_drawing(tmp_path):
    write_inkml(INK, tmp_path / "a.inkml")
    again = read_inkml(tmp_path / "a.inkml")
    assert again.truth == "$x^2$" and again.id == "1_em_1"
    for a, b in zip(again.strokes, INK.strokes, strict=True):
        np.testing.assert_allclose(a, b)
    image = draw_ink(again)
    assert image.dtype == np.uint8 and image[0].max() == 0 and image.max() == 255 and image.shape[1] > image.shape[0]
    larger = draw_ink(replace(INK, strokes=[1000 * s for s in INK.strokes]))
    assert larger.shape == image.shape  # whatever the unit
    assert draw_ink(Ink([np.array([[3.0, 3.0]])])).max() == 255  # a lone dot


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<ink><trace>1 2, 3 4</trace>", "broken XML"),
        ("<svg/>", "<svg>"),
        ("<ink></ink>", "none"),
        ("<ink><trace>1 2, x y</trace></ink>", "points"),
        ("<ink><trace>1 nan</trace></ink>", "NaN"),
    ],
)
def test_broken_inkml_is_said_in_a_line(tmp_path, text, says):
    (tmp_path / "a.inkml").write_text(text)
    for attempt in (lambda: read_inkml(tmp_path / "a.inkml"), lambda: TASK.inputs([tmp_path / "a.inkml"]), lambda: TASK.read(tmp_path)):
        with pytest.raises(BadInput, match=says) as e:
            attempt()
        assert "\n" not in str(e.value)


def paper(tokens="x ^ { 2 }"):
    return Image.fromarray(255 - render(tokens.split()))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    lines = []
    for i, text in enumerate(["x ^ { 2 }", "a + b", r"\frac { 1 } { 2 }", r"\sqrt { x }"]):
        paper(text).save(tmp_path / "img" / f"f{i}.bmp")
        lines.append(f"f{i}\t{text}")
    (tmp_path / "caption.txt").write_text("\n".join(lines))
    return tmp_path


def test_captioned_images_come_with_bright_ink(folder):
    data = TASK.read(folder, holdout=0.25)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 3, "val": 1} and data.model_args["vocabulary"] == CROHME
    samples = [data.splits["train"][i] for i in range(3)]
    assert all(np.median(s["image"]) < 50 and s["image"].max() > 150 for s in samples)
    assert sorted(" ".join(to_tokens(s["tokens"], CROHME)) for s in samples)[0] in (r"\frac { 1 } { 2 }", r"\sqrt { x }", "a + b")
    small = TASK.read(folder, vocabulary="data").model_args["vocabulary"]
    assert len(small) == 11 and set(small) <= set(CROHME)


def test_splits_inkml_and_zips(tmp_path, folder):
    whole = tmp_path / "crohme"
    for split in ("train", "2014", "2016"):
        (whole / split).mkdir(parents=True)
        for i in range(2):
            write_inkml(INK, whole / split / f"{i}.inkml")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as z:
        for f in whole.rglob("*.inkml"):
            z.write(f, f"data/{f.relative_to(whole)}")
    for path in (whole, tmp_path / "all.zip"):
        data = TASK.read(path)
        assert {k: len(v) for k, v in data.splits.items()} == {"train": 2, "val": 2, "test": 2}
        assert to_tokens(data.splits["val"][0]["tokens"], CROHME) == ["x", "^", "{", "2", "}"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r"f0 \zeta + 1", r"\\zeta"),
        ("f0 x ^ { 2", "never closed"),
        ("f0 x ^ 2 }", "nothing opened"),
        ("f0 x ^ 2", "{ after"),
        ("f9 x", "f9"),
        ("f0", "tokens"),
    ],
)
def test_bad_captions_are_said_in_a_line(folder, line, says):
    (folder / "caption.txt").write_text(f"f1 a + b\n{line}\n")
    with pytest.raises(BadInput, match=says) as e:
        TASK.read(folder)
    assert "\n" not in str(e.value)


def test_images_without_ink_are_left_out_and_named(folder):
    Image.new("L", (40, 30), 255).save(folder / "img" / "f0.bmp")
    (folder / "img" / "f1.bmp").write_bytes(b"BM broken")
    data = TASK.read(folder)
    assert sum(map(len, data.splits.values())) == 2 and "f0.bmp" in data.notes[0] and "empty image" in data.notes[0]
    with pytest.raises(BadInput, match="empty image"):
        TASK.read(folder, strict=True)
    with pytest.raises(BadInput, match="empty image"):
        TASK.inputs([folder / "img" / "f0.bmp"])


def test_what_is_not_there(tmp_path):
    for attempt in (lambda: TASK.read(tmp_path / "no"), lambda: TASK.read(tmp_path), lambda: TASK.inputs([tmp_path / "no.png"])):
        with pytest.raises(BadInput):
            attempt()
    with pytest.raises(UnknownName):
        TASK.sample("chalk")


def test_images_in_memory():
    page = np.asarray(paper())
    shapes = [page, page / 255, torch.tensor(page / 255)[None], np.repeat(page[..., None], 3, 2), Image.fromarray(page)]
    made = [TASK.from_memory(x, 0)["image"] for x in shapes]
    assert all(np.abs(m.astype(int) - made[0].astype(int)).max() <= 1 for m in made) and np.median(made[0]) < 50
    assert TASK.is_single(page) and not TASK.is_single([page])
    for wrong in ("x", np.zeros((4, 4)), np.zeros((2, 0)), np.full((4, 4), np.nan)):
        with pytest.raises(BadInput):
            TASK.from_memory(wrong, 0)


def test_sizes_are_brought_into_range_and_batches_padded():
    ready = TASK.transform({})
    small, large = (ready({"image": np.full(s, 200, np.uint8), "id": "x", "tokens": [5]}, RNG) for s in ((8, 20), (600, 900)))
    assert small["image"].shape == (16, 40) and large["image"].shape == (256, 384)
    batch = TASK.collate([small, {**large, "tokens": [5, 6]}])
    assert batch["image"].shape == (2, 1, 256, 384) and batch["tokens"].tolist() == [[5, 0], [5, 6]]
    assert (~batch["mask"][0]).sum() == 16 * 40 and not batch["mask"][1].any() and batch["image"][0][:, batch["mask"][0]].sum() == 0
    scaled = TASK.transform({}, {"scale": (0.7, 1.4)})({"image": np.full((100, 100), 9, np.uint8), "id": "x"}, RNG)["image"]
    assert 70 <= scaled.shape[0] <= 140
    with pytest.raises(BadInput, match="proportions"):
        ready({"image": np.full((1, 5000), 9, np.uint8), "id": "x"}, RNG)


# sample data, scores, pictures ----------------------------------------------------------------------------------------


def test_sample_formulas_are_whole_and_follow_the_seed():
    rng = np.random.default_rng(0)
    assert all(is_well_formed(formula(rng)) for _ in range(200))
    a, b = Rendered(0, "val", 4), Rendered(0, "val", 4)
    assert a.formulas == b.formulas and np.array_equal(a[2]["image"], b[2]["image"]) and Rendered(1, "val", 4).formulas != a.formulas
    assert all(a[i]["image"].max() > 100 for i in range(4))


def test_a_subscript_is_set_below():
    flat, below = render(["x", "1"]), render(["x", "_", "{", "1", "}"])
    assert below.shape[0] > flat.shape[0] - 2 and not np.array_equal(flat.shape, below.shape)


def test_edit_distance():
    assert edits("kitten", "sitting") == 3 and edits("", "abc") == 3 and edits("abc", "") == 3 and edits("abc", "abc") == 0
    assert edits([1, 2, 3], [2, 3, 4]) == 2


def said(rows):
    tokens = [to_tokens(r, CROHME) for r in rows]
    return Formulas(tokens, [" ".join(t) for t in tokens], torch.zeros(len(rows)), rows)


def batch_of(texts):
    tokens = pad_rows([to_ids(tokenize(t), CROHME) for t in texts])
    image = torch.rand(len(texts), 1, 32, 64)
    return {
        "image": image,
        "mask": torch.zeros(len(texts), 32, 64, dtype=torch.bool),
        "tokens": tokens,
        "id": [*map(str, range(len(texts)))],
    }


def test_rates_count_formulas_within_so_many_errors():
    true = ["x+1", "x+1", "x+1", "x+1"]
    read = ["x+1", "x+2", "x-2", "2"]
    metrics, per_sample = score([said([to_ids(tokenize(t), CROHME) for t in read])], [batch_of(true)])
    assert metrics["exprate"] == 0.25 and metrics["exprate_1"] == 0.5 and metrics["exprate_2"] == 0.75
    assert metrics["token_error_rate"] == pytest.approx((0 + 1 + 2 + 3) / 12) and per_sample["exprate"].tolist() == [1, 0, 0, 0]


def test_rows_files_and_pictures(tmp_path):
    batch = batch_of(["x+1", r"\frac{a}{b}"])
    prediction = said([to_ids(tokenize("x+2"), CROHME), to_ids(["^", "{"], CROHME)])
    names = TASK.rows(prediction, batch, ["<pad>", "<sos>", "<eos>", *CROHME])
    assert names[0]["latex"] == "x + 2" and names[0]["truth"] == "x + 1" and not names[1]["well_formed"]
    paths = TASK.write(prediction, batch, tmp_path)
    assert paths[0].read_text() == "%0\n$x + 2$\n"
    assert min(TASK.draw(prediction, batch).size) > 100 and TASK.details([prediction], [batch], ())


def test_the_rival_reads_the_nearest_image():
    from formarium.task import Data

    held = Rendered(0, "train", 12)
    name, metrics = TASK.baseline(Data("x", "formula-recognition", {"train": held, "val": held}))
    assert "nearest" in name and metrics["exprate"] == 1.0

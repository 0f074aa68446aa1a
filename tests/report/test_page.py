from pathlib import Path

from matplotlib.figure import Figure

from formarium.lens import Report, Table
from formarium.report import page
from formarium.report.figures import learning_curves, pareto, svg


def row(name, accuracy, latency, ok=True, **more):
    if not ok:
        return {"variant": name, "system": name, "ok": False, "error": "it <broke>", "parameters": 5, "rank": None, "seconds": 1.0, **more}
    return {
        "variant": name, "system": name, "ok": True, "rank": 1, "metrics": {"accuracy": accuracy, "macro_f1": accuracy},
        "intervals": {"accuracy": (accuracy - 0.02, accuracy + 0.02)}, "parameters": 1234567, "flops": 5e6, "latency_ms": latency,
        "throughput": 100.0, "peak_memory": 2**21, "seconds": 12.0, "beats_baseline": accuracy > 0.8, "run": "runs/a", **more,
    }  # fmt: skip


def results(rows):
    good = [r for r in rows if r["ok"]]
    return {
        "candidates": rows, "metric": "accuracy", "winner": good[0]["variant"] if good else None, "seeds": [0],
        "baseline": {"name": "logistic regression", "accuracy": 0.8},
        "below_baseline": [r["variant"] for r in good if not r["beats_baseline"]],
        "lead": {"over": "b", "difference": 0.05, "low": -0.01, "high": 0.1, "clear": False} if len(good) > 1 else None, "dropped": [],
        "data": {"sizes": {"train": 10, "val": 5}, "classes": ["x", "y"], "notes": ["1 file left out: <a&b>.png"], "fingerprint": "f"},
        "budget": {"steps": 3, "batch_size": 2, "epochs": 1.0}, "command": "formarium compare x", "formarium": "0",
        "machine": {"torch": "2", "processor": "p", "threads": 1, "gpu": None},
    }  # fmt: skip


CURVES = {n: [{"step": i, "split": s, "loss": 1 / i, "accuracy": 0.5} for i in (1, 2) for s in ("train", "val")] for n in ("a", "b")}


def test_a_comparison_page_stands_alone_and_escapes_what_people_name(tmp_path):
    rows = [row("a", 0.9, 2.0), row("b", 0.75, 1.0), row("c", 0, 0, ok=False)]
    look = Report("SUFO", ["classes <overlap>"], tables=[Table(["k", "v"], [["a", 0.123456]])], figures={"f": Figure(figsize=(1, 1))})
    section = page.Section("photos", results(rows), Path("out"), CURVES, {"Confusion": Figure(figsize=(1, 1))}, None, look)
    text = page.write(tmp_path / "sub" / "report.html", "Which?", [section]).read_text()
    assert "it &lt;broke&gt;" in text and "&lt;a&amp;b&gt;.png" in text and "classes &lt;overlap&gt;" in text and "0.1235" in text
    assert text.count("<svg") == 4 and "<script src" not in text and 'href="http' not in text and "1.23 M" in text and "2 MB" in text


def test_the_verdict_in_sentences():
    said = " ".join(page.verdict(results([row("a", 0.9, 2.0), row("b", 0.75, 1.0), row("c", 0, 0, ok=False)])))
    assert "a comes first: accuracy 0.900 (95% interval 0.880 to 0.920)" in said and "within the noise" in said
    assert "not better: b" in said and "Failed: c" in said
    assert page.verdict(results([row("c", 0, 0, ok=False)])) == ["No candidate could be fitted; the table says why."]


def test_figures():
    rows = [row("a", 0.9, 2.0), row("b", 0.75, 1.0)]
    axes = pareto(rows, "accuracy").axes[0]
    assert [t.get_text() for t in axes.texts] == ["a", "b"]
    drawn = svg(learning_curves(CURVES, "accuracy", rows))
    assert drawn.startswith("<svg") and "viewBox" in drawn and ' width="' not in drawn[:200]


def test_numbers_a_person_reads():
    assert [page.count(v) for v in (999, 1234567, None, 5e9)] == ["999", "1.23 M", "", "5 G"]
    assert page.si(2048, 1024) == "2 k" and page.number(0.123456) == "0.1235" and page.number("x") == "x" and page.number(None) == ""


def test_a_lens_page(tmp_path):
    text = page.write_look(tmp_path / "look.html", Report("Seen", ["one"], figures={"f": Figure(figsize=(1, 1))})).read_text()
    assert "<h1>Seen</h1>" in text and "<svg" in text

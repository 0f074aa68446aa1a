import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import formarium
from formarium import compare, create
from formarium.engine import comparison as c
from formarium.engine import trials
from formarium.engine.benchmarking import activation_peak, bench, cost, matmul_peak
from formarium.errors import BadInput, NoCandidates, RunExists, UnknownName
from formarium.task import Data
from formarium.tasks.image_classification.sample import write_folder

FAST = {"systems": ["pvt", "efficientvit"], "budget": "6steps", "batch_size": 24, "jobs": 1, "lens": "", "progress": False}


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    return compare(data, out=out, **FAST), out


def test_it_writes_a_report_results_and_a_winner_that_loads(compared):
    result, out = compared
    written = json.loads((out / "results.json").read_text())
    assert written["winner"] == result.rows[0]["variant"] and [r["rank"] for r in written["candidates"]] == [1, 2]
    assert written["budget"] == {"asked": "6steps", "steps": 6, "batch_size": 24, "epochs": 1.5, "samples": 144}
    for row in written["candidates"]:
        low, high = row["intervals"]["accuracy"]
        assert (
            low <= row["metrics"]["accuracy"] <= high
            and row["latency_ms"] > 0
            and row["flops"] > 0
            and row["peak_memory"] > 4 * row["parameters"]
        )
        assert row["parameters"] == create(row["variant"], num_classes=4).parameters_count
    assert written["baseline"]["name"] == "logistic regression on raw pixels"
    assert written["below_baseline"] == [r["variant"] for r in written["candidates"] if not r["beats_baseline"]]
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3 and "data:image/png;base64," in page and written["winner"] in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    model = formarium.load(out / "winner")
    assert model.variant == written["winner"] and model.names == ["a", "b", "c", "d"]


def test_the_same_data_and_seed_give_the_same_leaderboard(data, compared, tmp_path):
    again = compare(data, out=tmp_path / "again", **FAST)
    assert [(r["variant"], r["metrics"]) for r in again.rows] == [(r["variant"], r["metrics"]) for r in compared[0].rows]


def test_processes_beside_one_another_give_the_same_leaderboard(data, compared, tmp_path):
    again = compare(data, out=tmp_path / "again", **{**FAST, "jobs": 2})
    assert [(r["variant"], r["metrics"]) for r in again.rows] == [(r["variant"], r["metrics"]) for r in compared[0].rows]


def test_several_seeds_are_averaged(data, tmp_path):
    result = compare(data, out=tmp_path / "out", seeds=2, **{**FAST, "systems": ["pvt"], "budget": "2steps"})
    row = result.rows[0]
    assert [s["seed"] for s in row["seeds"]] == [0, 1] and result.results["lead"] is None
    assert row["metrics"]["accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in row["seeds"]]))


def test_a_time_becomes_the_same_steps_on_any_machine(data):
    made = [c._Candidate.make(formarium.card(s), formarium.card(s).micro, data) for s in ("pvt", "smt")]
    steps = c.plan("10m", made, data, 1, 64)
    assert steps == c.plan("10m", made, data, 1, 64) == c.plan("600s", made, data, 1, 64) and steps > 100
    assert c.plan("10m", made, data, 2, 64) in (steps // 2, steps // 2 + 1) and c.plan("2ep", made, data, 1, 24) == 8
    for wrong in ("soon", "-3m", "0ep", "10 parsecs"):
        with pytest.raises(BadInput, match="budget"):
            c.plan(wrong, made, data, 1, 64)
    with pytest.raises(BadInput, match="at least"):
        c.plan("0.001s", made, data, 1, 64)


def test_limits_and_names(data, tmp_path):
    with pytest.raises(NoCandidates, match=r"pvt_micro has .* parameters, over 1,000"):
        compare(data, out=tmp_path / "a", max_params=1000, **FAST)
    with pytest.raises(NoCandidates, match="ms, over"):
        compare(data, out=tmp_path / "b", max_latency=1e-6, **FAST)
    with pytest.raises(UnknownName, match="did you mean"):
        compare(data, out=tmp_path / "c", **{**FAST, "systems": ["efficientvitt"]})
    with pytest.raises(BadInput, match="micro or published"):
        compare(data, out=tmp_path / "d", scale="huge", **FAST)
    assert c.smallest(formarium.card("pvt"), "published").name == "pvt_tiny"
    assert c.smallest(formarium.card("efficientvit"), "published").name == "efficientvit_m0"
    names = [v.name for _, v in c.candidates_for("image-classification", None, "micro")]
    assert len(names) >= 8 and all(n.endswith("_micro") for n in names)


def test_an_output_directory_is_never_lost(data, compared, tmp_path):
    _, out = compared
    with pytest.raises(RunExists, match="--overwrite"):
        compare(data, out=out, **FAST)
    with pytest.raises(RunExists, match="another comparison"):
        compare(data, out=out, resume=True, **{**FAST, "budget": "7steps"})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunExists, match="other files"):
        compare(data, out=tmp_path, overwrite=True, **FAST)
    assert (tmp_path / "notes.txt").exists()


def test_resuming_takes_finished_candidates_from_disk(data, compared, monkeypatch):
    result, out = compared
    monkeypatch.setattr(trials, "fit", lambda *a, **k: pytest.fail("fitted again"))
    again = compare(data, out=out, resume=True, **FAST)
    assert [(r["variant"], r["metrics"]) for r in again.rows] == [(r["variant"], r["metrics"]) for r in result.rows]


def test_a_candidate_that_fails_is_told_and_the_others_go_on(data, tmp_path, monkeypatch):
    plain = trials.fit

    def fit(model, *args, **kwargs):
        if model == "pvt_micro":
            raise RuntimeError("out of luck")
        return plain(model, *args, **kwargs)

    monkeypatch.setattr(trials, "fit", fit)
    result = compare(data, out=tmp_path / "out", **FAST)
    assert [r["ok"] for r in result.rows] == [True, False] and "out of luck" in result.rows[1]["error"]
    assert "out of luck" in (tmp_path / "out" / "report.html").read_text()


FIELD = {**FAST, "systems": ["pvt", "efficientvit", "smt", "iformer"], "budget": "8steps"}


@pytest.fixture(scope="module")
def halved(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("halving") / "out"
    return compare(data, out=out, **FIELD), out


def test_the_lower_half_is_stopped_early_and_said_to_be(data, halved):
    result, out = halved
    assert [(r["steps"], r["stopped"]) for r in result.rows] == [(8, False)] * 3 + [(4, True)]
    last = result.rows[-1]["variant"]
    assert result.results["stopped"] == [last]
    found = {r["variant"]: trials.Trial(r["variant"], 0, data, out, 8, 2, 24, "auto", 0).score(4) for r in result.rows}
    assert found[last] == min(found.values()) > 0
    page = (out / "report.html").read_text()
    assert "stopped after 4 steps" in page and "Stopped early" in page
    assert formarium.load(out / "runs" / f"{last}-0").variant == last


def test_who_goes_on_ends_as_if_never_stopped(data, halved, tmp_path):
    whole = compare(data, out=tmp_path / "whole", stop_early=False, **FIELD)
    assert not whole.results["stopped"]
    scores = {r["variant"]: r["metrics"] for r in whole.rows}
    assert all(scores[r["variant"]] == r["metrics"] for r in halved[0].rows if not r["stopped"])


def test_rungs_halve_the_field_and_the_time():
    assert trials.rungs(400, 19) == [(100, 19), (200, 10), (400, 5)] and trials.share(400, 19) == 19 / 4 + 10 / 4 + 5 / 2
    assert trials.rungs(400, 3) == trials.rungs(400, 3, early=False) == [(400, 3)]
    assert trials.rungs(400, 8, per_epoch=300) == [(300, 8), (400, 4)]  # never within the first epoch
    assert trials.rungs(40, 19, per_epoch=50) == [(40, 19)]


def test_stopping_early_leaves_more_steps_to_the_same_time(data):
    made = [c._Candidate.make(formarium.card(s), formarium.card(s).micro, data) for s in ("pvt", "smt", "iformer", "efficientvit")]
    whole, halved = (c.plan("10m", made, data, 1, 64, early) for early in (False, True))
    assert halved * trials.share(halved, 4) == pytest.approx(4 * whole, rel=0.01)


def test_on_ray_the_results_have_the_same_form(data, compared, halved, tmp_path):
    pytest.importorskip("ray")
    result = compare(data, out=tmp_path / "out", engine="ray", **{**FIELD, "jobs": 2})
    assert {*result.results} == {*halved[0].results} and {*result.rows[0]} == {*halved[0].rows[0]}
    ours = {r["variant"]: r for r in halved[0].rows}
    assert {r["variant"] for r in result.rows} == {*ours} and result.rows[0]["steps"] == 8
    for r in result.rows:  # the same fits, wherever both went as far
        assert r["steps"] != ours[r["variant"]]["steps"] or r["metrics"] == ours[r["variant"]]["metrics"]
    with pytest.raises(UnknownName, match="engine"):
        compare(data, out=tmp_path / "other", engine="slurm", **FAST)


def test_the_fingerprint_knows_pixels_and_labels(data):
    again = replace(data, splits=dict(data.splits))
    assert c.fingerprint(data) == c.fingerprint(again)
    val = data.splits["val"]
    again.splits["val"] = type(val)(val.images.copy(), val.labels.copy(), val.ids)
    again.splits["val"].images[0, 0, 0, 0] ^= 1
    assert c.fingerprint(data) != c.fingerprint(again)


SCRIPT = """
import sys
from formarium import compare
if __name__ == "__main__":
    compare(sys.argv[1], out=sys.argv[2], systems=["pvt", "efficientvit"], budget="40steps", batch_size=24, jobs=1, lens="",
            resume=True, progress=False)
"""


@pytest.mark.slow
def test_killed_and_resumed_it_ends_the_same(data, tmp_path):
    folder = write_folder(data, tmp_path / "bars")

    def start(out):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "whole").wait(240) == 0
    process = start(tmp_path / "cut")
    while not (tmp_path / "cut" / "runs" / "pvt_micro-0" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(tmp_path / "cut").wait(240) == 0
    rows = [json.loads((tmp_path / d / "results.json").read_text())["candidates"] for d in ("whole", "cut")]
    assert [(r["variant"], r["metrics"]) for r in rows[0]] == [(r["variant"], r["metrics"]) for r in rows[1]]


# measuring ----------------------------------------------------------------------------------------------------------


def test_bench_counts_what_can_be_counted():
    found = bench("pvt_micro", batch=2, repeats=3, seconds=1)
    again = bench("pvt_micro", batch=4, repeats=3, seconds=1)
    assert found.flops == again.flops and found.parameters == create("pvt_micro").parameters_count and found.size == (32, 32)
    assert found.latency_low <= found.latency_ms <= found.latency_high and found.throughput > 0 and 0 < found.of_peak < 1.5
    assert bench("pvt_micro", batch=1, repeats=3, seconds=1, size=64).flops > 2 * found.flops


def test_memory_is_that_of_the_tensors_alive_at_once():
    def work():
        a = torch.ones(1000, 1000)
        b = a + 1
        del a
        c_ = b + 1
        return c_.sum()

    assert activation_peak(work, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_cost_is_the_same_each_time():
    model = create("pvt_micro").eval()
    (flops, moved), (flops2, moved2) = (cost(model, model.example(1)) for _ in range(2))
    assert flops == flops2 and (moved.bytes, moved.operations) == (moved2.bytes, moved2.operations) and moved.operations > 50
    assert matmul_peak() > 1e8


def test_data_without_splits_of_its_own_is_read_from_a_folder(data, tmp_path):
    folder = write_folder(data, tmp_path / "bars")
    result = compare(folder, out=tmp_path / "out", **{**FAST, "systems": ["pvt"], "budget": "1steps"})
    assert (
        isinstance(data, Data) and result.results["data"]["name"] == "bars" and result.results["data"]["sizes"] == {"train": 96, "val": 40}
    )


def test_rivals_of_another_task_are_compared_the_same_way(tmp_path):
    found = compare("sample:motifs", task="time-series-classification", budget="2steps", out=tmp_path / "series", progress=False, jobs=1)
    row = found.rows[0]
    assert row["ok"] and row["variant"] == "shapeformer_micro" and found.results["higher_is_better"]
    assert (
        found.results["baseline"]["name"].startswith("nearest neighbour") and (tmp_path / "series" / "report.html").stat().st_size > 10_000
    )
    assert found.section.look is not None and found.section.look.numbers["own_head"]


def test_a_cost_is_counted_where_a_parameter_is_a_modules_input():
    class Fed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = torch.nn.Parameter(torch.ones(2, 8)), torch.nn.Linear(8, 4)

        def forward(self, x):
            return x.sum() + self.layer(self.token)

    model = Fed()
    assert cost(model, (torch.ones(1),))[0] == 2 * 2 * 8 * 4
    assert all(p.requires_grad for p in model.parameters())

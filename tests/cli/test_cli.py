import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from formarium.cli import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["formarium", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return run


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    from formarium import fit

    where = tmp_path_factory.mktemp("run") / "smt"
    fit("smt_micro", "sample:digits", where, steps=2, snapshots=1)
    return where


def test_list_imports_no_torch_and_no_typer():
    code = "import sys; sys.argv = ['formarium', 'list', '--json']\nfrom formarium.cli import main\n"
    code += "try: main()\nexcept SystemExit as e: code = e.code\n"
    code += "sys.exit(code or bool({'torch', 'typer', 'rich', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"system", "kind", "task", "variants"} <= {*json.loads(done.stdout)[0]}


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "formarium", "list", "--kind", "lens"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "sufo" in done.stdout


def test_list_find_show(cli):
    code, out, _ = cli("list", "--task", "image-classification", "--kind", "model")
    assert code == 0 and "pvt" in out and "sufo" not in out
    assert json.loads(cli("find", "spatial", "reduction", "attention", "--json")[1])[0]["system"] == "pvt"
    code, out, _ = cli("show", "cswin")
    assert code == 0 and "cswin_tiny_224" in out and "22,320,552" in out and "Not covered" in out and "Claim" in out
    assert json.loads(cli("show", "pvt_tiny", "--json")[1])["slug"] == "pvt"


COMMANDS = ["list", "find", "show", "compare", "demo", "fit", "evaluate", "predict", "look", "export", "bench", "verify", "check"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and f"Example: formarium {command}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "cswinn"], "did you mean"),
        (["list", "--task", "image-clasification"], "'image-classification'"),
        (["list", "--nonsense"], "unrecognized"),
        (["nonsense"], "nonsense"),
        (["fit", "pvt_micro"], "data"),
        (["compare", "/no/such/folder"], "no such path"),
        (["compare", "sample:digits", "--budget", "soon"], "budget"),
        (["compare", "sample:digits", "--max-params", "many"], "--max-params"),
        (["fit", "pvt_micro", "sample:digitz"], "did you mean 'digits'"),
        (["fit", "pvt_micro", "sample:digits", "--set", "lr"], "KEY=VALUE"),
        (["evaluate", "/no/run", "sample:digits"], "/no/run"),
        (["export", "pvt_micro", "model.bin"], ".onnx or .pt2"),
        (["verify", "--records", "/no/records"], "no such folder"),
        (["verify", "nosuch"], "nosuch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*arguments)
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1 and out == ""
    assert [*tmp_path.iterdir()] == [] or arguments[0] == "compare"


def test_fit_evaluate_predict_look_export(cli, fitted, tmp_path):
    scored = json.loads(cli("evaluate", fitted, "sample:digits", "--json")[1])
    assert scored["samples"] > 300 and 0 <= scored["metrics"]["accuracy"] <= 1 and "accuracy" in scored["intervals"]
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 10, 10)).save(tmp_path / f"{i}.png")
    rows = json.loads(cli("predict", fitted, tmp_path, "--json", "--picture", tmp_path / "seen.jpg")[1])
    assert [r["id"] for r in rows] == ["0.png", "1.png", "2.png"] and (tmp_path / "seen.jpg").exists()
    assert "probability" in cli("predict", fitted, tmp_path / "0.png")[1]
    found = json.loads(cli("look", fitted, "--data", "sample:digits", "--out", tmp_path / "look.html", "--set", "samples=60", "--json")[1])
    assert found["findings"] and "<svg" in (tmp_path / "look.html").read_text()
    code, out, _ = cli("fit", "smt_micro", "sample:digits", "--out", fitted, "--steps", 2)
    assert code == 2 and out == ""
    assert cli("bench", fitted, "--batch", 2, "--json")[0] == 0


def test_verify_reports_each_record_and_fails_where_one_fails(cli, tmp_path):
    from tests.engine.test_records import PVT, changed

    rows = json.loads(cli("verify", "pvt", "--json")[1])
    assert {"system", "variant", "ok", "worst", "parameters", "expected_parameters", "seconds", "why"} == {*rows[0]} and all(
        r["ok"] for r in rows
    )
    changed(PVT, tmp_path / "pvt" / "a.safetensors", outputs={"out.out": lambda t: t + 1})
    code, out, _ = cli("verify", "--records", tmp_path)
    assert code == 1 and "FAIL" in out
    changed(PVT, tmp_path / "pvt" / "a.safetensors", header={"system": "nosuch"})
    code, out, _ = cli("verify", "--records", tmp_path)
    assert code == 0 and "skip" in out


def test_compare_prints_a_leaderboard(cli, tmp_path, monkeypatch):
    code, out, err = cli("compare", "sample:digits", "--systems", "pvt,smt", "--budget", "1steps", "--jobs", 1, "--out", tmp_path / "out")
    assert code == 0 and "pvt_micro" in out and "comes first" in out and "report.html" in err
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "winner" / "model.safetensors").exists()
    code, _, err = cli("compare", "sample:digits", "--out", tmp_path / "out")
    assert code == 2 and "--overwrite" in err


def test_a_pickle_that_runs_code_is_refused(cli, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"state_dict": Bomb()}, tmp_path / "bad.pth")
    from formarium import create
    from formarium.errors import BadCheckpoint

    with pytest.raises(BadCheckpoint):
        create("pvt_micro").load_authors(tmp_path / "bad.pth")
    assert not (tmp_path / "exploded").exists()

"""The commands. Each is a thin face of a public function; heavy imports happen inside."""

from __future__ import annotations

import json as json_
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from formarium.errors import BadInput

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", help="Published transformer systems, each by its own name."
)
out_console, err_console = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Out = Annotated[Path, typer.Option("--out", help="The directory to write.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the directory holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the directory holds.")]
Seed = Annotated[int, typer.Option(help="Decides data order, augmentation, splits and weights.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Workers = Annotated[int, typer.Option(help="Processes that decode images.")]
DATA = "A folder (class/name.jpg, or train/ and val/), or sample:digits, sample:textures."


def print_json(value: Any) -> None:
    print(json_.dumps(value, indent=1, default=lambda v: v.item() if hasattr(v, "item") else str(v)))


def say(text: str) -> None:
    err_console.print(text, highlight=False, markup=False, soft_wrap=True)


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str = "") -> None:
    """Rich on a terminal, plain and whole elsewhere."""
    columns, rows = [*columns], [[str(v) for v in row] for row in rows]
    if not out_console.is_terminal:
        widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
        for row in [columns, *rows]:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        return
    t = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        t.add_column(column, justify="left" if i < 2 else "right")
    for row in rows:
        t.add_row(*row)
    out_console.print(t)


def amount(text: str | None, what: str) -> int | None:
    """ "1M", "500k", "2e6" as a number."""
    if text is None:
        return None
    factor = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text[-1:].lower(), 1)
    try:
        value = int(float(text[:-1] if factor != 1 else text) * factor)
    except ValueError:
        raise BadInput(what, expected='a number such as "1M" or 500000', got=repr(text)) from None
    if value <= 0:
        raise BadInput(what, expected="more than 0", got=text)
    return value


def options(pairs: list[str] | None) -> dict[str, Any]:
    """["lr=1e-3", "hflip=0.5"] as keyword arguments."""
    found = {}
    for pair in pairs or []:
        key, sign, value = pair.partition("=")
        if not sign:
            raise BadInput("--set", expected="KEY=VALUE, e.g. --set lr=1e-3", got=repr(pair))
        try:
            found[key.strip()] = json_.loads(value)
        except json_.JSONDecodeError:
            try:
                found[key.strip()] = float(value)
            except ValueError:
                found[key.strip()] = value
    return found


# knowing what there is ------------------------------------------------------------------------------------------------


@app.command("list")
def list_(
    task: Annotated[str | None, typer.Option(help="Only this task, e.g. image-classification.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only models, lenses or methods: model, lens, method.")] = None,
    json: Json = False,
) -> None:
    """All systems.

    Example: formarium list --task image-classification --json
    """
    from formarium import catalogue
    from formarium.cli.listing import show

    show(catalogue.list(task=task, kind=kind), json)


@app.command()
def find(words: Annotated[list[str], typer.Argument(help="What you need, in words.")], limit: int = 10, json: Json = False) -> None:
    """Search the cards by what you need, best first.

    Example: formarium find "fast backbone for a phone"
    """
    from formarium import catalogue
    from formarium.cli.listing import show

    found = catalogue.find(" ".join(words), limit)
    if not found and not json:
        say(f"nothing fits {' '.join(words)!r}; formarium list shows all there is")
    show(found, json)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A system or one of its variants.")], json: Json = False) -> None:
    """A system's card: what it is for, its variants and sizes, how to use it, what is not covered.

    Example: formarium show efficientvit
    """
    from dataclasses import asdict

    from formarium import catalogue

    card = catalogue.card(name)
    if json:
        print_json(asdict(card))
        return
    paper = ", ".join(str(card.paper[k]) for k in ("authors", "venue") if card.paper.get(k))
    arxiv = f", arXiv {card.paper['arxiv']}" if card.paper.get("arxiv") else ""
    print(f"{card.slug}: {card.title}\n{paper}{arxiv}; {card.kind} for {card.task}\n\n{card.summary}\n\nClaim: {card.claim}\n")
    table(
        ["variant", "scores", "parameters"],
        [[v.name, ", ".join(f"{k.replace('_', ' ')} {s}" for k, s in v.published.items() if k != "parameters"),
          f"{v.parameters:,}" if v.parameters else ""] for v in card.variants.values()],
    )  # fmt: skip
    first = next(iter(card.variants), "")
    if card.kind == "model":
        classes = ", num_classes=10" if card.task == "image-classification" else ""
        print(f'\nUse: formarium.create("{first}"{classes}); formarium fit {card.slug}_micro DATA --out runs/{card.slug}')
    else:
        print(f"\nUse: from {card.module} import {card.class_name}")
    for label, values in (("Published recipe", card.recipe), ("Demo recipe", card.demo)):
        if values:
            print(f"{label}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
    print("\nNot covered:\n" + "\n".join(f"- {limit}" for limit in card.limits))


# the main job ---------------------------------------------------------------------------------------------------------


@app.command()
def compare(
    path: Annotated[str, typer.Argument(help=DATA)],
    task: Annotated[str, typer.Option(help="The task that rivals share.")] = "image-classification",
    systems: Annotated[str | None, typer.Option(help="Only these, by slug or variant: cswin,smt,pvt_tiny.")] = None,
    budget: Annotated[str, typer.Option(help='The same for all: "20ep", "2000steps", or a time ("10m") for the whole comparison.')] = "10m",
    scale: Annotated[str, typer.Option(help="micro (small variants) or published (the smallest published ones).")] = "micro",
    max_params: Annotated[str | None, typer.Option(help="Limit on parameters, e.g. 1M.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Limit on milliseconds for one sample, measured here.")] = None,
    seeds: Annotated[int, typer.Option(help="Repeats of every candidate.")] = 1,
    seed: Seed = 0,
    out: Out = Path("runs/compare"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on files that can't be decoded.")] = False,
    precision: Precision = "auto",
    workers: Workers = 0,
    jobs: Annotated[int | None, typer.Option(help="Fits at a time (one a core at micro scale by default).")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: Ray Tune with ASHA, here or on the cluster it is connected to.")] = "local",
    stop_early: Annotated[bool, typer.Option("--stop-early/--all", help="Stop candidates that fall behind, or fit all to the end.")] = True,
    json: Json = False,
) -> None:
    """Which design is best for your data, inside your limits? Fits rivals under one budget and writes a report.

    Example: formarium compare my_photos/ --budget 10m --max-params 1M --out runs/photos
    """
    from formarium.engine import compare as run

    result = run(
        path, task=task, systems=[s for s in (systems or "").replace(",", " ").split() if s] or None, budget=budget, scale=scale,
        max_params=amount(max_params, "--max-params"), max_latency=max_latency, seeds=seeds, seed=seed, out=out, resume=resume,
        overwrite=overwrite, strict=strict, precision=precision, workers=workers, jobs=jobs,
        engine=engine, stop_early=stop_early, say=say,
    )  # fmt: skip
    if json:
        print_json(result.results)
        return
    leaderboard(result)
    say(f"report: {out / 'report.html'}    winner: {out / 'winner'}")


def leaderboard(result: Any) -> None:
    from formarium.report.page import count, verdict

    metric = result.results["metric"]
    rows = []
    for r in result.rows:
        if not r["ok"]:
            rows.append(["-", r["variant"], "failed", "", "", "", "", r["error"][:60]])
            continue
        low, high = r["intervals"].get(metric, (0, 0))
        above = "better" if r["beats_baseline"] else "not better"
        name = r["variant"] + (f" (stopped at {r['steps']})" if r["stopped"] else "")
        rows.append([r["rank"], name, f"{r['metrics'][metric]:.4f}", f"{low:.3f}-{high:.3f}", f"{r['latency_ms']:.2f}",
                     f"{r['throughput']:.0f}", count(r["parameters"]), above])  # fmt: skip
    table(["#", "candidate", metric, "95% interval", "latency ms", "samples/s", "parameters", "baseline"], rows)
    for line in verdict(result.results):
        print(line)


@app.command()
def demo(
    out: Out = Path("runs/demo"), budget: str | None = None, seed: Seed = 0, resume: Resume = False, overwrite: Overwrite = False
) -> None:
    """The main job on the sample data: every image backbone, on digits and on textures, in one report.

    Example: formarium demo --out runs/demo
    """
    from formarium.engine.comparison import demo as run

    for result in run(out, overwrite=overwrite, resume=resume, budget=budget, seed=seed, say=say):
        print(f"\n{result.section.title}")
        leaderboard(result)
    say(f"\nreport: {out / 'report.html'}    winner: {out / 'winner'}")


# one model ------------------------------------------------------------------------------------------------------------


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A variant's name.")],
    data: Annotated[str, typer.Argument(help=DATA)],
    out: Out = Path("runs/fit"),
    epochs: float | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any recipe key: --set ema=0.999 --set hflip=0.5")] = None,
    seed: Seed = 0,
    precision: Precision = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    snapshots: Annotated[int, typer.Option(help="States to keep for `look` to follow.")] = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    workers: Workers = 0,
    json: Json = False,
) -> None:
    """Train one model and leave a run directory.

    Example: formarium fit smt_micro sample:digits --epochs 10 --out runs/smt
    """
    from formarium.engine import fit as run

    done = run(
        model, data, out, resume=resume, overwrite=overwrite, seed=seed, precision=precision, compile=compile, snapshots=snapshots,
        workers=workers, epochs=epochs, steps=steps, lr=lr, batch_size=batch_size, **options(set_),
    )  # fmt: skip
    if json:
        print_json({"path": str(out), "metrics": done.summary, "seconds": done.config["seconds"]})
        return
    table(["metric", "held-out"], [[k, f"{v:.4f}"] for k, v in done.summary.items()])
    say(f"run: {out}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run directory (or a Hub repository).")],
    data: Annotated[str, typer.Argument(help=DATA)],
    split: str = "val",
    precision: Precision = "auto",
    workers: Workers = 0,
    json: Json = False,
) -> None:
    """Score a run on labelled data, with 95% bootstrap intervals.

    Example: formarium evaluate runs/smt sample:digits
    """
    from formarium.engine import evaluate as score

    found = score(run, data, split, precision=precision, workers=workers)
    if json:
        print_json({"samples": found.samples, "metrics": found.metrics, "intervals": found.intervals})
        return
    spans = {k: f"{low:.4f}-{high:.4f}" for k, (low, high) in found.intervals.items()}
    table(["metric", "value", "95% interval"], [[k, f"{v:.4f}", spans.get(k, "")] for k, v in found.metrics.items()])


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run directory (or a Hub repository).")],
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs (or texts, where the model reads them).")],
    picture: Annotated[Path | None, typer.Option(help="Draw the first samples to this image.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the predictions to this folder, in the field's own formats.")] = None,
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """What a run says of files nobody has labelled.

    Example: formarium predict runs/smt photos/*.jpg --picture seen.png
    """
    from formarium.engine.prediction import predictions
    from formarium.engine.runs import as_model
    from formarium.task import task

    model = as_model(run)
    found = predictions(model, paths, precision=precision)
    rows = [row for batch, _, _ in found for row in batch]
    if picture is not None:
        _, prediction, batch = found[0]
        task(model.task).draw(prediction, batch, model.names).save(picture)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        written = [path for _, prediction, batch in found for path in task(model.task).write(prediction, batch, out, model.names)]
        say(f"{len(written)} files in {out}")
    if json:
        print_json(rows)
        return
    columns = [k for k in rows[0] if not isinstance(rows[0][k], (list, dict))]
    table(columns, [[f"{r[c]:.4f}" if isinstance(r[c], float) else r[c] for c in columns] for r in rows])


@app.command()
def look(
    run: Annotated[str, typer.Argument(help="A run directory.")],
    data: Annotated[str, typer.Option(help=DATA)],
    lens: Annotated[str, typer.Option(help="A lens by slug.")] = "sufo",
    split: str = "val",
    before: Annotated[str | None, typer.Option(help="A run directory: the model before fine-tuning.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the page goes (RUN/look-LENS.html by default).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="An option of the lens: --set KEY=VALUE")] = None,
    json: Json = False,
) -> None:
    """What a lens finds in a run, as a page with figures.

    Example: formarium look runs/smt --lens sufo --data sample:digits
    """
    from formarium.engine import look as run_lens
    from formarium.report.page import write_look

    report = run_lens(run, lens, data, split=split, before=before, **options(set_))
    where = write_look(out or Path(run) / f"look-{lens}.html", report)
    if json:
        print_json({"title": report.title, "findings": report.findings, "numbers": report.numbers, "page": str(where)})
        return
    for finding in report.findings:
        print(f"- {finding}")
    say(f"page: {where}")


@app.command()
def shrink(
    run: Annotated[str, typer.Argument(help="A run directory, or a variant's name (fitted first).")],
    method: Annotated[str, typer.Option(help="sit_slim, ofb, llm_int8, lgvit ... (formarium list --kind method).")],
    data: Annotated[str, typer.Option(help=DATA)],
    target: Annotated[float | None, typer.Option(help="How much to keep, as the method counts it: 0.5 is half.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run directory to write (RUN-METHOD by default).")] = None,
    epochs: float | None = None,
    steps: int | None = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="An option of the method: --set KEY=VALUE")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a run smaller or faster; its size, latency and scores before and after.

    Example: formarium shrink runs/smt --method ofb --data sample:digits --target 0.5
    """
    from formarium.engine import shrink as apply

    where = out or Path(f"{run}-{method}" if Path(run).is_dir() else f"runs/{run}-{method}")
    found = apply(
        run, method, data, target=target, out=where, epochs=epochs, steps=steps, seed=seed, overwrite=overwrite, **options(set_)
    )  # fmt: skip
    if json:
        print_json({"method": method, "rows": found.rows(), "path": str(where)})
        return

    def shown(v: float) -> str:
        return f"{v:,}" if isinstance(v, int) else f"{v:.4g}"

    table(["", "before", "after", "change"], [[r["what"].replace("_", " "), shown(r["before"]), shown(r["after"]),
          f"x{r['ratio']:.2f}" if "ratio" in r else f"{r['difference']:+.4f}"] for r in found.rows()])  # fmt: skip
    say(f"run: {where}")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run directory, or a variant's name.")],
    path: Annotated[Path, typer.Argument(help="model.onnx or model.pt2")],
    format: Annotated[str | None, typer.Option(help="onnx or torch; by default what the file's name says.")] = None,
    json: Json = False,
) -> None:
    """Write a run as ONNX or torch.export, checked against the model.

    Example: formarium export runs/smt model.onnx
    """
    from formarium.exporters import export as write

    kinds = {".onnx": "onnx", ".pt2": "torch"}
    if format is None and path.suffix not in kinds:
        raise BadInput(str(path), expected="a name ending in .onnx or .pt2", got=path.suffix or "no ending", fix="or give --format")
    where = write(run, path, format=format or kinds[path.suffix])
    if json:
        print_json({"path": str(where), "bytes": where.stat().st_size})
        return
    print(f"{where} ({where.stat().st_size / 2**20:.1f} MiB), checked against the model")


@app.command()
def bench(
    names: Annotated[list[str], typer.Argument(help="Variants or run directories.")],
    batch: int = 32,
    size: Annotated[int | None, typer.Option(help="Another input size.")] = None,
    precision: Precision = "auto",
    json: Json = False,
) -> None:
    """Latency, throughput, FLOPs, memory, and the share of this machine's matmul peak.

    Example: formarium bench smt_t efficientvit_m0 --batch 8
    """
    from formarium.engine import bench as measure
    from formarium.report.page import count, si

    found = [measure(name, batch=batch, size=size, precision=precision) for name in names]
    if json:
        print_json([b.as_dict() for b in found])
        return
    table(
        ["variant", "precision", "latency ms", f"samples/s at {batch}", "parameters", "FLOPs", "memory", "of peak"],
        [[b.variant, b.precision, f"{b.latency_ms:.2f}", f"{b.throughput:.1f}", count(b.parameters), count(b.flops),
          si(b.peak_memory, 1024) + "B", f"{b.of_peak:.0%}"] for b in found],
    )  # fmt: skip


# trust ----------------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    slugs: Annotated[list[str] | None, typer.Argument(help="Systems; all by default.")] = None,
    records: Annotated[Path, typer.Option(help="A folder of parity records.")] = Path("tests/parity"),
    json: Json = False,
) -> None:
    """Replay parity records: what the reference computes, computed here, within 1e-4. Exits with 1 if any fails.

    Example: formarium verify tnt pvt --records tests/parity
    """
    from formarium.engine import verify as replay

    outcomes = []
    for r in replay(slugs or [], records):
        outcomes.append(r)
        if not json:
            word = {True: "ok  ", False: "FAIL", None: "skip"}[r.ok]
            counted = f"{r.parameters:>12,} / {r.expected_parameters or 0:,} parameters" if r.parameters is not None else "a part"
            worst = f"worst {r.worst:.1e}" if r.worst is not None else ""
            print(f"{word} {r.system:14} {r.variant:32} {counted:40} {worst:15} {r.seconds:6.1f} s  {r.why}".rstrip(), flush=True)
    if json:
        print_json([r.as_dict() for r in outcomes])
    raise typer.Exit(1 if any(r.ok is False for r in outcomes) else 0)


@app.command()
def check(slug: Annotated[str, typer.Argument(help="A system.")], json: Json = False) -> None:
    """The conformance suite for one system, for people who add one. Exits with 1 if any check fails.

    Example: formarium check pvt
    """
    from formarium.conformance import check as run

    outcomes = []
    for c in run(slug):
        outcomes.append(c)
        if not json:
            print(f"{'ok  ' if c.ok else 'FAIL'} {c.check.replace('_', ' '):60} {c.seconds:6.1f} s  {c.detail}", flush=True)
    if json:
        print_json([{"check": c.check, "ok": c.ok, "detail": c.detail, "seconds": c.seconds} for c in outcomes])
    raise typer.Exit(0 if all(c.ok for c in outcomes) else 1)

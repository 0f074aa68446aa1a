"""Pages made from the cards: one a system, their index, and the README's table (`python docs/pages.py` rewrites that)."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

from mkdocs.structure.files import File

from formarium.cards import Card
from formarium.catalogue import cards
from formarium.task import TASKS, task

ROOT = Path(__file__).parent.parent
SPEEDS = "<!-- speeds: benchmarks/speed.json -->"
START, END = "<!-- systems: made by docs/pages.py -->", "<!-- /systems -->"


def on_files(files, config):
    """mkdocs hook: add the pages of the cards."""
    files.append(File.generated(config, "systems/index.md", content="# Systems\n\n" + table("")))
    files.append(File.generated(config, "tasks.md", content=tasks()))
    for card in cards().values():
        files.append(File.generated(config, f"systems/{card.slug}.md", content=page(card)))
    return files


def on_nav(nav, config, files):
    return nav


def on_page_markdown(markdown, page, config, files):
    """mkdocs hook: the table of measured speeds, where a page asks for it."""
    return markdown.replace(SPEEDS, speeds())


@cache
def measured(kind: str) -> dict[str, dict]:
    """What a script of benchmarks/ wrote last, by system."""
    path = ROOT / "benchmarks" / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def speeds() -> str:
    lines = ["| system | timed | forward | training | beside |", "| --- | --- | --- | --- | --- |"]
    for slug, found in sorted(measured("speed").items()):
        for name in dict.fromkeys(r["name"] for r in found["rows"]):
            ratios = {r["mode"]: f"{r['ratio']:.2f}" for r in found["rows"] if r["name"] == name}
            lines.append(
                f"| [`{slug}`](../systems/{slug}.md) | {name} | {ratios.get('forward', '')} | {ratios.get('train', '')} | {found['peer']} |"
            )
    return "\n".join(lines)


def results(card: Card) -> list[str]:
    """What was measured of a system: its demo beside the trivial rival, its speed beside its authors' code."""
    parts = []
    if demo := measured("demos").get(card.slug):
        key, rival = demo["metric"], demo["baseline"]
        parts.append(
            f"On `sample:{demo['data']}`: {key.replace('_', ' ')} {demo['score']:.3g} after {demo['fit_seconds']:.0f} s of training; "
            f"{rival['name']}: {rival[key]:.3g} (`{demo['command']}`, seed {demo['seed']}, {demo['machine']}, threads: {demo['threads']})."
        )
    if speed := measured("speed").get(card.slug):
        rows = "; ".join(
            f"{r['name']}, {'training step' if r['mode'] == 'train' else r['mode']} {r['ms']:.0f} ms against {r['peer_ms']:.0f} ms "
            f"({r['ratio']:.2f}x)"
            for r in speed["rows"]
        )
        parts.append(f"Beside {speed['peer']} (`{speed['command']}`, {speed['machine']}, threads: {speed['threads']}): {rows}.")
    return parts


def table(prefix: str = "systems/", linked: bool = True) -> str:
    rows = ["| system | kind | task | paper | variants |", "| --- | --- | --- | --- | --- |"]
    for c in cards().values():
        name = f"[`{c.slug}`]({prefix}{c.slug}.md)" if linked else f"`{c.slug}`"
        rows.append(f"| {name} | {c.kind} | {c.task.replace('-', ' ')} | {c.title} ({c.paper.get('venue', '')}) | {len(c.published)} |")
    return "\n".join(rows) + "\n"


def tasks() -> str:
    """The page of the tasks: what each reads and predicts, in the words of its package, with its metric and sample data."""
    parts = ["# Tasks", "What rivals share. `formarium fit VARIANT DATA` and `compare DATA --task TASK` take a path or `sample:NAME`."]
    for name, module in TASKS.items():
        own, text = task(name), (import_module(module).__doc__ or "").strip()
        head, _, rest = text.partition("\n")
        systems = ", ".join(f"[`{c.slug}`](systems/{c.slug}.md)" for c in cards().values() if c.task == name)
        keys = f" Recipe keys of its own: {', '.join(f'`{k}`' for k in own.recipe_keys)}." if own.recipe_keys else ""
        parts += [
            f"## {name}",
            f"{head}  \n{' '.join(rest.split())}",
            f"Metric: `{own.metric}`, {'higher' if own.higher_is_better else 'lower'} is better. "
            f"Sample data: {', '.join(f'`sample:{s}`' for s in own.samples)}.{keys} Systems: {systems}.",
        ]
    return "\n\n".join(parts) + "\n"


def page(card: Card) -> str:
    paper = card.paper
    link = f"[arXiv {paper['arxiv']}](https://arxiv.org/abs/{paper['arxiv']})" if paper.get("arxiv") else ""
    parts = [
        f"# {card.slug}",
        f"**{card.title}**  \n{paper.get('authors', '')}, {paper.get('venue', '')} {link}",
        card.summary,
        "## Use it",
        f"```python\n{example(card)}\n```",
    ]
    picture = ROOT / "docs" / "pictures" / f"{card.slug}.png"
    if picture.exists():
        parts.append(f"![what it gives on the sample data](../pictures/{card.slug}.png)")
    if found := results(card):
        parts += ["## Measured", *found]
    parts += ["## Claim", card.claim, "## Limits", "\n".join(f"- {limit}" for limit in card.limits)]
    if card.variants:
        parts += ["## Variants", _variants(card)]
    if card.recipe:
        parts += ["## Published recipe", _pairs(card.recipe)]
    if card.demo:
        parts += ["## Demo recipe", _pairs(card.demo)]
    if card.reference.get("repo"):
        ref = card.reference
        parts.append(
            f"Reference: [{ref['repo']}](https://github.com/{ref['repo']}) at `{ref.get('commit', '')[:10]}`, {ref.get('license', '')}."
        )
    return "\n\n".join(parts) + "\n"


def example(card: Card) -> str:
    """A few lines that run as they stand (the tests run each)."""
    if "example" in card.demo:
        return str(card.demo["example"]).strip()
    first = next(iter(card.published), f"{card.slug}_micro")
    images = card.task == "image-classification"
    name = str(card.demo.get("data", task(card.task).samples[0])).removeprefix("sample:")
    classes, own, steps = (", num_classes=10", ": class/name.jpg", ", steps=20") if images else ("", "", "")
    return (
        "import formarium\n\n"
        f'model = formarium.create("{first}"{classes})          # .load_authors("checkpoint.pth") for released weights\n'
        f'run = formarium.fit("{card.slug}_micro", "sample:{name}"{steps})   # or data of your own{own}\n'
        f'print(formarium.evaluate(run, "sample:{name}").metrics)'
    )


def _variants(card: Card) -> str:
    keys = [*dict.fromkeys(k for v in card.variants.values() for k in v.published if k != "parameters")]
    lines = ["| variant | parameters | " + " | ".join(k.replace("_", " ") for k in keys) + " |", "| --- " * (len(keys) + 2) + "|"]
    for v in card.variants.values():
        count = f"{v.parameters:,}" if v.parameters else ""
        lines.append(f"| `{v.name}` | {count} | " + " | ".join(str(v.published.get(k, "")) for k in keys) + " |")
    return "\n".join(lines)


def _pairs(values) -> str:
    return ", ".join(f"{k.replace('_', ' ')} `{v}`" for k, v in values.items() if k != "example")


def readme(text: str) -> str:
    """The README with its table of systems made anew."""
    return re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: f"{START}\n{table(linked=False)}{END}", text, flags=re.S)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)

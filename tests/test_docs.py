import sys
from pathlib import Path

import pytest

from formarium.catalogue import cards

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")
sys.path.insert(0, str(ROOT / "docs"))
import pages  # noqa: E402


def test_the_readmes_table_is_that_of_the_cards():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == pages.readme(text), "run: python docs/pages.py"


@pytest.mark.parametrize("slug", [*cards()])
def test_a_page_says_what_the_card_says(slug):
    card = cards()[slug]
    text = pages.page(card)
    assert card.title in text and card.claim in text and all(limit in text for limit in card.limits)
    assert all(f"`{name}`" in text for name in card.variants)
    compile(pages.example(card), slug, "exec")


def test_what_was_measured_stands_on_the_pages_of_systems_there_are():
    demos, speeds = pages.measured("demos"), pages.measured("speed")
    assert demos and speeds and {*demos, *speeds} <= {*cards()}
    assert all(found["better"] for found in demos.values())  # a demo that loses to the trivial rival is none
    for slug in ("hat", "dsvt"):
        text = pages.page(cards()[slug])
        assert demos[slug]["command"] in text and f"{speeds[slug]['rows'][0]['ratio']:.2f}x" in text
    table = pages.on_page_markdown(f"before {pages.SPEEDS} after", None, None, None)
    assert pages.SPEEDS not in table and all(f"`{slug}`" in table for slug in speeds)
    assert pages.SPEEDS in (pages.ROOT / "docs" / "guides" / "speed.md").read_text(encoding="utf-8")


def test_a_pages_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = pages.example(cards()["pvt"]).replace("steps=20", "steps=1")
    exec(compile(code, "example", "exec"), {})
    assert "accuracy" in capsys.readouterr().out

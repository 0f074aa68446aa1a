"""One suite over every system in the catalogue, on its smallest variant."""

import pytest

from formarium.catalogue import cards
from formarium.conformance import checks_for, run

SLOW = {"exports_to_onnx"}  # ten seconds and more a system; the exporters' own tests go the same way quickly
SLOW_TO_TRACE = {"arbex", "dualtoken_vit", "fcos", "fmvit", "genconvit", "stvit", "vit_comer"}


def cases():
    for card in cards().values():
        for name in checks_for(card):
            slow = name in SLOW or (name == "exports_to_torch" and card.slug in SLOW_TO_TRACE)
            yield pytest.param(card.slug, name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("slug", "name"), [*cases()])
def test_conformance(slug: str, name: str):
    outcome = run(cards()[slug], name)
    assert outcome.ok, outcome.detail

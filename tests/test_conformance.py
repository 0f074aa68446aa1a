"""One suite over every system in the catalogue, on its smallest variant."""

import pytest

from formarium.catalogue import cards
from formarium.conformance import checks_for, run


@pytest.mark.parametrize(("slug", "name"), [(c.slug, name) for c in cards().values() for name in checks_for(c)])
def test_conformance(slug: str, name: str):
    outcome = run(cards()[slug], name)
    assert outcome.ok, outcome.detail

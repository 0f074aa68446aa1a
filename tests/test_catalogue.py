import subprocess
import sys

import pytest

import formarium
from formarium.errors import BadInput, UnknownName


def test_listing_imports_no_torch():
    code = "import formarium, sys; formarium.list(); formarium.find('image'); sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_by_task_and_kind():
    assert "pvt" in [c.slug for c in formarium.list(task="image-classification", kind="model")]
    assert all(c.kind == "lens" for c in formarium.list(kind="lens"))
    with pytest.raises(UnknownName, match="image-classification"):
        formarium.list(task="image-clasification")


def test_a_name_finds_its_card_and_variant():
    card, variant = formarium.catalogue.resolve("pvt_small")
    assert card.slug == "pvt" and variant.config["depths"] == [3, 4, 6, 3] and variant.config["dims"] == [64, 128, 320, 512]
    assert formarium.card("pvt_small") is formarium.card("pvt")


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(UnknownName, match="did you mean 'pvt_small'"):
        formarium.create("pvt_smal")
    with pytest.raises(UnknownName, match="num_classes"):
        formarium.create("pvt_micro", num_class=3)


def test_find_ranks_by_what_a_person_needs():
    assert formarium.find("spatial reduction attention")[0].slug == "pvt"
    assert formarium.find("xyzzy") == []
    with pytest.raises(BadInput):
        formarium.find("  ")


def test_create_takes_overrides_and_remembers_where_it_is_from():
    model = formarium.create("pvt_micro", num_classes=3)
    assert model.config.num_classes == 3 and model.variant == "pvt_micro" and model.card.slug == "pvt"
    assert model.preprocessing["size"] == 32


def test_every_variant_name_belongs_to_one_system():
    names = [v for c in formarium.list() for v in c.variants]
    assert len(names) == len(set(names))


def test_public_names_exist():
    for name in formarium.__all__:
        assert callable(getattr(formarium, name)), name
    with pytest.raises(AttributeError, match="offers"):
        _ = formarium.nothing

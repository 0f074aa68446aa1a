import pytest

import formarium
from formarium.engine.recipes import Recipe, make_recipe, recipe_for
from formarium.errors import BadInput, UnknownName

IMAGES = "image-classification"


def test_recipes_come_from_the_cards():
    published = recipe_for("pvt_tiny")
    assert published.epochs == 300 and published.augment["crop_scale"] == (0.08, 1.0) and published.repeated_augmentation == 3
    assert recipe_for("pvt_micro").augment == {"shift": 2}
    assert recipe_for("pvt_large").drop_path == 0.3
    card = formarium.card("pvt")
    assert recipe_for(card, card.variants["pvt_tiny"]) == published == recipe_for(formarium.create("pvt_tiny", depths=(1, 1, 1, 1)))
    assert make_recipe(published.as_dict(), IMAGES) == published


@pytest.mark.parametrize("kind", ["published", "demo"])
def test_every_card_holds_recipes_that_can_be(kind):
    for card in formarium.list(kind="model"):
        for variant in card.variants.values():
            assert recipe_for(card, variant, kind).lr > 0


def test_a_published_rate_follows_the_batch_size_and_none_overrides_nothing():
    published = recipe_for("pvt_tiny")
    assert recipe_for("pvt_tiny", batch_size=512).lr == pytest.approx(published.lr / 2)
    assert recipe_for("pvt_tiny", batch_size=512, lr=1e-4).lr == 1e-4
    assert recipe_for("pvt_tiny", batch_size=None, lr=None, epochs=None) == published


def test_steps_win_over_epochs():
    assert Recipe(epochs=3).total_steps(10) == 30 and Recipe(epochs=3, steps=7).total_steps(10) == 7
    assert Recipe(epochs=0.01).total_steps(10) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lrr": 1e-3}, "'lr'"),
        ({"optimizer": "adamv"}, "'adamw'"),
        ({"clip_mode": "value"}, "clip_mode"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "whole number"),
        ({"steps": 0}, "steps"),
        ({"lr": "fast"}, "lr: expected a number, more than 0, got 'fast'"),
        ({"lr": -1.0}, "lr"),
        ({"ema": 1.0}, "ema"),
        ({"drop_path": 1.5}, "drop_path"),
        ({"weight_decay": -0.1}, "at least 0"),
    ],
)
def test_values_that_cannot_be_are_said(values, said):
    with pytest.raises((BadInput, UnknownName), match=said):
        make_recipe(values, IMAGES)

"""The rule that names a cause, and the effects that it stands on."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from qatrun.evaluate.attribution import EFFECTS, accuracies, answer_log_probability, effects, findings
from qatrun.evaluate.scores import ItemScores, Scores, TaskScore
from qatrun.records.diagnosis import Effect

NUM_ITEMS = 400


def scores(accuracy: float, *, nats: float = 0.0, text: float = 0.0, seed: int = 0, order: int = 0) -> Scores:
    """A model right on the first share of the items, whose right answer stands `nats` lower among four choices, all of
    which are `text` nats less likely."""
    rng = np.random.default_rng(seed)
    choices = rng.normal(size=(NUM_ITEMS, 4))
    choices[:, 0] += 1.0 - nats
    choices -= text
    ids = np.array([f"item:{i}:x" for i in range(NUM_ITEMS)])
    correct = np.arange(NUM_ITEMS) < accuracy * NUM_ITEMS
    rows = np.random.default_rng(order).permutation(NUM_ITEMS) if order else np.arange(NUM_ITEMS)
    items = ItemScores(ids[rows], correct[rows], choices[rows, 0], choices[rows])
    return Scores({"task": TaskScore("task", "acc", 0, 0, NUM_ITEMS, items)}, {})


def study(**drops: tuple[float, float]) -> dict[str, Effect]:
    """Effects between models, each given as its (accuracy, nats)."""
    healthy = dict.fromkeys(("start", "twin", "ptq", "off", "on", "fresh"), (0.8, 0.0))
    models = {name: scores(a, nats=n) for name, (a, n) in (healthy | drops).items()}
    return effects(models, {})


@pytest.mark.parametrize(
    ("drops", "clipped", "found"),
    [
        ({}, False, ()),
        ({}, True, ()),  # clipping that does no harm is none
        ({"on": (0.794, 0.003)}, True, ()),
        (dict.fromkeys(("twin", "ptq", "off", "on", "fresh"), (0.6, 0.3)), False, ("forgetting",)),
        ({"on": (0.6, 0.5)}, True, ("saturation",)),
        ({"on": (0.6, 0.5), "off": (0.5, 0.9)}, True, ("saturation",)),  # weights that have adapted to the clip
        ({"on": (0.6, 0.5), "ptq": (0.6, 0.5), "fresh": (0.6, 0.5)}, False, ("resolution",)),
        ({"on": (0.5, 0.9), "ptq": (0.6, 0.5)}, True, ("saturation", "resolution")),
        ({"on": (0.6, 0.5)}, False, ("divergence",)),
        (
            {"twin": (0.6, 0.3), "ptq": (0.6, 0.3), "on": (0.4, 0.9), "off": (0.5, 0.6), "fresh": (0.5, 0.5)},
            True,
            ("forgetting", "saturation"),
        ),
    ],
)
def test_the_rule(drops: dict[str, tuple[float, float]], clipped: bool, found: tuple[str, ...]) -> None:
    assert findings(study(**drops), clipped=clipped) == found


def test_a_drop_in_log_probability_alone_is_enough() -> None:
    """What accuracy over so few items cannot show."""
    effect = study(on=(0.8, 0.05))["whole"]
    assert effect.ci95_pp[0] < 1.0
    assert effect.ci95_loglikelihood[0] > 0.02
    assert findings(study(on=(0.8, 0.05)), clipped=True) == ("saturation",)


def test_text_that_all_choices_lose_alike_tells_a_clip_and_nothing_else() -> None:
    twin = scores(0.8)
    blurred = scores(0.8, text=0.05)
    models = dict.fromkeys(("start", "twin", "ptq", "off", "on", "fresh"), twin)
    found = effects(models | {"on": blurred}, {})
    assert found["whole"].loglikelihood == pytest.approx(0.0, abs=1e-9)
    assert found["whole"].text_loglikelihood == pytest.approx(0.05)
    assert findings(found, clipped=True) == ("saturation",)
    assert findings(found, clipped=False) == ()
    assert findings(effects(models | {"on": blurred, "ptq": blurred}, {}), clipped=True) == ()  # the price of the grid
    barely = effects(models | {"on": scores(0.8, text=0.003)}, {})
    assert findings(barely, clipped=True) == ()


def test_a_longer_answer_may_lose_more() -> None:
    twin, after = scores(0.8), scores(0.8, text=0.05)
    long = {"twin": Scores({"task": replace(twin.tasks["task"], num_answer_tokens=20 * NUM_ITEMS)}, {}), "on": after}
    effect = effects(long, {})["whole"]
    assert effect.text_loglikelihood == pytest.approx(0.05 / 20)
    assert effect.ci95_text_loglikelihood == pytest.approx([0.05 / 20, 0.05 / 20])


def test_effects_pair_items_by_name_whatever_their_order() -> None:
    models = {"start": scores(0.8), "twin": scores(0.7, nats=0.1, order=5)}
    effect = effects(models, {"start": 1.0, "twin": 1.5})["training"]
    assert effect.drop_pp == pytest.approx(10.0)
    assert effect.loglikelihood == pytest.approx(
        effects({**models, "twin": scores(0.7, nats=0.1)}, {})["training"].loglikelihood
    )
    assert effect.log_perplexity == pytest.approx(0.5)
    low, high = effect.ci95_loglikelihood
    assert low < effect.loglikelihood < high
    assert high - low < 0.02  # paired: the same items


def test_effects_need_both_models() -> None:
    assert set(effects({"start": scores(0.8), "twin": scores(0.8)}, {})) == {"training"}
    assert set(study()) == set(EFFECTS)
    assert study()["whole"].log_perplexity is None


def test_an_effect_is_over_the_items_that_both_models_answered() -> None:
    whole = {"start": scores(0.8), "twin": scores(0.7, nats=0.1)}
    task = whole["twin"].tasks["task"]
    some = slice(0, None, 3)
    items = ItemScores(*(getattr(task.items, field.name)[some] for field in fields(ItemScores)))
    fewer = replace(task, items=items, num_answer_tokens=2 * len(items.item_id))
    sampled = {**whole, "twin": Scores({"task": fewer}, {})}
    effect = effects(sampled, {})["training"]
    lost = whole["start"].tasks["task"].items.loglikelihood[some] - items.loglikelihood
    assert effect.text_loglikelihood == pytest.approx(lost.mean() / 2)
    before = whole["start"].tasks["task"].items.correct[some].mean()
    assert effect.drop_pp == pytest.approx(100 * (before - items.correct.mean()))
    assert accuracies(sampled, "task") == pytest.approx({"start": before, "twin": items.correct.mean()})


def test_answer_log_probability_is_among_the_choices() -> None:
    items = ItemScores(
        np.array(["a", "b"]),
        np.array([True, False]),
        np.array([-1.0, -3.0]),
        np.array([[-1.0, -1.0, np.nan], [-3.0, -2.0, -1.0]]),
    )
    found = answer_log_probability(TaskScore("t", "acc", 0, 0, 2, items))
    assert found[0] == pytest.approx(math.log(0.5))
    assert found[1] == pytest.approx(-3 - math.log(math.exp(-3) + math.exp(-2) + math.exp(-1)))
    alone = ItemScores(np.array(["a"]), np.array([True]), np.array([-2.5]), np.array([[-2.5]]))
    assert answer_log_probability(TaskScore("t", "acc", 0, 0, 1, alone)).tolist() == [-2.5]

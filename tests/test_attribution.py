"""The effects that a diagnosis stands on: items paired by name, texts by sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import pytest

from qatrun.evaluate.attribution import EFFECTS, THIRDS, Models, accuracies, answer_log_probability
from qatrun.evaluate.scores import ItemScores, Scores, TaskScore
from qatrun.records.diagnosis import Effect
from qatrun.records.scores import STRATA, TextScore, TextScores

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


def effects(models: Mapping[str, Scores]) -> dict[str, Effect]:
    return {effect.name: effect for effect in Models(models, {}).effects()}


def text(nats: float, *, name: str = "a", num: int = 40, noise: float = 0.0, rare: float = 0.0) -> TextScore:
    """A model that takes so many nats a token of each of `num` sequences of 120 targets, more of the rare third."""
    spread = np.random.default_rng(0).normal(size=(num, 1)) * noise
    of_strata = 40 * (nats + spread + np.array([0.0, 0.0, rare]))
    return TextScore(text=name, nats=of_strata.tolist(), num_targets=[[40, 40, 40]] * num, entropy=5.0, uniform=6.0)


def read(**nats: TextScore) -> Models:
    return Models({}, {name: TextScores(texts={"held-out": score, "known": score}) for name, score in nats.items()})


def test_a_longer_answer_may_lose_more() -> None:
    twin, after = scores(0.8), scores(0.8, text=0.05)
    long = {"twin": Scores({"task": replace(twin.tasks["task"], num_answer_tokens=20 * NUM_ITEMS)}, {}), "on": after}
    effect = effects(long)["whole"]
    assert effect.text_loglikelihood == pytest.approx(0.05 / 20)
    assert effect.ci95_text_loglikelihood == pytest.approx([0.05 / 20, 0.05 / 20])


def test_effects_pair_items_by_name_whatever_their_order() -> None:
    models = {"start": scores(0.8), "twin": scores(0.7, nats=0.1, order=5)}
    effect = effects(models)["training"]
    assert effect.drop_pp == pytest.approx(10.0)
    assert effect.loglikelihood == pytest.approx(
        effects({**models, "twin": scores(0.7, nats=0.1)})["training"].loglikelihood
    )
    low, high = effect.ci95_loglikelihood
    assert low < effect.loglikelihood < high
    assert high - low < 0.02  # paired: the same items


def test_effects_need_both_models() -> None:
    assert set(effects({"start": scores(0.8), "twin": scores(0.8)})) == {"training"}
    every = dict.fromkeys(("start", "twin", "ptq", "off", "on", "fresh", "finest"), scores(0.8))
    assert set(effects(every)) == set(EFFECTS)
    assert effects(every)["whole"].log_perplexity is None


def test_a_text_pairs_two_models_sequence_by_sequence() -> None:
    models = read(twin=text(3.0, noise=0.5), on=text(3.1, noise=0.5))
    effect = models.text_effects()["whole"]["held-out"]
    assert effect.rise == pytest.approx(0.1)
    assert effect.ci95 == pytest.approx([0.1, 0.1])  # what differs between sequences is the same for both
    assert effect.num_tokens == 40 * 120
    assert models.nats("held-out") == pytest.approx(
        {"twin": text(3.0, noise=0.5).mean, "on": text(3.1, noise=0.5).mean}
    )
    assert read(twin=text(3.0), on=text(3.1, name="b")).text_effects()["whole"] == {}  # not the same text


def test_a_stratum_tells_what_the_mean_hides() -> None:
    found = read(start=text(3.0), twin=text(3.0, rare=0.3)).text_effects()["training"]["known"]
    assert found.rise == pytest.approx(0.1)
    assert {name: values[0] for name, values in found.strata.items()} == pytest.approx(
        dict(zip(STRATA, (0.0, 0.0, 0.3), strict=True)), abs=1e-12
    )


def test_the_items_a_model_was_sure_of_are_chosen_whether_it_was_right_or_wrong() -> None:
    models = Models({"start": scores(0.8), "twin": scores(0.8, nats=0.2)}, {})
    found = models.measures().by_confidence["training"]
    assert set(found) == set(THIRDS)
    choices = models.scores["start"].tasks["task"].items.choice_loglikelihoods
    sure = (choices.max(axis=1) - np.logaddexp.reduce(choices, axis=1)).argsort()[-NUM_ITEMS // 3 :]
    before, after = (answer_log_probability(models.scores[name].tasks["task"]) for name in ("start", "twin"))
    assert found["surest"].value == pytest.approx((before - after)[sure].mean(), rel=0.02)


def test_what_a_model_takes_is_held_against_guessing() -> None:
    found = read(start=text(3.0), twin=text(6.5)).measures()
    assert {name: measured.value for name, measured in found.beyond_frequency.items()} == pytest.approx(
        {"start": -2.0, "twin": 1.5}
    )
    assert found.beyond_guessing["start"].value == pytest.approx(-3.0)


def test_an_effect_is_over_the_items_that_both_models_answered() -> None:
    whole = {"start": scores(0.8), "twin": scores(0.7, nats=0.1)}
    task = whole["twin"].tasks["task"]
    some = slice(0, None, 3)
    items = ItemScores(*(getattr(task.items, field.name)[some] for field in fields(ItemScores)))
    fewer = replace(task, items=items, num_answer_tokens=2 * len(items.item_id))
    sampled = {**whole, "twin": Scores({"task": fewer}, {})}
    effect = effects(sampled)["training"]
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

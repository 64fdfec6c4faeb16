"""Comparison of scores made by hand: pairing, verdicts, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qatrun.errors import InputError, MismatchError
from qatrun.evaluate.comparison import Scored, setting_mismatches
from qatrun.evaluate.comparison import compare as compare_scored
from qatrun.evaluate.scores import ItemScores, Scores, TaskScore, pad_choices
from qatrun.layout import ITEMS_FILE, SCORES_FILE
from qatrun.records.comparison import ArmComparison
from qatrun.records.scores import TextScore, TextScores

SETTINGS = {"tasks": {"facts": 0}, "limit": None, "batch_size": 16}


def task_score(
    correct: np.ndarray, loglikelihood: float = -1.0, name: str = "facts", num_fewshot: int = 0
) -> TaskScore:
    n = len(correct)
    items = ItemScores(
        item_id=np.array([f"{name}:{i}:hash" for i in range(n)]),
        correct=correct.astype(bool),
        loglikelihood=np.full(n, loglikelihood),
        choice_loglikelihoods=pad_choices(
            [[loglikelihood, -2.0] if i % 2 else [-2.0, -3.0, loglikelihood] for i in range(n)]
        ),
    )
    return TaskScore(name, "acc", num_fewshot, 0, len(items.correct), items)


def scores(correct: np.ndarray, **about: object) -> Scores:
    score = task_score(correct, **about)  # type: ignore[arg-type]
    return Scores({score.task: score}, SETTINGS)


def compare(
    start: Scores | None, twin: Scores, arm: Scores, off: Scores | None, budgets: dict[str, float | None]
) -> ArmComparison:
    """Of models that read no text."""
    return compare_scored(start and Scored(start), Scored(twin), Scored(arm), off, budgets)


def read(nats: float, *, noise: float = 0.0, name: str = "a") -> Scored:
    """A model that answers nothing wrong, and takes so many nats for each of 8,000 tokens."""
    spread = np.random.default_rng(0).normal(size=80) * noise
    text = TextScore(
        text=name, nats=[[100 * (nats + s)] for s in spread], num_targets=[[100]] * 80, entropy=5.0, uniform=6.0
    )
    return Scored(scores(right(500, 500)), TextScores(texts={"held-out": text}))


def right(num_right: int, num_items: int) -> np.ndarray:
    return np.arange(num_items) < num_right


def test_every_number_of_a_task() -> None:
    n = 2000
    twin, arm = right(1500, n), right(1500, n)
    arm[:40], arm[1500:1510] = False, True
    [task] = compare(
        scores(right(1400, n)), scores(twin), scores(arm, loglikelihood=-1.25), scores(right(1490, n)), {"facts": 1.0}
    ).tasks
    assert (task.start, task.twin, task.arm, task.arm_off) == (0.70, 0.75, 0.735, 0.745)
    assert (task.flips_to_wrong, task.flips_to_right, task.num_items) == (40, 10, n)
    assert task.drop_pp == pytest.approx(1.5)
    assert task.drop_relative_percent == pytest.approx(2.0)
    assert task.ci95_pp == pytest.approx([0.85, 2.25], abs=0.12)
    assert task.mean_abs_delta_loglikelihood == pytest.approx(0.25)
    assert task.mcnemar_p < 1e-4
    assert task.detectable_drop_pp == pytest.approx(0.99, abs=0.01)
    assert (task.verdict, task.budget_pp) == ("inconclusive", 1.0)
    assert task.items_to_settle is not None
    assert n < task.items_to_settle < 5 * n


@pytest.mark.parametrize(
    ("num_lost", "budget", "verdict"),
    [
        (0, 1.0, "within"),
        (15, 1.0, "inconclusive"),
        (60, 1.0, "exceeds"),
        (60, 5.0, "within"),
        (0, 0.1, "inconclusive"),
    ],
)
def test_verdict(num_lost: int, budget: float, verdict: str) -> None:
    comparison = compare(None, scores(right(1500, 2000)), scores(right(1500 - num_lost, 2000)), None, {"facts": budget})
    assert comparison.verdict == verdict
    assert (comparison.tasks[0].items_to_settle is not None) == (verdict == "inconclusive")


def test_held_out_text_has_a_budget_and_power() -> None:
    budgets: dict[str, float | None] = {"facts": 1.0, "perplexity": 1.0}
    found = compare_scored(read(1.5), read(1.0, noise=0.3), read(1.004, noise=0.3), None, budgets).perplexity
    assert found is not None
    assert found.start == pytest.approx(np.exp(1.5))
    assert found.arm / found.twin == pytest.approx(np.exp(0.004))
    assert found.rise_percent == pytest.approx(100 * np.expm1(0.004))
    assert (found.verdict, found.num_sequences, found.num_tokens) == ("within", 80, 8000)
    worse = compare_scored(None, read(1.0, noise=0.3), read(1.08, noise=0.3), None, budgets)
    assert worse.verdict == "exceeds"
    assert [task.verdict for task in worse.tasks] == ["within"]
    unsure = compare_scored(None, read(1.0), read(1.005, noise=0.1), None, budgets).perplexity
    assert unsure is not None
    assert unsure.verdict == "inconclusive"
    assert unsure.sequences_to_settle is not None
    not_asked = compare_scored(None, read(1.0), read(1.08), None, {**budgets, "perplexity": None})
    assert not_asked.verdict == "within"
    assert not_asked.perplexity is not None
    assert not_asked.perplexity.verdict is None
    assert compare_scored(None, read(1.0), read(1.08, name="b"), None, budgets).perplexity is None  # another text


def test_what_training_lost_is_said_and_counts_where_it_is_asked() -> None:
    start, forgot = scores(right(1500, 2000)), scores(right(960, 2000))
    said = compare(start, forgot, forgot, None, {"facts": 1.0})
    assert said.verdict == "within"
    assert said.training is not None
    assert (said.training.verdict, said.training.asked) == ("exceeds", False)
    assert said.training.drop_pp == pytest.approx(27.0)
    asked = compare(start, forgot, forgot, None, {"facts": 1.0, "training": 30.0})
    assert asked.verdict == "within"
    failed = compare(start, forgot, forgot, None, {"facts": 1.0, "training": 5.0})
    assert failed.verdict == "exceeds"
    assert failed.training is not None
    assert failed.training.asked
    assert compare(None, forgot, forgot, None, {"facts": 1.0}).training is None


def test_overall_verdict_is_the_worst_task() -> None:
    def two(lost_facts: int, lost_routines: int) -> Scores:
        facts, routines = (
            task_score(right(1500 - lost_facts, 2000)),
            task_score(right(1500 - lost_routines, 2000), name="b"),
        )
        return Scores({"facts": facts, "b": routines}, SETTINGS)

    budgets: dict[str, float | None] = {"facts": 1.0, "b": 1.0}
    assert compare(None, two(0, 0), two(0, 0), None, budgets).verdict == "within"
    assert compare(None, two(0, 0), two(20, 0), None, budgets).verdict == "inconclusive"
    assert compare(None, two(0, 0), two(20, 60), None, budgets).verdict == "exceeds"


def test_items_are_paired_by_identity_not_by_position() -> None:
    rng = np.random.default_rng(0)
    twin, arm = rng.random(500) < 0.7, rng.random(500) < 0.7
    in_order = scores(arm)
    order = rng.permutation(500)
    items = in_order.tasks["facts"].items
    shuffled = ItemScores(*(getattr(items, name)[order] for name in ItemScores.__dataclass_fields__))
    mixed = Scores({"facts": replace(in_order.tasks["facts"], items=shuffled)}, SETTINGS)
    assert compare(None, scores(twin), mixed, None, {"facts": 1.0}) == compare(
        None, scores(twin), in_order, None, {"facts": 1.0}
    )


def test_no_relative_drop_without_a_right_answer() -> None:
    [task] = compare(None, scores(right(0, 50)), scores(right(0, 50)), None, {"facts": 1.0}).tasks
    assert task.drop_relative_percent is None


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (
            scores(right(10, 40)),
            "facts -- not the same items: 50 for the twin, 40 for the arm, 40 in both (one that is not: facts:40:hash)",
        ),
        (scores(right(10, 50), num_fewshot=5), "facts -- num_fewshot is 0 for the twin and 5 for the arm"),
        (scores(right(10, 50), name="routines"), "the twin was scored on facts; the arm on routines"),
    ],
)
def test_what_cannot_be_paired_is_refused(arm: Scores, message: str) -> None:
    with pytest.raises(MismatchError) as refusal:
        compare(None, scores(right(10, 50)), arm, None, {"facts": 1.0})
    assert str(refusal.value) == message


def test_settings_that_differ_are_named() -> None:
    twin = scores(right(10, 50))
    arm = Scores(twin.tasks, {**SETTINGS, "batch_size": 8})
    assert setting_mismatches(twin, twin) == []
    assert [str(problem) for problem in setting_mismatches(twin, arm)] == [
        "eval.batch_size -- the twin was scored with 16, the arm with 8"
    ]


def test_scores_round_trip(tmp_path: Path) -> None:
    saved = Scores({"facts": task_score(right(7, 10)), "b": task_score(right(3, 4), name="b", num_fewshot=2)}, SETTINGS)
    saved.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.settings == SETTINGS
    assert list(loaded.tasks) == ["facts", "b"]
    for name, score in saved.tasks.items():
        assert loaded.tasks[name].num_answer_tokens == score.num_answer_tokens
        assert (loaded.tasks[name].metric, loaded.tasks[name].num_fewshot) == (score.metric, score.num_fewshot)
        for array in ItemScores.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(loaded.tasks[name].items, array), getattr(score.items, array))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.parquet", "scores.json"]


def test_scores_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    scores(right(7, 10)).save(tmp_path)
    summary = (tmp_path / SCORES_FILE).read_text(encoding="utf-8")
    (tmp_path / SCORES_FILE).write_text(summary.replace("num_answer_tokens", "num_choices"), encoding="utf-8")
    with pytest.raises(InputError, match=r"earlier version: delete this folder to score again"):
        Scores.load(tmp_path)


def test_scores_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    scores(right(7, 10)).save(tmp_path)
    other = tmp_path / "other"
    scores(right(6, 10)).save(other)
    (other / ITEMS_FILE).replace(tmp_path / ITEMS_FILE)
    with pytest.raises(InputError, match=r"is not the file that scores\.json was written with"):
        Scores.load(tmp_path)
    with pytest.raises(InputError, match="no scores here"):
        Scores.load(tmp_path / "nowhere")


def test_standard_error_of_a_score() -> None:
    correct = right(75, 100)
    assert task_score(correct).stderr == pytest.approx(correct.std(ddof=1) / 10)

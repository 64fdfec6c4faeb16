"""Distillation: its gradient by another formula, that a weight of nothing changes nothing, and a resume bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import tiny_llama
from training import Recorder, TinyStudy, ctrl_c, differences, final_state, gpt2_with_dropout

from qatrun.data import IGNORE_INDEX, Batch
from qatrun.errors import Interrupted
from qatrun.train import objective
from qatrun.train.objective import CrossEntropy, Distillation

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


def softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("chunked_from", [10**9, 0], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.25, 2.0), (1.0, 1.0)])
def test_terms_and_gradient_are_those_of_the_formula(
    weight: float, temperature: float, chunked_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 by hand: d/dz of T^2 KL(p || softmax(z / T)) is T (q - p), of the cross-entropy softmax(z) - onehot."""
    monkeypatch.setattr(objective, "CHUNKED_FROM", chunked_from)
    monkeypatch.setattr(objective, "CHUNK", 5 * 101)
    logits, said = (3 * torch.randn(4, 9, 101) for _ in range(2))
    labels = torch.randint(101, (4, 9))
    labels[1, 3:] = IGNORE_INDEX
    distillation = Distillation(lambda ids: said, weight, temperature)
    leaf = logits.clone().requires_grad_()
    terms = distillation.summed(leaf, Batch(labels, labels))
    sum(weight * term for weight, term in zip(distillation.weights, terms, strict=True) if weight).backward()

    z, t, y = logits[:, :-1].double().numpy(), said[:, :-1].double().numpy(), labels[:, 1:].numpy()
    counted = (y != IGNORE_INDEX)[..., None]
    onehot = np.eye(101)[np.where(y == IGNORE_INDEX, 0, y)]
    p, q = softmax(t / temperature), softmax(z / temperature)
    assert terms.tolist() == pytest.approx(
        [-(counted * onehot * np.log(softmax(z))).sum(), (counted * p * np.log(p / q)).sum()], rel=1e-5
    )
    expected = counted * ((1 - weight) * (softmax(z) - onehot) + weight * temperature * (q - p))
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad[:, :-1].double().numpy(), expected, atol=2e-6)
    assert not leaf.grad[:, -1].any()


@pytest.mark.parametrize("make_model", [tiny_llama, gpt2_with_dropout])
def test_weight_0_only_measures(tmp_path: Path, make_model: Callable[[], Any]) -> None:
    studies = [
        TinyStudy(tmp_path / name, make_model, train=train)
        for name, train in (("without", {}), ("measured", {"distill": {"weight": 0.0}}))
    ]
    for study in studies:
        study.train_arm()
    without, measured = (final_state(study.arms["hif8"].own) for study in studies)
    divergences = [row.pop("distill_kl") for row in measured["metrics"]]
    assert max(divergences) > 0.001
    assert set(differences(without, measured)) <= {"run"}, "another identity, and nothing else"


def test_one_that_is_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    train = {"distill": {"weight": 0.5, "temperature": 2.0}, "gradient_checkpointing": True}
    whole, stopped = (TinyStudy(tmp_path / name, train=train) for name in ("whole", "stopped"))
    whole.train_arm()
    with pytest.raises(Interrupted):
        stopped.train_arm(make_listener=lambda: Recorder({5: ctrl_c}))
    stopped.train(stopped.arms["hif8"].own)
    one, other = (final_state(study.arms["hif8"].own) for study in (whole, stopped))
    assert differences(one, other) == []
    assert all("distill_kl" in row for row in one["metrics"])


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    rows = []
    for size in (4, 1):
        study = TinyStudy(tmp_path / str(size), train={"micro_batch_size": size, "distill": {"weight": 0.5}})
        study.train_arm("bf16")
        rows.append(final_state(study.arms["bf16"].own)["metrics"])
    for key in ("loss", "distill_kl"):
        one, other = ([row[key] for row in run[1:]] for run in rows)
        assert one == pytest.approx(other, rel=1e-3), key


def test_qad_stays_where_the_teacher_is(tmp_path: Path) -> None:
    """With weight 1 nothing is learned from the text, so that the model hardly moves."""
    moved = {}
    for weight in (0.0, 1.0):
        study = TinyStudy(tmp_path / str(weight), train={"distill": {"weight": weight}})
        study.train_arm()
        moved[weight] = final_state(study.arms["hif8"].own)["metrics"][-1]["distill_kl"]
    assert moved[1.0] < moved[0.0] / 3


def test_the_loss_is_the_cross_entropy_whatever_is_learned() -> None:
    logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    terms = Distillation(lambda ids: torch.randn(2, 5, 11), 1.0, 1.0).summed(logits, Batch(labels, labels))
    assert torch.equal(terms[:1], CrossEntropy().summed(logits, Batch(labels, labels)))

"""What the forgetting probe says of a run, as alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from training import TinyStudy

from qatrun.recipe import AlarmConfig
from qatrun.train.alarms import AlarmWatch
from qatrun.train.metrics import read_alarms, read_metrics
from qatrun.train.probe_alarms import Twin


def probed(rise: float, added: float | None = None, kl: float = 0.0, kl_added: float = 0.0) -> dict[str, float]:
    """What a probe finds, of a start model whose loss is 2; `added` by quantizers, None: none are in use."""
    row = {"nll_start": 2.0, "nll_off": 2.0 + rise, "kl_off": kl}
    return row if added is None else row | {"nll_on": 2.0 + rise + added, "kl_on": kl + kl_added}


def alarms(probes: Sequence[Mapping[str, Any]], twin: Twin | None = None, **config: Any) -> dict[int, tuple[str, str]]:
    """Number of the probe -> (kind, text) of the alarm that it raises."""
    watch = AlarmWatch(AlarmConfig(**config), {}, twin)
    found = {number: list(watch.see_probe(number, probe)) for number, probe in enumerate(probes)}
    assert all(len(raised) <= 1 for raised in found.values())
    return {number: (raised[0]["kind"], raised[0]["text"]) for number, raised in found.items() if raised}


def test_forgetting_and_quantization_are_told_apart() -> None:
    probes = [probed(0.01), probed(0.3), probed(0.3, 0.01), probed(0.3, 0.2), probed(0.3, 0.2), probed(0.3, 0.2)]
    found = alarms(probes)
    assert {number: kind for number, (kind, _) in found.items()} == {2: "forgetting", 4: "quantization"}
    assert "has risen by 0.300 nats per token (alarm above 0.05)" in found[2][1]
    assert "quantizers add 0.200 nats per token" in found[4][1]


def test_a_model_that_moved_and_became_better_at_what_it_knew_has_forgotten_nothing() -> None:
    """A high KL beside a loss that falls: an alarm by KL accused such runs."""
    probes = [probed(-0.1, -0.01, kl=0.4, kl_added=0.2)] * 3
    assert alarms(probes) == {}
    ((kind, text),) = alarms(probes, forgetting_kl=0.15).values()
    assert kind == "moved"
    assert text.endswith("its loss on what that knew -0.100: moved, not lost")


@pytest.mark.parametrize(("rise", "said"), [(-0.1, True), (0.04, False), (0.3, False)])
def test_that_nothing_is_lost_is_said_only_where_it_is_so(rise: float, said: bool) -> None:
    ((kind, text),) = alarms([probed(rise, kl=0.4)] * 2, forgetting_kl=0.15, forgetting_nats=None).values()
    assert kind == "moved"
    assert text.endswith("moved, not lost") is said


class TestBlame:
    """Who is to blame for a rise while quantizers are in use: only training without any tells."""

    probes = (probed(0.6, 0.01),) * 2

    def text(self, kind: str, probes: Sequence[Mapping[str, Any]] = probes, **rises: Mapping[int, float]) -> str:
        twins = [Twin(name, of_steps) for name, of_steps in rises.items()]
        ((found, text),) = alarms(probes, twins[0] if twins else None).values()
        assert found == kind
        return text

    def test_a_rise_that_the_twin_has_too_is_the_learning_rates(self) -> None:
        text = self.text("forgetting", bf16={0: 0.2, 1: 0.5})
        assert text.endswith("in its twin bf16 by 0.500: training overwrites it; lower train.learning_rate")

    def test_one_that_the_twin_does_not_have_is_what_training_under_quantization_lost(self) -> None:
        text = self.text("divergence", bf16={0: 0.5, 1: 0.02})
        assert "in its twin bf16 by 0.020: training under quantization lost it" in text
        assert "lower train.learning_rate" not in text

    @pytest.mark.parametrize("rises", [{}, {"bf16": {0: 0.5}}])
    def test_where_that_is_not_known_the_rate_is_not_blamed_as_certain(self, rises: Any) -> None:
        assert "lower train.learning_rate if it rises in" in self.text("forgetting", **rises)

    def test_before_the_switch_an_arm_is_its_twin(self) -> None:
        text = self.text("forgetting", [probed(0.6)] * 2, bf16={})
        assert text.endswith("training overwrites it; lower train.learning_rate")

    def test_a_run_reads_the_rises_of_its_twin(self, tmp_path: Path) -> None:
        study = TinyStudy(tmp_path / "a", warmup={"steps": 0})  # without a trunk, which would have raised it
        study.train_arm("bf16")
        study.train_arm("hif8")
        rows = {row["kind"]: row for row in read_alarms(study.arms["hif8"].own.folder / "alarms.jsonl")}
        (of_twin,) = (
            row["nll_off"] - row["nll_start"]
            for row in read_metrics(study.arms["bf16"].own.folder / "metrics.jsonl")
            if row["step"] == rows["forgetting"]["step"]
        )
        assert f"in its twin bf16 by {of_twin:.3f}" in rows["forgetting"]["text"]

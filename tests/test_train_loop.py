"""The training loop: scales across the switch, phases, and what is said of a run while it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_llama
from training import Recorder, TinyStudy, differences, final_state

from qatrun.data import open_data
from qatrun.quant import Mode, QuantState
from qatrun.train.checkpoint import latest_checkpoint, read_checkpoint
from qatrun.train.loop import FLUSH_EVERY
from qatrun.train.metrics import read_metrics

STEPS, SWITCH = 7, 3


pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


def metrics_of(study: TinyStudy, arm: str) -> list[dict[str, Any]]:
    return read_metrics(study.arms[arm].own.folder / "metrics.jsonl")


# Scales across the switch


def test_the_first_qat_step_has_scales_from_a_full_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against amaxes of plain models with the weights of each step, over the micro-batches of each step."""
    at_switch: list[Mapping[str, float]] = []
    enter = QuantState.enter

    def recording(state: QuantState, mode: Mode) -> None:
        before = state.mode
        enter(state, mode)
        if mode is Mode.QUANTIZE and before is not mode:
            at_switch.append(dict(zip(state.scales.names, state.scales.scale.tolist(), strict=True)))

    monkeypatch.setattr(QuantState, "enter", recording)
    steps, window = 5, 3
    study = TinyStudy(
        tmp_path / "a",
        warmup={"steps": steps},
        train={"save_every": 1, "keep_last": 9, "steps": 9, "lr_warmup_steps": 0, "learning_rate": 3e-2},
        qat={"scaling": {"window": window}, "weight": {"target_amax": 7}},
    )
    study.train_arm()
    segments = study.arms["hif8"]
    assert segments.trunk is not None
    assert segments.own.plan is not None
    stream = open_data(segments.own.arm.data, study.tokenizer, 0).train
    amaxes: dict[str, list[float]] = {name: [] for name in map(str, segments.own.plan.slots())}
    for step in range(steps):
        model = study.make_model()
        if step:
            saved = read_checkpoint(segments.trunk.folder / "checkpoints" / f"step-{step:06d}").parts["model"]
            model.load_state_dict(dict(saved), strict=False)
        seen: dict[str, float] = {}
        for name, module in model.named_modules():
            if f"{name}:input" in amaxes:
                module.register_forward_pre_hook(
                    lambda _m, args, key=f"{name}:input", seen=seen: seen.update(
                        {key: max(seen.get(key, 0.0), args[0].abs().max().item())}
                    )
                )
            if f"{name}:weight" in amaxes:
                seen[f"{name}:weight"] = module.weight.abs().max().item()
        for micro in stream.take(4).split(2):
            model(input_ids=micro.input_ids)
        for name, history in amaxes.items():
            history.append(seen[name])
    targets = {"input": 15, "weight": 7}
    expected = {name: max(amax[-window:]) / targets[name.rpartition(":")[2]] for name, amax in amaxes.items()}
    assert at_switch == [pytest.approx(expected, rel=1e-6)]
    assert any(max(amax[:-window]) > max(amax[-window:]) for amax in amaxes.values()), "older amaxes would show"


def test_observers_do_not_touch_a_bf16_arm(tmp_path: Path) -> None:
    """Weights of the BF16 arm are the same whether its trunk watched amax for another arm or not."""
    model = {"compute_dtype": "bfloat16"}
    qat = {"format": "hif8", "grad_output": {}, "scaling": {"window": 3}}
    watched = TinyStudy(tmp_path / "a", model=model, qat=qat)
    alone = TinyStudy(tmp_path / "b", model=model, arms={"bf16": {"qat": None}})
    for study in (watched, alone):
        study.train_arm("bf16")
    assert watched.arms["bf16"].trunk is not None
    trunk, _ = latest_checkpoint(watched.arms["bf16"].trunk.folder / "checkpoints")
    assert trunk is not None
    history = trunk.parts["quant"]["history"]
    assert history.count_nonzero() == history.numel()
    one, other = (final_state(study.arms["bf16"].own) for study in (watched, alone))
    one["run"] = other["run"] = None  # the same but for its identity
    assert differences(one, other) == []


def test_quantizing_begins_at_the_switch_and_stays(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a", arms={"bf16": {"qat": None}, "hif8": {}, "late": {"qat": {"start_step": 5}}})
    for arm in study.arms:
        study.train_arm(arm)
    phases = {arm: [row["phase"] for row in metrics_of(study, arm)] for arm in study.arms}
    assert phases == {
        "bf16": ["bf16"] * STEPS,
        "hif8": ["bf16"] * SWITCH + ["qat"] * (STEPS - SWITCH),
        "late": ["bf16"] * 5 + ["qat"] * 2,
    }
    losses = {arm: [row["loss"] for row in metrics_of(study, arm)] for arm in study.arms}
    assert losses["late"][:5] == losses["bf16"][:5]
    assert losses["hif8"][:SWITCH] == losses["bf16"][:SWITCH]
    assert losses["hif8"][SWITCH] != losses["bf16"][SWITCH]
    assert losses["late"][5] != losses["bf16"][5]
    hashes = {final_state(study.arms[arm].own)["plain"]["data/data_hash"] for arm in study.arms}
    assert len(hashes) == 1


# Warnings, records, trackers


def test_a_first_loss_of_a_mere_guess_is_an_alarm_and_a_trained_models_is_none(tmp_path: Path) -> None:
    listener = Recorder()
    untrained = TinyStudy(tmp_path / "a", train={"steps": 60, "lr_schedule": "constant"}, warmup={"steps": 40})
    trunk = untrained.arms["bf16"].trunk
    assert trunk is not None
    model, _ = untrained.train(trunk, listener)
    first = listener.alarms[0]
    assert (
        f"step 1: the first loss is {listener.rows[0]['loss']:.2f}, near ln(vocabulary) = {math.log(101):.2f}" in first
    )
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def trained() -> Any:
        fresh = tiny_llama()
        fresh.load_state_dict(weights, strict=False)
        return fresh

    quiet = Recorder()
    study = TinyStudy(tmp_path / "b", trained)
    assert study.arms["bf16"].trunk is not None
    study.train(study.arms["bf16"].trunk, quiet)
    assert quiet.rows[0]["loss"] < 0.9 * math.log(101)
    assert quiet.warnings == []


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a", train={"lr_schedule": "linear", "learning_rate": 0.01})
    study.train_arm()
    rows = metrics_of(study, "hif8")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows] == [64 * step for step in range(1, STEPS + 1)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.005, *(0.002 * k for k in (5, 5, 4, 3, 2, 1))])
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    study = TinyStudy(tmp_path / "a")
    trunk = study.arms["hif8"].trunk
    assert trunk is not None
    study.train(trunk, trackers=["tensorboard"])
    (file,) = (file for file in trunk.folder.rglob("events.out.tfevents.*") if file.parent.name == "a")
    events = accumulator.EventAccumulator(str(file)).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([row["loss"] for row in read_metrics(trunk.folder / "metrics.jsonl")])


@pytest.mark.parametrize("qat", [{}, {"grad_output": {}, "scaling": {"window": 3, "unit": "microbatch"}}], ids=str)
def test_how_often_the_device_is_read_changes_nothing(
    tmp_path: Path, qat: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    each_step, seldom = (TinyStudy(tmp_path / name, qat=qat, train={"save_every": 5}) for name in "ab")
    each_step.train_arm()
    monkeypatch.setitem(FLUSH_EVERY, "cpu", 4)
    seldom.train_arm()
    assert differences(final_state(each_step.arms["hif8"].own), final_state(seldom.arms["hif8"].own)) == []

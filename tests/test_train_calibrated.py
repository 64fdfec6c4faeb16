"""Training that starts from a calibrated state: `qat.init: ptq`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import token_ids
from safetensors.torch import load_file
from tiny_world import run_qatrun, write_world
from training import Recorder, TinyStudy, ctrl_c, differences, final_state

from qatrun.errors import Interrupted
from qatrun.quant import attach, calibrate
from qatrun.recipe import parse_recipe
from qatrun.train.checkpoint import latest_checkpoint
from qatrun.train.segment import Segment

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")

BATCHES = (token_ids(2, seed=5), token_ids(2, seed=6))
QAT = {"format": "int8", "init": "ptq", "calibration": {"input": "mse"}, "scaling": {"window": 3}}


def calibrated_arm(folder: Path, **qat: Any) -> tuple[TinyStudy, Segment]:
    """A study whose trunk is trained, and the stretch of its quantized arm."""
    study = TinyStudy(folder, qat=QAT | qat)
    segments = study.arms["hif8"]
    assert segments.trunk is not None
    study.train(segments.trunk)
    return study, replace(segments.own, calibration=BATCHES)


def test_the_first_step_has_the_scales_of_the_calibration(tmp_path: Path) -> None:
    study, own = calibrated_arm(tmp_path / "a", scaling={"type": "static"})
    trained, _ = study.train(own)
    model = study.make_model()
    assert own.trunk is not None
    checkpoint, _ = latest_checkpoint(own.trunk / "checkpoints")
    assert checkpoint is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.parts["model"][name])
    assert own.plan is not None
    expected = attach(model, own.plan)
    calibrate(model, BATCHES, least_error=True)
    assert torch.equal(trained.quant_state.scales.scale, expected.scales.scale)  # static: they stay so


def test_a_calibrated_run_that_is_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    study, own = calibrated_arm(tmp_path / "whole")
    study.train(own)
    again, stopped = calibrated_arm(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        again.train(stopped, Recorder({5: ctrl_c}))
    again.train(stopped)
    assert not differences(final_state(own), final_state(stopped))


def test_an_arm_may_start_from_smoothed_weights(tmp_path: Path) -> None:
    write_world(tmp_path)
    smoothed = "qat={format: int8, init: ptq, calibration: {smooth: 0.5, sequences: 8}}"
    still = (
        "train.steps=2",
        "train.lr_warmup_steps=0",
        "train.learning_rate=1e-9",
        "warmup.steps=0",
        "diagnose.at_end=false",
    )
    ran = run_qatrun("train", "tiny.yaml", *(f"--set={each}" for each in (smoothed, *still)), cwd=tmp_path)
    assert ran.code == 0, ran.err
    twin, arm = (load_file(tmp_path / f"runs/tiny/{name}/model.safetensors") for name in ("bf16", "hif8"))
    norm = "model.layers.0.input_layernorm.weight"
    exponents = (arm[norm] / twin[norm]).log2()
    assert exponents.abs().max() >= 1
    assert torch.allclose(exponents, exponents.round(), atol=1e-4)


@pytest.mark.parametrize(
    ("qat", "said"),
    [
        ({"start_step": 700}, "qat.init -- ptq gives the scales of an arm's first step (start_step must be 500, "),
        ({"calibration": {"smooth": 0.5}}, "qat.init -- init: ptq smooths the weights that training starts from; "),
    ],
)
def test_what_a_calibrated_start_cannot_be(qat: dict[str, Any], said: str) -> None:
    recipe = {
        "name": "r",
        "model": {"path": "m"},
        "data": {"train": {"path": "t"}},
        "train": {"steps": 1000},
        "qat": {"init": "ptq", **qat},
        "eval": {"tasks": {"arc_challenge": 0}},
    }
    with pytest.raises(Exception, match=r"qat\.init") as error:
        parse_recipe(recipe)
    assert said in str(error.value)

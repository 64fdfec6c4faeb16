"""How a run ends before its last step: a signal, and numbers that are not finite."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import Recorder, TinyStudy, ctrl_c, differences, final_state

from qatrun.errors import Interrupted, NonFiniteError
from qatrun.train.checkpoint import latest_checkpoint
from qatrun.train.loop import FLUSH_EVERY
from qatrun.train.nonfinite import first_bad_tensors

pytestmark = pytest.mark.usefixtures("datasets_cache", "one_thread")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    study = TinyStudy(tmp_path / "a", train={"save_every": 100})
    with pytest.raises(Interrupted, match=rf"{number.name} at step 2 of trunk; saved") as raised:
        study.train_arm(make_listener=lambda: Recorder({2: lambda: os.kill(os.getpid(), number)}))
    assert raised.value.exit_code == 3
    assert study.arms["hif8"].trunk is not None
    checkpoint, _ = latest_checkpoint(study.arms["hif8"].trunk.folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a")

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        study.train_arm(make_listener=lambda: Recorder({2: twice}))


def test_a_second_sigterm_loses_no_save(tmp_path: Path) -> None:
    """A scheduler's goes to this process and to what started it, which passes it on."""
    study = TinyStudy(tmp_path / "a")

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM at step 5 of hif8; saved"):
        study.train_arm(make_listener=lambda: Recorder({5: twice}))
    assert (study.arms["hif8"].own.folder / "checkpoints/step-000005/manifest.json").is_file()


def poison(model: nn.Module, name: str, value: float) -> Callable[[], None]:
    def set_weight() -> None:
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = value

    return set_weight


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"loss nan at step 4 of hif8; first bad: parameter model.layers.1.mlp.up_proj.weight"),
        (3e38, r"(loss|gradient norm) (nan|inf) at step 4 of hif8; first bad: (output|gradient) of .*layers.1"),
    ],
)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_number_that_is_not_finite_stops_the_run(
    tmp_path: Path, compute_dtype: str, value: float, message: str
) -> None:
    settings: dict[str, Any] = {"model": {"compute_dtype": compute_dtype}, "warmup": {"steps": 0}}
    settings["qat"] = {"start_step": 5}
    healthy, poisoned = TinyStudy(tmp_path / "a", **settings), TinyStudy(tmp_path / "b", **settings)
    healthy.train_arm()
    models: list[nn.Module] = []
    make_model = poisoned.make_model

    def keep_model() -> Any:
        models.append(make_model())
        return models[-1]

    poisoned.make_model = keep_model
    segment = poisoned.arms["hif8"].own
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(NonFiniteError, match=message):
        poisoned.train(segment, Recorder({3: lambda: poison(models[-1], name, value)()}))
    poisoned.train(segment)
    assert differences(final_state(healthy.arms["hif8"].own), final_state(segment)) == []


def test_a_gradient_that_is_not_finite_is_named(tmp_path: Path) -> None:
    study = TinyStudy(tmp_path / "a")
    make_model = study.make_model
    name = "model.layers.0.self_attn.v_proj.weight"

    def with_a_bad_gradient() -> Any:
        model = make_model()
        model.get_parameter(name).register_hook(lambda gradient: gradient * math.inf)
        return model

    study.make_model = with_a_bad_gradient
    with pytest.raises(
        NonFiniteError, match=f"gradient norm (inf|nan) at step 1 of trunk; first bad: gradient of {name}"
    ):
        study.train_arm()


class _BadToken(nn.Module):
    """Token 2 makes its second layer overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.embed.weight[2] = 1e30
            self.second.weight.fill_(1e30)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden: Tensor = self.second(self.first(self.embed(input_ids)))
        return hidden


def test_the_bad_output_is_found_in_whatever_micro_batch_it_is() -> None:
    good, bad = torch.tensor([[0, 1]]), torch.tensor([[1, 2]])
    assert first_bad_tensors(_BadToken(), [good]) == []
    assert first_bad_tensors(_BadToken(), [good, bad]) == ["output of second"]


def test_the_gradient_that_went_bad_first_is_named_first() -> None:
    model = _BadToken()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    assert first_bad_tensors(model, [])[0] == "gradient of second.bias"


def test_an_update_that_is_not_finite_is_held_back_until_it_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is bad at the second of four steps that are checked together."""
    monkeypatch.setitem(FLUSH_EVERY, "cpu", 4)
    study = TinyStudy(tmp_path / "a", warmup={"steps": 0}, train={"save_every": 7, "global_batch_size": 2})
    weights: list[torch.Tensor] = []
    name = "model.layers.0.self_attn.v_proj.weight"
    make_model = study.make_model

    def with_a_bad_second_gradient() -> Any:
        model = make_model()
        parameter = model.get_parameter(name)

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            weights.append(parameter.detach().clone())
            return gradient * math.inf if len(weights) in (2, 5) else None  # 5: when it is looked into

        parameter.register_hook(spoil)
        return model

    study.make_model = with_a_bad_second_gradient
    recorder = Recorder()
    with pytest.raises(
        NonFiniteError, match=rf"gradient norm (inf|nan) at step 2 of hif8; first bad: gradient of {name}"
    ):
        study.train(study.arms["hif8"].own, recorder)
    assert [row["step"] for row in recorder.rows] == [1]
    assert not torch.equal(weights[0], weights[1])
    assert all(torch.equal(weights[1], later) for later in weights[2:])

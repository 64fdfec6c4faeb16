"""A segment trained by several processes: the same run, checkpoints that any number of processes reads, and every way to end
with a save, none of which may hang."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from training import Recorder, TinyStudy, differences, final_state, gpt2_with_dropout
from worlds import Worlds, in_world, together

from qatrun.data import open_data, open_probe
from qatrun.errors import QatrunError
from qatrun.quant import QuantState
from qatrun.ranks import world
from qatrun.study.segments import ArmSegments
from qatrun.train.checkpoint import latest_checkpoint
from qatrun.train.loop import train
from qatrun.train.segment import Segment, Watched

DISTILLED = {"train": {"distill": {"weight": 0.5}}}
SIX = {"train": {"global_batch_size": 6, "micro_batch_size": 1}}


def segment_trained(tiny: TinyStudy, segment: Segment, listener: Any) -> Any:
    """As TinyStudy trains one, on the processes of the world at hand: the first reads the text."""
    arm, leads = segment.arm, world().leads
    model = tiny.make_model().to(getattr(torch, segment.arm.model.param_dtype))
    stream = open_data(arm.data, tiny.tokenizer, arm.train.seed).train if leads else None
    text = open_probe(arm.data, tiny.tokenizer, arm.monitor.probe.sequences) if arm.monitor.probe else None
    return train(segment, model, stream, listener, (), Watched(text), tiny.teacher_of(segment))


def arm_trained(folder: Path, after: Mapping[int, Callable[[], None]] | None = None, **settings: Any) -> str:
    """Trunk and arm, from where they are; what ended it before its end."""
    tiny = TinyStudy(folder, **settings)
    segments: ArmSegments = tiny.arms["hif8"]
    assert segments.trunk is not None
    try:
        if not (segments.own.folder / "checkpoints").is_dir():
            segment_trained(tiny, segments.trunk, Recorder())
        segment_trained(tiny, segments.own, Recorder(after))
    except QatrunError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def state(folder: Path, **settings: Any) -> dict[str, Any]:
    return final_state(TinyStudy(folder, **settings).arms["hif8"].own)


def different(one: Path, other: Path, **settings: Any) -> list[str]:
    """What two arms do not agree on, the random numbers aside, which several processes draw by the step."""
    return [
        name for name in differences(state(one, **settings), state(other, **settings)) if not name.startswith("rng/")
    ]


def signal_twice() -> None:
    """A scheduler's, to one process alone, and twice."""
    if world().rank == world().size - 1:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)


def arm_stopped(folder: Path) -> str:
    return arm_trained(folder, {5: signal_twice})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arm that one process trained, and beside it the text."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    torch.set_num_threads(1)
    assert arm_trained(folder) == ""
    return folder


@pytest.fixture(scope="module")
def two(alone: Path) -> Path:
    folder = alone.parent / "two"
    assert in_world(2, arm_trained, folder) == ["", ""]
    return folder


def test_two_processes_make_the_same_run(alone: Path, two: Path) -> None:
    """Weights, moments, history, scales, statistics, losses, probes, alarms, and how far the data was read."""
    assert different(alone, two) == []
    names = {file.name for file in (two / "hif8/checkpoints/step-000007").iterdir()}
    assert names == {
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
        "state.safetensors",
        "progress.json",
        "manifest.json",
    }


def taught(folder: Path) -> str:
    return arm_trained(folder, **DISTILLED)


def test_a_teacher_in_parts_teaches_the_same(alone: Path) -> None:
    folders = alone.parent / "taught-alone", alone.parent / "taught-two"
    assert taught(folders[0]) == ""
    assert in_world(2, taught, folders[1]) == ["", ""]
    assert different(*folders, **DISTILLED) == []
    assert all(row["distill_kl"] > 0 for row in state(folders[0], **DISTILLED)["metrics"][1:])


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_resume_goes_on_with_any_number(alone: Path, before: int, after: int) -> None:
    """Stopped by a signal to one process, at a step that no checkpoint was due."""
    folder = alone.parent / f"resumed-{before}-{after}"
    ended = in_world(before, arm_stopped, folder) if before > 1 else [arm_stopped(folder)]
    assert ended == ["Interrupted: SIGTERM at step 5 of hif8; saved"] * before
    assert not any(in_world(after, arm_trained, folder) if after > 1 else [arm_trained(folder)])
    assert different(alone, folder) == []


def six_stopped(folder: Path) -> str:
    return arm_trained(folder, {5: signal_twice}, **SIX)


def six_trained(folder: Path) -> str:
    return arm_trained(folder, **SIX)


def test_uneven_shards_are_read_by_fewer(alone: Path) -> None:
    """Of three processes, whose sums have an order: losses are those of one process up to that."""
    folder, whole = alone.parent / "three", alone.parent / "three-alone"
    assert in_world(3, six_stopped, folder) == ["Interrupted: SIGTERM at step 5 of hif8; saved"] * 3
    assert in_world(2, six_trained, folder) == ["", ""]
    assert six_trained(whole) == ""
    losses = [[row["loss"] for row in state(place, **SIX)["metrics"]] for place in (folder, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert len(losses[0]) == 7


def test_a_damaged_shard_is_found_and_the_checkpoint_before_it_taken(alone: Path, two: Path, tmp_path: Path) -> None:
    folder = alone.parent / "damaged"
    shutil.copytree(two, folder)
    checkpoints = folder / "hif8/checkpoints"
    shard = sorted((checkpoints / "step-000007").glob("shard-00002-*"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    checkpoint, warnings = latest_checkpoint(checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 6
    assert "shard-00002-model-00001-of-00001.safetensors changed since it was written" in warnings[0]
    assert in_world(2, arm_trained, folder) == ["", ""]
    assert different(alone, folder) == []


def diverged(folder: Path) -> str:
    """One process's scale is another's no more."""

    def drift(self: QuantState) -> None:
        push(self)
        if world().rank == 1 and self.scales.num_pushes == 4:
            self.scales.scale[2] *= 1.5

    push, QuantState.push = QuantState.push, drift
    return arm_trained(folder)


def test_processes_that_drift_apart_are_stopped_before_they_save(alone: Path) -> None:
    folder = alone.parent / "diverged"
    for said in in_world(2, diverged, folder):
        assert said.startswith("RunError: the processes do not agree on quant/scale")
        assert "which all of them must hold alike: not saved" in said


def not_finite(folder: Path) -> str:
    """One process meets a NaN in its own micro-batch."""
    from qatrun.train.objective import CrossEntropy

    def summed(self: CrossEntropy, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        result = original(self, logits, batch)
        return result * float("nan") if world().rank == 1 and QuantState.steps > 4 else result

    def counted(self: QuantState) -> None:
        QuantState.steps += 1
        push(self)

    QuantState.steps = 0
    push, QuantState.push = QuantState.push, counted
    original, CrossEntropy.summed = CrossEntropy.summed, summed
    return arm_trained(folder)


def test_a_nan_on_one_process_ends_all_in_order(alone: Path) -> None:
    said = in_world(2, not_finite, alone.parent / "nan")
    assert said[0] == said[1]
    assert said[0].startswith("NonFiniteError: loss nan at step ")


def planted_amax() -> tuple[float, float]:
    """The largest value of all lies in the second process's micro-batch."""
    from builders import tiny_llama

    from qatrun.quant import Mode, attach, make_plan
    from qatrun.recipe import QatConfig

    model = tiny_llama()
    quantizers = attach(model, make_plan(model, QatConfig(scaling={"window": 2})))
    quantizers.enter(Mode.OBSERVE)
    own = 5.0 + world().rank
    quantizers.scales.amax[0] = own
    quantizers.push()
    return float(quantizers.scales.history[0, 0]), own


def in_a_loop_of_ones_own() -> tuple[float, float]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return planted_amax()


def test_the_largest_amax_of_all_processes_is_pushed() -> None:
    """In a user's own loop, too: nothing but `attach` and `push` is called."""
    assert in_world(2, planted_amax) == [(6.0, 5.0), (6.0, 6.0)]
    assert Worlds(2, in_a_loop_of_ones_own).results() == [(6.0, 5.0), (6.0, 6.0)]


def dropout_arm(folder: Path) -> str:
    return arm_trained(folder, make_model=gpt2_with_dropout, **SIX)


def test_random_numbers_are_those_of_the_micro_batch(alone: Path) -> None:
    """With dropout, whoever computes it: two and three processes differ by the order of sums alone."""
    folders = {size: alone.parent / f"dropout-{size}" for size in (2, 3)}
    for size, folder in folders.items():
        assert not any(in_world(size, dropout_arm, folder))
    kept = {"make_model": gpt2_with_dropout, **SIX}
    two, three = ([row["loss"] for row in state(folder, **kept)["metrics"]] for folder in folders.values())
    assert two == pytest.approx(three, rel=1e-4)


def lost(folder: Path) -> str:
    def die() -> None:
        if world().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    from qatrun.followers import losses_named

    with losses_named():
        return arm_trained(folder, {4: die})


def test_a_process_that_is_killed_is_named_and_the_last_checkpoint_good(alone: Path) -> None:
    folder = alone.parent / "lost"
    run = Worlds(2, together, lost, (folder,))
    assert run.codes() == [1, -signal.SIGKILL]
    assert "LostProcessError: process 1 of 2 has ended (counted from 0)" in run.log(0)
    assert in_world(2, arm_trained, folder) == ["", ""]
    assert different(alone, folder) == []

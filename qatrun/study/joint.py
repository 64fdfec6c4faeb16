"""What a study does on all processes together: train a segment, score a saved model. All else the leader does alone.

To train, the leader opens the model, from which each process gets its part (see `train.sharding`), and at the end it comes
back whole. To score, every process opens the model for itself, from what lies on disk, and the work is shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qatrun.data import Batch, PackedStream
from qatrun.evaluate.harness import score
from qatrun.evaluate.scores import Scores
from qatrun.evaluate.text import score_texts
from qatrun.followers import together
from qatrun.layout import ArmFolder
from qatrun.model import DTYPES, load_model, on_device, without_weights
from qatrun.quant import QuantPlan, ResumableState, attach, find_folds, folded, smooth, statistics
from qatrun.ranks import world
from qatrun.recipe import Arm, CalibrationConfig, EvalConfig, ModelConfig
from qatrun.records.scores import TextScores
from qatrun.records.training import Outcome
from qatrun.study.display import SILENT, Display, ScoringDisplay
from qatrun.study.variants import calibrated, computing_as
from qatrun.tokenizer import load_tokenizer
from qatrun.train.loop import train
from qatrun.train.segment import Segment, Watched
from qatrun.train.sharding import whole_state

# Gives a model, on the CPU, and its tokenizer; goes to other processes by pickle.
Opener = Callable[[], tuple[Any, Any]]


def open_plain(model: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """A Hugging Face folder's or hub id's model, in this dtype ("auto": its config's)."""
    return load_model(model, DTYPES.get(dtype, "auto")), load_tokenizer(model)


def train_together(
    segment: Segment,
    stream: PackedStream,
    display: Display,
    trackers: Sequence[str],
    watched: Watched,
    items: EvalConfig | None,
    *,
    keep: bool,
) -> tuple[Any, Outcome]:
    """Train a segment; raises as `train`.

    Args:
        watched: without the benchmark.
        items: what the mini-benchmark asks.
        keep: whether the trained model is wanted.
    Returns:
        (the model, whole and with quantizers attached, or None; what is known of the run).
    """
    act = partial(_train, segment, trackers, watched, items, keep)
    return together(act, (stream, display), (None, SILENT))


def _train(
    segment: Segment,
    trackers: Sequence[str],
    watched: Watched,
    items: EvalConfig | None,
    keep: bool,
    own: tuple[PackedStream | None, Display],
) -> tuple[Any, Outcome]:
    stream, display = own
    source, dtype = segment.arm.model, segment.arm.model.param_dtype
    model = load_model(source, DTYPES[dtype]) if world().leads else without_weights(source, DTYPES[dtype])
    if world().leads and segment.calibration is not None:
        _smooth_at_start(model, segment)
    tokenizer, teacher = load_tokenizer(source), None
    if (taught := segment.arm.teacher) is not None:
        compute = DTYPES[taught.compute_dtype]
        teacher = load_model(taught, compute) if world().leads else without_weights(taught, compute)

    def benchmark(model: Any) -> dict[str, float]:
        assert items is not None
        return {name: task.accuracy for name, task in score(model, tokenizer, items).tasks.items()}

    if items is not None:
        watched = replace(watched, benchmark=benchmark)
    outcome = train(segment, model, stream, display, trackers, watched, teacher)
    if not keep:
        return None, outcome
    return (model if world().size == 1 else _whole(model, segment)), outcome


def _smooth_at_start(model: Any, segment: Segment) -> None:
    """Smooth the weights that an arm starts from, as its calibration says."""
    how = segment.arm.qat.calibrating if segment.arm.qat is not None else CalibrationConfig()
    if how.smooth is None or segment.plan is None or segment.calibration is None:
        return
    smoothed_on = on_device(model)
    device = next(smoothed_on.parameters()).device
    with computing_as(segment.arm, smoothed_on):
        batches = [batch.to(device) for batch in segment.calibration]
        smooth(smoothed_on, folded(find_folds(smoothed_on), segment.plan.schemes), batches, how.smooth)


def _whole(sharded: Any, segment: Segment) -> Any:
    """A model that several processes trained as one would have trained it, where it is needed; else None."""
    scales = None if segment.plan is None else ResumableState(sharded.quant_state).state_dict()
    weights = whole_state(sharded)
    if not world().leads:
        return None
    model, _ = open_plain(segment.arm.model, segment.arm.model.param_dtype)
    model.load_state_dict(weights)
    if segment.plan is not None and scales is not None:
        ResumableState(attach(model, segment.plan)).load_state_dict(scales)
    return model


def calibrate_together(
    arm: Arm, folder: ArmFolder, plan: QuantPlan, batches: Sequence[Tensor], held_out: Tensor
) -> tuple[Any, Tensor]:
    """A model that is made by calibration alone, see `variants.calibrated`, and the `quant.statistics` of its tensors on
    held-out text, [batch, seq_len]."""
    return together(partial(_calibrate, arm, folder, plan, batches, held_out), None, None)


def _calibrate(
    arm: Arm, folder: ArmFolder, plan: QuantPlan, batches: Sequence[Tensor], held_out: Tensor, _: None
) -> tuple[Any, Tensor]:
    model = calibrated(arm, folder, plan, batches, arm.qat.calibrating if arm.qat else CalibrationConfig())
    with computing_as(arm, model):
        return model, statistics(model, held_out.to(next(model.parameters()).device)).cpu()


def score_together(
    opened: Opener,
    config: EvalConfig,
    output: Path | None,
    display: ScoringDisplay,
    *,
    texts: Mapping[str, Batch],
    answers: bool = True,
    at_most: int | None = None,
) -> tuple[Scores, TextScores]:
    """Score a model as `score` and `score_texts` do.

    Args:
        texts: to read, by name.
        answers: whether it answers items, too; else its scores are of no task.
    """
    return together(partial(_score, opened, config, output, texts, answers, at_most), display, SILENT)


def _score(
    opened: Opener,
    config: EvalConfig,
    output: Path | None,
    texts: Mapping[str, Batch],
    answers: bool,
    at_most: int | None,
    display: ScoringDisplay,
) -> tuple[Scores, TextScores]:
    model, tokenizer = opened()
    model, output, scores = on_device(model), output if world().leads else None, Scores({}, {})
    if answers:
        scores = score(model, tokenizer, config, output_dir=output, on_progress=display.on_scored, at_most=at_most)
    if not texts:
        return scores, TextScores(texts={})
    return scores, score_texts(model, texts, batch_size=config.batch_size, output_dir=output)

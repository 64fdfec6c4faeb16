"""What `qatrun check` shows of a preflight."""

from __future__ import annotations

from pathlib import Path

from qatrun.data import count_tokens
from qatrun.evaluate import paired
from qatrun.evaluate.plan import TaskPlan
from qatrun.recipe import Arm
from qatrun.records.dryrun import DryRun, DryRunArm, DryRunTask
from qatrun.study.checking import Preflight
from qatrun.study.environment import runs_on
from qatrun.study.estimate import disk_bytes, memory_bytes, phases
from qatrun.study.schemes import schemes_text
from qatrun.study.teacher import teacher_text
from qatrun.tokenizer import load_tokenizer


def dry_run_of(checked: Preflight) -> DryRun:
    """What of a preflight is shown."""
    quantized = {name: covered.quantized_weights for name, covered in checked.coverages.items()}
    known = checked.config is not None
    text_tokens = _text_tokens(checked) if checked.can_train else {}
    return DryRun(
        name=checked.recipe.name,
        folder=str(Path(checked.recipe.output_dir) / checked.recipe.name),
        model=checked.recipe.model.path,
        seeds=None if checked.recipe.train.seeds is None else list(checked.recipe.train.seeds),
        runs_on=runs_on(),
        num_parameters=checked.num_parameters if known else None,
        arms=[_arm(checked, name, arm, text_tokens.get(name)) for name, arm in checked.arms.items()],
        disk_bytes=disk_bytes(checked.arms, checked.num_parameters, quantized) if known else None,
        tasks=[_task(checked, task) for task in checked.tasks],
        assumed_discordance=paired.TYPICAL_DISCORDANCE,
        problems=[str(problem) for problem in checked.problems],
        warnings=[str(problem) for problem in checked.warnings],
        processes=checked.processes,
    )


def _text_tokens(checked: Preflight) -> dict[str, int | None]:
    """Arm -> tokens of one pass over its training text."""
    tokenizer = load_tokenizer(checked.recipe.model)  # that of all arms
    sources = {name: arm.data.train for name, arm in checked.arms.items()}
    texts = {source.model_dump_json(): source for source in sources.values()}
    counted = {text: count_tokens(source, "data.train", tokenizer) for text, source in texts.items()}
    return {name: counted[source.model_dump_json()] for name, source in sources.items()}


def _arm(checked: Preflight, name: str, arm: Arm, text_tokens: int | None) -> DryRunArm:
    covered = checked.coverages.get(name)
    memory = None
    if all(hasattr(checked.config, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")):
        num_quantized = covered.quantized_weights if covered else 0
        sizes = checked.num_parameters, num_quantized, checked.config, checked.processes, checked.teachers.get(name)
        memory = memory_bytes(arm, *sizes)
        memory = {phase: size for phase, size in memory.items() if phase in phases(arm)}
    tokens_per_step = arm.train.global_batch_size * arm.data.seq_len
    return DryRunArm(
        name=name,
        twin=arm.twin,
        steps=arm.train.steps,
        warmup_steps=arm.warmup.steps,
        switch_step=arm.switch_step,
        learning_rate=arm.train.learning_rate,
        tokens_per_step=tokens_per_step,
        tokens=tokens_per_step * arm.train.steps,
        coverage=str(covered) if covered is not None else None,
        roles=schemes_text(arm.qat, covered) if arm.qat is not None else [],
        method=arm.method,
        calibration=checked.calibrations.get(name, []),
        memory_bytes=memory,
        export=list(arm.export) if arm.qat is not None else [],
        teacher=teacher_text(arm),
        runs=checked.runs.get(name, []),
        text_tokens=text_tokens,
    )


def _task(checked: Preflight, task: TaskPlan) -> DryRunTask:
    detectable = 100 * paired.detectable_drop(task.num_items) if task.num_items else None
    return DryRunTask(**vars(task), budget_pp=checked.recipe.budget[task.name] or 0.0, detectable_drop_pp=detectable)

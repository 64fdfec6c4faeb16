"""The rules between keys: what each key alone may say is in the schema, what they may say together is here.

A rule yields findings. It names the keys it looked at, the one to blame first, so that a finding is reported where a
user can mend it, and left out where one of its keys is wrong by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qatrun.formats import FORMATS, Role, get_format
from qatrun.recipe.document import KeyPath
from qatrun.recipe.qat import QatConfig
from qatrun.recipe.schema import PERPLEXITY, START, TRAINING, Arm, Recipe
from qatrun.recipe.sections import Source, TrainConfig, WarmupConfig
from qatrun.scheme import GRANULARITIES, Scheme
from qatrun.text import suggestion


@dataclass(frozen=True)
class Finding:
    """A rule that is broken by what `keys` say together; the first is to blame where all stand in one place."""

    keys: tuple[KeyPath, ...]
    message: str


def _finding(message: str, *keys: str) -> Finding:
    """`keys` are dotted; a number is a position in a list."""
    paths = ((int(part) if part.isdecimal() else part for part in key.split(".")) for key in keys)
    return Finding(tuple(tuple(path) for path in paths), message)


def arm_findings(arm: Arm) -> Iterator[Finding]:
    """Every rule that one arm's sections break."""
    if (arm.model.param_dtype, arm.model.compute_dtype) == ("bfloat16", "float32"):
        message = "float32 makes no sense over bfloat16 parameters (did you mean param_dtype: float32?)"
        yield _finding(message, "model.compute_dtype", "model.param_dtype")
    yield from _batch_findings(arm)
    if arm.trains:
        yield from _phase_findings(arm)
    for name in ("train", "valid", "probe"):
        if (source := getattr(arm.data, name)) is not None:
            yield from _source_findings(f"data.{name}", source)
    if arm.qat is not None:
        yield from _qat_findings(arm.qat)


def _batch_findings(arm: Arm) -> Iterator[Finding]:
    total, micro = arm.train.global_batch_size, arm.train.micro_batch_size
    if total % micro:
        multiples = [multiple for multiple in (total - total % micro, total - total % micro + micro) if multiple]
        yield _finding(
            f"global_batch_size {total} is no multiple of micro_batch_size {micro} "
            f"(nearest: {' or '.join(map(str, multiples))})",
            "train.global_batch_size",
            "train.micro_batch_size",
        )


def _marked(value: int, default: int) -> str:
    """Nobody may have written it."""
    return f"{value} (the default)" if value == default else str(value)


def _phase_findings(arm: Arm) -> Iterator[Finding]:
    steps, warmup = arm.train.steps, arm.warmup.steps
    if not steps:
        yield _finding("must be at least 1 (got 0)", "train.steps")
        return
    if arm.train.lr_warmup_steps > steps:
        its = _marked(arm.train.lr_warmup_steps, TrainConfig(steps=1).lr_warmup_steps)
        message = f"lr_warmup_steps {its} is more than train.steps {steps}"
        yield _finding(message, "train.lr_warmup_steps", "train.steps")
    if warmup > steps:
        its = _marked(warmup, WarmupConfig().steps)
        yield _finding(f"warmup.steps {its} is more than train.steps {steps}", "warmup.steps", "train.steps")
    if arm.qat is None:
        return
    start = arm.qat.start_step
    if start is not None and start < warmup:
        message = f"start_step {start} is before the end of the BF16 warmup (at least {warmup}, warmup.steps)"
        yield _finding(message, "qat.start_step", "warmup.steps")
    if start is None and warmup == steps:
        message = f"warmup.steps {warmup} leaves no step for QAT (at most {steps - 1} of train.steps {steps})"
        yield _finding(message, "warmup.steps", "train.steps", "qat.start_step")
    if arm.qat.init == "ptq" and start not in (None, warmup):
        message = f"ptq gives the scales of an arm's first step (start_step must be {warmup}, warmup.steps, or null)"
        yield _finding(message, "qat.init", "qat.start_step")
    if arm.qat.init == "ptq" and arm.qat.calibrating.smooth is not None and warmup:
        message = (
            "init: ptq smooths the weights that training starts from; the trunk's optimizer is of weights as they were "
            "(warmup.steps: 0, or calibration.smooth: null)"
        )
        yield _finding(message, "qat.init", "qat.calibration.smooth", "warmup.steps")
    if start is not None and start >= steps:
        message = f"start_step {start} is past the last step (at most {steps - 1}, with train.steps {steps})"
        yield _finding(message, "qat.start_step", "train.steps")


def arm_warnings(arm: Arm) -> Iterator[Finding]:
    """What one arm's sections say together that can be run, but is hardly meant."""
    steps, rise = arm.train.steps, arm.train.lr_warmup_steps
    if not arm.trains:
        return
    if rise >= steps:
        message = f"the learning rate rises over all {steps} steps: it reaches train.learning_rate in the last"
        yield _finding(message, "train.lr_warmup_steps", "train.steps")
    elif 2 * rise > steps:
        message = f"the learning rate still rises when most of the training is over ({rise} of {steps} steps)"
        yield _finding(message, "train.lr_warmup_steps", "train.steps")
    named = next((name for name in FORMATS if name in arm.name.replace("-", "_")), None)
    if named and arm.qat is not None and all(scheme.format != named for scheme in arm.qat.schemes.values()):
        message = f"the arm is named {arm.name}, and holds {arm.qat.format}: tables show its format beside the name"
        yield _finding(message, "qat.format")


def _source_findings(key: str, source: Source) -> Iterator[Finding]:
    if source.messages_column is not None and source.text_column is not None:
        message = "text_column and messages_column exclude each other: give one"
        yield _finding(message, f"{key}.messages_column", f"{key}.text_column")
    if source.roles is not None and source.messages_column is None:
        yield _finding(
            "roles are those of conversations: give messages_column", f"{key}.roles", f"{key}.messages_column"
        )


def _qat_findings(qat: QatConfig) -> Iterator[Finding]:
    yield from _scheme_findings(qat, qat.schemes, ("qat",))
    for index, module in enumerate(qat.modules):
        place = f"qat.modules.{index}"
        said = sorted(module.model_fields_set - {"match", "format"})
        if not module.in_bf16:
            yield from _scheme_findings(qat, qat.schemes_of(module) or {}, (place, "qat"))
        elif said:
            message = f"makes no sense for linears left in BF16 (format: null); leave {' and '.join(said)} out"
            yield _finding(message, f"{place}.{said[0]}", f"{place}.format")


def _scheme_findings(qat: QatConfig, schemes: Mapping[Role, Scheme], sections: tuple[str, ...]) -> Iterator[Finding]:
    """Those of the schemes that the sections make together, the first having the last word."""
    for role, scheme in schemes.items():
        yield from _granularity_findings(role, scheme, sections)
        yield from _format_findings(role, scheme, sections)
        if scheme.scaling.unit != qat.scaling.unit:
            message = f"one unit for all roles: set qat.scaling.unit (here {qat.scaling.unit})"
            yield _finding(message, *_keys(sections, role, "scaling.unit"))


def _keys(sections: tuple[str, ...], role: Role, *keys: str) -> Iterator[str]:
    """Where a setting of a role may stand, nearest first: each section's role, then the section itself."""
    for section in sections:
        yield from (f"{section}.{role}.{key}" for key in keys)
        yield from (f"{section}.{key}" for key in keys if key in ("format", "scaling.type", "scaling.unit"))


def _granularity_findings(role: Role, scheme: Scheme, sections: tuple[str, ...]) -> Iterator[Finding]:
    granularity = GRANULARITIES[scheme.granularity]
    if role not in granularity.roles:
        fitting = [name for name, other in GRANULARITIES.items() if role in other.roles]
        nearest = max(fitting, key=lambda name: GRANULARITIES[name].rows == granularity.rows)
        message = f"{scheme.granularity} makes no sense for {role} (did you mean '{nearest}'?)"
        yield _finding(message, *_keys(sections, role, "granularity"))
    elif granularity.rows and scheme.scaling.type != "dynamic":
        message = f"{scheme.scaling.type} scaling keeps one scale per tensor; {scheme.granularity} takes only 'dynamic'"
        yield _finding(
            message, *(f"{section}.{role}.{key}" for section in sections for key in ("scaling.type", "granularity"))
        )


def _format_findings(role: Role, scheme: Scheme, sections: tuple[str, ...]) -> Iterator[Finding]:
    largest = get_format(scheme.format).max_finite
    if role == "grad_output" and scheme.format == "int8":
        message = "int8 makes no sense for grad_output: its range is too narrow (did you mean 'fp8_e5m2'?)"
        yield _finding(message, *_keys(sections, role, "format"))
    elif problem := scheme.asymmetry_problem(role):
        yield _finding(problem, *_keys(sections, role, "symmetric", "format", "target_amax", "scaling.type"))
    elif problem := scheme.block_problem():
        yield _finding(problem, *_keys(sections, role, "granularity", "format", "target_amax"))
    elif scheme.symmetric and scheme.target_amax > largest:
        message = f"target_amax {scheme.target_amax:g} is above the largest {scheme.format} value (at most {largest:g})"
        yield _finding(message, *_keys(sections, role, "target_amax", "format"))


def study_findings(recipe: Recipe) -> Iterator[Finding]:
    """Every rule that the shared sections break."""
    for task in recipe.budget:
        if task not in (choices := (*recipe.eval.tasks, PERPLEXITY, TRAINING)):
            message = f"no such task in eval.tasks{suggestion(task, choices)}"
            yield Finding((("budget", task), ("eval", "tasks", task)), message)
    yield from _seed_findings(recipe)
    for name, (first, second) in recipe.contrasts.items():
        mistake = _contrast_mistake(first, second, recipe.arm_names)
        if mistake:
            yield Finding((("contrasts", name), ("arms",)), mistake)


def _seed_findings(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.seeds is not None and recipe.train.seed:
        yield _finding("seed and seeds exclude each other: give one", "train.seed", "train.seeds")
    for name, overrides in recipe.arms.items():
        train = overrides.get("train")
        given = train if isinstance(train, Mapping) else {}
        if "seeds" in given:
            message = "is shared by all arms; no arm may change it"
            yield Finding((("arms", name, "train", "seeds"),), message)
        if "seed" in given and recipe.train.seeds is not None:
            message = "an arm has no seed of its own where train.seeds gives them"
            yield Finding((("arms", name, "train", "seed"),), message)


def _contrast_mistake(first: str, second: str, arms: tuple[str, ...]) -> str | None:
    unknown = [name for name in (first, second) if name not in (*arms, START)]
    if unknown:
        return f"no such arm '{unknown[0]}'{suggestion(unknown[0], (*arms, START))}"
    return f"'{first}' against itself: name two arms" if first == second else None


def twin_findings(arms: Mapping[str, Arm]) -> Iterator[Finding]:
    """Every arm whose twin cannot be what it is compared with. `Arm.twin` is what the recipe states, if anything."""
    bf16_arms = [name for name, arm in arms.items() if arm.qat is None]
    for name, arm in arms.items():
        message = _twin_mistake(arm, arms, bf16_arms)
        if message:
            yield Finding((("arms", name, "twin"),), message)


def _twin_mistake(arm: Arm, arms: Mapping[str, Arm], bf16_arms: list[str]) -> str | None:
    if arm.twin == START and not arm.trains:
        return None
    if arm.twin is None:
        ambiguous = arm.qat is not None and len(bf16_arms) > 1
        return f"required: which BF16 arm to compare with{suggestion('', bf16_arms)}" if ambiguous else None
    if arm.qat is None:
        return "a BF16 arm has no twin"
    if arm.twin not in arms:
        return f"no such arm '{arm.twin}'{suggestion(arm.twin, bf16_arms)}"
    if arms[arm.twin].qat is not None:
        return f"arm '{arm.twin}' is quantized itself{suggestion('', bf16_arms)}"
    return None

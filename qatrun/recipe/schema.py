"""What a recipe may say: every key with its type, default, range, unit and meaning.

A `Recipe` describes a study: shared sections, and arms that override some of them. An `Arm` is the sections with the
overrides applied; the loader resolves them. Rules that need more than one key are in `rules.py`; `load_recipe` and
`parse_recipe` check everything at once. `recipes/README.md` is made from what is said here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)

from qatrun.recipe.distill import START_MODEL
from qatrun.recipe.document import as_yaml
from qatrun.recipe.monitor import DiagnoseConfig, MonitorConfig
from qatrun.recipe.qat import QatConfig, Section
from qatrun.recipe.sections import (
    DataConfig,
    EvalConfig,
    Location,
    ModelConfig,
    NonEmpty,
    TargetConfig,
    TrainConfig,
    WarmupConfig,
)
from qatrun.serving import EXPORT_NAMES

DEFAULT_BUDGET_PP = 1.0
DEFAULT_BUDGET_PERPLEXITY = 1.0  # percent
PERPLEXITY, TRAINING = "perplexity", "training"  # keys of a budget that name no task
PLAIN_FOLDER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
RESERVED_ARM_NAMES = re.compile(r"start|trunk.*|eval|checkpoints|quantized")


def _plain_folder_name(name: str) -> str:
    if not PLAIN_FOLDER_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"must be a plain folder name of letters, digits, '.', '_' and '-' (got '{name}')")
    return name


def _not_reserved(name: str) -> str:
    if RESERVED_ARM_NAMES.fullmatch(name):
        raise ValueError(f"'{name}' is reserved for a folder of the study; choose another name")
    return name


def _distinct_names(names: tuple[str, ...]) -> tuple[str, ...]:
    repeated = [name for position, name in enumerate(names) if name in names[:position]]
    if repeated:
        raise ValueError(f"duplicate name '{repeated[0]}'")
    return names


def _is_pair(names: Any) -> Any:
    if isinstance(names, list | tuple) and len(names) != 2:
        raise ValueError(f"must be two arms, [a, b] (got {len(names)})")
    return names


def _percent(budget: Any) -> Any:
    """`1 %` as the number that it is."""
    if isinstance(budget, Mapping) and isinstance(text := budget.get(PERPLEXITY), str):
        with suppress(ValueError):
            return {**budget, PERPLEXITY: float(text.removesuffix("%"))}
    return budget


Budgets = dict[str, float | None]  # of PERPLEXITY alone it may be None
FolderName = Annotated[str, AfterValidator(_plain_folder_name)]
ArmName = Annotated[FolderName, AfterValidator(_not_reserved)]
Overrides = Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]
if TYPE_CHECKING:
    ExportName = str
else:
    ExportName = Literal[EXPORT_NAMES]
Exports = Annotated[tuple[ExportName, ...], Field(strict=False), AfterValidator(_distinct_names)]
TwoArms = Annotated[tuple[str, str], Field(strict=False), BeforeValidator(_is_pair)]


Method = Literal["qat", "ptq"]


class Arm(Section):
    """One arm of a study: the recipe's sections with its overrides applied.

    Attributes:
        method: how it comes about: by training, or by calibration alone.
        twin: name of the BF16 arm it is compared with, and under `ptq` made from, or START; None for a BF16 arm, and for one
            that is trained where the study has no BF16 arm.
        qat: None for a BF16 arm.
    """

    name: str
    method: Method = "qat"
    twin: str | None
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    warmup: WarmupConfig = WarmupConfig()
    qat: QatConfig | None = QatConfig()
    export: Exports = ()
    monitor: MonitorConfig = MonitorConfig()
    eval: EvalConfig

    @property
    def trains(self) -> bool:
        """Whether a step is trained for it, as for every BF16 arm."""
        return self.method != "ptq" or self.qat is None

    @property
    def switch_step(self) -> int | None:
        """First optimizer step (counted from 0) with fake quantization on; None for an arm that never trains with it."""
        if self.qat is None or not self.trains:
            return None
        return self.warmup.steps if self.qat.start_step is None else self.qat.start_step

    @property
    def teacher(self) -> ModelConfig | None:
        """What its training distils from; None where nothing."""
        if (distill := self.train.distill) is None:
            return None
        other = {"path": distill.teacher, "revision": None}
        return self.model if distill.teacher == START_MODEL else self.model.model_copy(update=other)


START = "start"
ARM_SECTIONS = ("model", "data", "train", "warmup", "qat", "export")
ARM_KEYS = ("method", "twin")  # that stand beside them


def _default_arms(valid: dict[str, Any]) -> dict[str, dict[str, Any]]:
    qat = valid.get("qat")
    trained = {"bf16": {"qat": None}} if valid.get("method") != "ptq" or qat is None else {}
    return trained | ({} if qat is None else {qat.format: {}})


class Recipe(Section):
    """A study: one trunk, its arms, how they are scored and how much they may lose."""

    name: FolderName = Field(description="folder of the study under `output_dir`", examples=["my-study"])
    model: ModelConfig = Field(description="the model to start from")
    data: DataConfig = Field(description="training and held-out text")
    train: TrainConfig = Field(description="the training loop")
    warmup: WarmupConfig = Field(WarmupConfig(), description="the BF16 phase before the switch")
    qat: QatConfig | None = Field(QatConfig(), description="what is quantized and how; null: nothing")
    method: Method = Field(
        "qat",
        description="how quantized arms come about: `qat`: they are trained; `ptq`: by calibration alone, from their "
        "twin; an arm may have its own",
    )
    arms: Annotated[dict[ArmName, Overrides], Field(min_length=1)] = Field(
        default_factory=_default_arms,
        description="arm -> overrides of model, data, train, warmup, qat and export, deep-merged over the recipe; "
        "`twin: <arm>` names the BF16 arm to compare with (default: the only one); "
        "under `method: ptq` that is what it is made from, and `twin: start` is the model before training (the default "
        "where there is no BF16 arm); "
        "default: `bf16`, without qat, where anything is trained, and one named after `qat.format`",
    )
    export: Exports = Field(
        (),
        description="folders for serving engines that each quantized arm is written as at the end of `qatrun train`, proven "
        "equal and scored again in the engine",
    )
    target: TargetConfig = Field(
        TargetConfig(),
        exclude_if=lambda target: target.hardware is None,  # as `is_null` says
        description="what the arms are meant for",
    )
    monitor: MonitorConfig = Field(MonitorConfig(), description="what is watched while training")
    eval: EvalConfig = Field(description="how start model and arms are scored")
    diagnose: DiagnoseConfig = Field(DiagnoseConfig(), description="what is asked when a drop is to be explained")
    budget: Annotated[dict[NonEmpty, PositiveFloat | None], BeforeValidator(_percent)] = Field(
        default_factory=dict,
        validate_default=True,
        description=f"task -> largest acceptable drop, in percentage points; {DEFAULT_BUDGET_PP} for a task not named. "
        f"`{PERPLEXITY}`: largest acceptable rise of held-out perplexity against the twin, in percent (`1` or `1 %`; "
        f"default {DEFAULT_BUDGET_PERPLEXITY:g}; null: not judged). `{TRAINING}`: largest acceptable drop from the start "
        "model to the arm over all tasks, in percentage points (default: only said, never failed)",
        examples=[{"hellaswag": 1.0, "perplexity": 1.0, "training": 3.0}],
    )
    contrasts: dict[NonEmpty, TwoArms] = Field(
        default_factory=dict,
        description="question -> `[a, b]`, two arms (or `start`, the model before training): accuracy of `a` minus that "
        "of `b` over the items of all tasks, paired by item and seed; default: none",
        examples=[{"does the window help": ["max-64", "latest"]}],
    )
    output_dir: Location = Field("runs", description="folder that studies are written under")
    _arm_by_name: dict[str, Arm] = PrivateAttr(default_factory=dict)

    @field_validator("budget")
    @classmethod
    def _every_task_has_a_budget(cls, budget: dict[str, float | None], info: ValidationInfo) -> Budgets:
        tasks = info.data["eval"].tasks if "eval" in info.data else {}
        given = {name: value for name, value in budget.items() if value is not None or name == PERPLEXITY}
        return {**dict.fromkeys(tasks, DEFAULT_BUDGET_PP), PERPLEXITY: DEFAULT_BUDGET_PERPLEXITY, **given}

    @property
    def arm_names(self) -> tuple[str, ...]:
        """The arms in the order of the recipe."""
        return tuple(self.arms)

    @property
    def arm_by_name(self) -> Mapping[str, Arm]:
        """The arms in the order of the recipe, resolved; TypeError where no loader made it."""
        if not self._arm_by_name:
            raise TypeError("its arms are not resolved: make a recipe with load_recipe or parse_recipe")
        return self._arm_by_name

    def with_arms(self, arms: Mapping[str, Arm]) -> Recipe:
        """The recipe with its arms resolved to these."""
        recipe = self.model_copy()
        recipe._arm_by_name = dict(arms)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with every default written out, as YAML that loads back equal."""
        return as_yaml(self.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors."""
    schema = Recipe.model_json_schema()
    description = "recipe to extend: a file, relative to this one, or a shipped name"
    extends = {"type": ["string", "null"], "default": None, "description": description}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return schema

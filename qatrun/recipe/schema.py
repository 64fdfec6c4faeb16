"""What a recipe may say: every key with its type, default, range, unit and meaning.

A `Recipe` describes a study: shared sections, and arms that override some of them. An `Arm` is the sections with the
overrides applied; the loader resolves them. Rules that need more than one key are in `rules.py`; `load_recipe` and
`parse_recipe` check everything at once. `recipes/README.md` is made from this file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PrivateAttr,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML

from qatrun.hardware import HARDWARE_NAMES
from qatrun.paths import expand_path
from qatrun.recipe.distill import START_MODEL, DistillConfig
from qatrun.recipe.monitor import DiagnoseConfig, MonitorConfig
from qatrun.recipe.qat import Count, QatConfig, Section, is_null
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


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise ValueError("must not be empty")
    repeated = [seed for position, seed in enumerate(seeds) if seed in seeds[:position]]
    if repeated:
        raise ValueError(f"duplicate seed {repeated[0]}")
    return seeds


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


def _without_null(tasks: Any) -> Any:
    return {name: value for name, value in tasks.items() if value is not None} if isinstance(tasks, dict) else tasks


Budgets = dict[str, float | None]  # of PERPLEXITY alone it may be None
FolderName = Annotated[str, AfterValidator(_plain_folder_name)]
ArmName = Annotated[FolderName, AfterValidator(_not_reserved)]
Overrides = Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]
NonEmpty = Annotated[str, Field(min_length=1)]
Location = Annotated[str, AfterValidator(expand_path)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seeds = Annotated[tuple[Seed, ...], Field(strict=False), AfterValidator(_distinct)]
if TYPE_CHECKING:
    ExportName = str
    HardwareName = str
else:
    ExportName, HardwareName = Literal[EXPORT_NAMES], Literal[HARDWARE_NAMES]
Exports = Annotated[tuple[ExportName, ...], Field(strict=False), AfterValidator(_distinct_names)]
TwoArms = Annotated[tuple[str, str], Field(strict=False), BeforeValidator(_is_pair)]


class ModelConfig(Section):
    """The model to start from."""

    path: Location = Field(
        description="Hugging Face hub id, local folder, or `builtin:demo`", examples=["Qwen/Qwen3-0.6B"]
    )
    revision: NonEmpty | None = Field(None, description="hub branch, tag or commit; null: the default branch")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype that the optimizer updates (master weights)"
    )
    compute_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="autocast dtype of the forward")
    trust_remote_code: bool = Field(False, description="run Python code shipped with the model")
    attn_implementation: Literal["sdpa", "eager"] = Field("sdpa", description="attention kernel")


class Source(Section):
    """Where text comes from."""

    path: Location = Field(
        description="hub id, local file (.txt, .json, .jsonl, .csv, .tsv or .parquet; all but .parquet may end in .gz, .zst "
        "or .bz2) or folder of such files, or `builtin:demo`",
        examples=["HuggingFaceFW/fineweb"],
    )
    subset: NonEmpty | None = Field(None, description="hub configuration, such as `sample-10BT`")
    split: NonEmpty = Field("train", description="split of the data set")
    text_column: NonEmpty | None = Field(
        None, exclude_if=is_null, description="column of plain text, loss on every token; null: `text`"
    )
    messages_column: NonEmpty | None = Field(
        None,
        description="column of conversations, instead of `text_column`: chat template applied, loss on the assistant's "
        "answers only; null: plain text",
    )
    roles: dict[NonEmpty, NonEmpty] | None = Field(
        None,
        exclude_if=is_null,
        description="role in the conversations -> role of the chat template; null: as they are written, but `human` and "
        "`gpt` of ShareGPT's `from`/`value` turns are user and assistant",
        examples=[{"human": "user", "bot": "assistant"}],
    )
    streaming: bool = Field(False, description="read while training instead of downloading first")
    shuffle: bool = Field(True, description="shuffle documents by `train.seed`")

    @property
    def column(self) -> str:
        """The one that is read."""
        return self.messages_column or self.text_column or "text"


class DataConfig(Section):
    """Training and held-out text."""

    train: Source = Field(description="training text")
    valid: Source | None = Field(
        None, description="held-out text; null: the first `valid_sequences` packed sequences of the training text"
    )
    probe: Source | None = Field(
        None,
        description="text of the kind the model was pretrained on, for the forgetting probe; null: what the start model "
        "writes itself, or the held-out text where that is of the same kind",
    )
    valid_sequences: Count = Field(
        64, description="packed sequences held out for perplexity, and of text for the forgetting probe"
    )
    seq_len: int = Field(1024, ge=2, description="tokens per packed sequence")


class TrainConfig(Section):
    """The training loop: AdamW, one schedule from the first step to the last, warmup and QAT alike."""

    steps: NonNegativeInt = Field(
        description="optimizer steps in total, warmup included; 0 where every arm has `method: ptq`", examples=[1000]
    )
    global_batch_size: Count = Field(32, description="sequences per optimizer step")
    micro_batch_size: Count = Field(8, description="sequences per forward; divides `global_batch_size`")
    learning_rate: PositiveFloat = Field(1e-5, description="peak learning rate")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the lr warmup")
    lr_warmup_steps: NonNegativeInt = Field(100, description="steps of linear rise to the peak; at most `steps`")
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="last learning rate over the peak")
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW's decoupled weight decay")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field((0.9, 0.95), description="AdamW's betas")
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="gradient norm clipped to this; null: not clipped")
    seed: Seed = Field(0, description="fixes the order of the data and every random number")
    seeds: Seeds | None = Field(
        None,
        description="run every arm once for each of these instead of `seed`, each time in a folder `seed-<n>` that is a "
        "study of its own; null: once",
    )
    distill: DistillConfig | None = Field(
        None,
        exclude_if=is_null,
        description="a teacher to learn from as well, in every arm alike; null: from text alone",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward to save memory")
    save_every: Count = Field(500, description="steps between checkpoints")
    keep_last: Count = Field(2, description="checkpoints kept")


class WarmupConfig(Section):
    """The BF16 phase before the switch: the trunk that the arms share."""

    steps: NonNegativeInt = Field(500, description="BF16 optimizer steps; at most `train.steps`")
    learning_rate: PositiveFloat | None = Field(
        None, description="peak learning rate of this phase, constant; null: `train.learning_rate` and its schedule"
    )


class EvalConfig(Section):
    """How start model and arms are scored."""

    tasks: Annotated[dict[NonEmpty, NonNegativeInt], BeforeValidator(_without_null)] = Field(
        min_length=1,
        description="lm-eval task or group -> few-shot examples; null: not this one of the recipe that is extended",
        examples=[{"hellaswag": 10}],
    )
    data_dir: Location | None = Field(
        None, description="folder laid out like the hub (`org/name`) to take benchmark data from; null: the hub"
    )
    limit: Count | None = Field(None, description="items per leaf task (MMLU has 57); null: all")
    batch_size: Count = Field(16, description="sequences per forward")


class TargetConfig(Section):
    """What the arms are meant for. It changes no number: what would not run there natively is said before training."""

    hardware: HardwareName | None = Field(
        None, description="chip to serve on; null: none is asked about (as `qatrun check --hardware`)"
    )


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
        text = io.StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel.yaml annotates it as None
        yaml.dump(self.model_dump(mode="json"), text)
        return text.getvalue()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors."""
    schema = Recipe.model_json_schema()
    description = "recipe to extend: a file, relative to this one, or a shipped name"
    extends = {"type": ["string", "null"], "default": None, "description": description}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return schema

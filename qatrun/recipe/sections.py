"""The sections of a recipe that every arm has: model, text, training, warmup, scoring, target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from qatrun.hardware import HARDWARE_NAMES
from qatrun.paths import expand_path
from qatrun.recipe.distill import DistillConfig
from qatrun.recipe.qat import Count, Section, is_null


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds:
        raise ValueError("must not be empty")
    repeated = [seed for position, seed in enumerate(seeds) if seed in seeds[:position]]
    if repeated:
        raise ValueError(f"duplicate seed {repeated[0]}")
    return seeds


def _without_null(tasks: Any) -> Any:
    return {name: value for name, value in tasks.items() if value is not None} if isinstance(tasks, dict) else tasks


NonEmpty = Annotated[str, Field(min_length=1)]
Location = Annotated[str, AfterValidator(expand_path)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Seeds = Annotated[tuple[Seed, ...], Field(strict=False), AfterValidator(_distinct)]
if TYPE_CHECKING:
    HardwareName = str
else:
    HardwareName = Literal[HARDWARE_NAMES]


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

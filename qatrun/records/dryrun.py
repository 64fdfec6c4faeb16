"""What `qatrun check` shows of a recipe before it runs."""

from __future__ import annotations

from pydantic import Field

from qatrun.files import Record


class DryRunArm(Record):
    """One arm.

    Attributes:
        switch_step: steps before fake quantization; None for a BF16 arm.
        text_tokens: of one pass over its training text, about; None where they were not counted.
        coverage: how much is quantized, in words; None where nothing is, or it is not known.
        roles: how each role is quantized, in words.
        memory_bytes: phase -> estimated peak; None where the architecture says too little.
        export: what it is written as in the end.
        method: "qat", or "ptq" for an arm that no step is trained for.
        calibration: how scales are found without training, in words.
        teacher: what it learns from beside the text, in words; None where nothing.
        runs: what of it the hardware that it is meant for runs natively, a line a scheme.
    """

    name: str
    twin: str | None
    steps: int
    warmup_steps: int
    switch_step: int | None
    learning_rate: float
    tokens_per_step: int
    tokens: int
    coverage: str | None
    roles: list[str]
    memory_bytes: dict[str, int] | None
    export: list[str] = Field(default_factory=list)
    method: str = "qat"
    calibration: list[str] = Field(default_factory=list)
    teacher: str | None = None
    runs: list[str] = Field(default_factory=list)
    text_tokens: int | None = None


class DryRunTask(Record):
    """One task.

    Attributes:
        num_items: None where only a download would tell, as `detectable_drop_pp` then is.
        detectable_drop_pp: what they would show at 80% power, if two models disagree on `assumed_discordance` of them.
        missing: why it cannot be scored here and now.
    """

    name: str
    num_fewshot: int
    metric: str
    num_items: int | None
    source: str
    budget_pp: float
    detectable_drop_pp: float | None
    missing: str | None


class DryRun(Record):
    """A whole recipe.

    Attributes:
        num_parameters: None where the model cannot be looked at, as is `disk_bytes`, phase -> estimate.
        processes: that are to train together; memory is that of each.
        training_seconds: of all arms and trunks, estimated from steps that were timed; None where none was.
        assumed_discordance: share of the items on which two models are taken to differ.
    """

    name: str
    folder: str
    model: str
    seeds: list[int] | None
    runs_on: str
    num_parameters: int | None
    arms: list[DryRunArm]
    disk_bytes: dict[str, int] | None
    tasks: list[DryRunTask]
    assumed_discordance: float
    problems: list[str]
    warnings: list[str] = Field(default_factory=list)
    processes: int = 1
    training_seconds: float | None = None

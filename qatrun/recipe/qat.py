"""The `qat` section: what is quantized, to which format, and how its scales are found.

Settings are inherited downwards: a role (weight, input, grad_output) takes `format` and `scaling` from the section
unless it states its own, and `target_amax` from its format. `QatConfig.schemes` has all of that applied.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat
from pydantic import field_serializer as serialized_by

from qatrun.formats import ROLES, Role, get_format
from qatrun.recipe.patterns import check_pattern
from qatrun.scheme import Scaling, Scheme

FormatName = Literal["hif8", "fp8_e4m3", "fp8_e5m2", "int8"]
Granularity = Literal["per_tensor", "per_channel", "per_token"]
SavedActivations = Literal["values", "codes"]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A mapping of the recipe: immutable, no unknown keys, no silent conversions, no NaN or Inf."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _no_duplicates(patterns: tuple[str, ...]) -> tuple[str, ...]:
    repeated = [pattern for position, pattern in enumerate(patterns) if pattern in patterns[:position]]
    if repeated:
        raise ValueError(f"duplicate pattern '{repeated[0]}'")
    return patterns


Pattern = Annotated[str, Field(min_length=1), AfterValidator(check_pattern)]
Patterns = Annotated[tuple[Pattern, ...], Field(strict=False), AfterValidator(_no_duplicates)]


class ScalingConfig(Section):
    """How a scale is found from the amaxes seen."""

    type: Literal["delayed", "dynamic", "static", "none"] = Field(
        "delayed",
        description="`delayed`: from the amaxes of earlier steps; `dynamic`: from the tensor at hand; "
        "`static`: frozen at the switch; `none`: scale 1",
    )
    algorithm: Literal["max", "most_recent", "ema"] = Field(
        "max", description="delayed: largest or latest amax of the window, or their exponential moving average"
    )
    ema_decay: float = Field(0.9, gt=0.0, lt=1.0, description="ema: weight of an amax over that of the next newer one")
    window: Count = Field(64, description="delayed: length of the amax history, in `unit`s")
    update_interval: Count = Field(1, description="delayed: a new scale every so many `unit`s")
    unit: Literal["optimizer_step", "microbatch"] = Field(
        "optimizer_step", description="delayed: what pushes one entry onto the amax history"
    )


class RoleConfig(Section):
    """How one role's tensors are quantized; what is null is inherited."""

    format: FormatName | None = Field(None, description="number format; null: `qat.format`")
    granularity: Granularity = Field(
        "per_tensor",
        description="what shares a scale: the tensor, an output channel (weight only) or a token (input only)",
    )
    target_amax: PositiveFloat | None = Field(
        None,
        description="grid value that amax is mapped to, at most the format's largest; null: the format's default",
    )
    scaling: ScalingConfig | None = Field(
        None,
        description="keys that differ from `qat.scaling`; null: none do "
        "(but `dynamic` for per_channel and per_token, their only type)",
    )

    @serialized_by("scaling")
    def _only_what_was_given(self, scaling: ScalingConfig | None) -> dict[str, Any] | None:
        # A key not given is inherited; written out with its default it would stop being so.
        return None if scaling is None else scaling.model_dump(exclude_unset=True)


class SkipBlocks(Section):
    """Transformer blocks kept in BF16."""

    first: NonNegativeInt = Field(0, description="blocks at the input end")
    last: NonNegativeInt = Field(0, description="blocks at the output end")


class QatConfig(Section):
    """Quantization-aware training; null trains in BF16 throughout."""

    start_step: NonNegativeInt | None = Field(
        None, description="optimizer step of the switch from BF16 to QAT; null: `warmup.steps`"
    )
    format: FormatName = Field("hif8", description="number format of every role that states none")
    scaling: ScalingConfig = Field(ScalingConfig(), description="how scales are found")
    weight: RoleConfig = Field(RoleConfig(), description="weights")
    input: RoleConfig = Field(RoleConfig(), description="input activations")
    grad_output: RoleConfig | None = Field(
        None, description="output gradients in the backward; null: not quantized; {}: quantized with the defaults"
    )
    clip: Literal["format", "target"] = Field(
        "format", description="edge at which values saturate: the format's largest value, or `target_amax`"
    )
    ste: Literal["identity", "clipped"] = Field(
        "clipped", description="straight-through gradient: of every value, or zero for the saturated ones"
    )
    saved_activations: SavedActivations = Field(
        "values",
        description="what quantized linears keep for the backward: grid values, or their 8-bit codes: "
        "less memory, some time, the same results bit for bit",
    )
    targets: Patterns | None = Field(
        None, description="linears to quantize: names, globs or `re:` regular expressions; null: all but lm_head"
    )
    ignore: Patterns = Field((), description="linears left in BF16, same patterns; wins over `targets`")
    skip_blocks: SkipBlocks = Field(SkipBlocks(), description="transformer blocks kept in BF16")

    @property
    def schemes(self) -> dict[Role, Scheme]:
        """Of each role that is quantized, with format, target and scaling inherited."""
        return {role: self._scheme(role, config) for role in ROLES if (config := getattr(self, role)) is not None}

    def _scheme(self, role: Role, config: RoleConfig) -> Scheme:
        format_name = config.format or self.format
        return Scheme(
            format=format_name,
            granularity=config.granularity,
            target_amax=config.target_amax or get_format(format_name).target_amax[role],
            scaling=Scaling(**self._role_scaling(config).model_dump()),
            clip=self.clip,
            ste=self.ste,
        )

    def _role_scaling(self, config: RoleConfig) -> ScalingConfig:
        given = {} if config.scaling is None else config.scaling.model_dump(exclude_unset=True)
        if config.granularity != "per_tensor":
            given = {"type": "dynamic", **given}
        return self.scaling.model_copy(update=given)

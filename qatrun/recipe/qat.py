"""The `qat` section: what is quantized, to which format, and how its scales are found.

Settings are inherited downwards: a role (weight, input, grad_output) takes `format` and `scaling` from the section
unless it states its own, and `target_amax` from its format. `QatConfig.schemes` has all of that applied. An entry of
`modules` is laid over the section as an arm is over the recipe, for the linears that it names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
)

from qatrun.formats import FORMATS, ROLES, Role, get_format
from qatrun.patterns import check_pattern
from qatrun.recipe.document import deep_merge
from qatrun.scheme import ASYMMETRIC_STEPS, GRANULARITIES, RULES, Assignment, Clip, Rounding, Scaling, Scheme, Ste

if TYPE_CHECKING:
    FormatName = str
    Granularity = str
    RuleName = str
else:  # names of the tables, as the schema and its messages read them
    FormatName, Granularity, RuleName = (Literal[tuple(table)] for table in (FORMATS, GRANULARITIES, RULES))
PER_ROW = frozenset(name for name, granularity in GRANULARITIES.items() if granularity.rows)
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


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def is_null(value: object) -> bool:
    """Whether a key says nothing. Some are not written then, so that studies made before there were such keys go on."""
    return value is None


class ScalingConfig(Section):
    """How a scale is found from the amaxes seen."""

    type: Literal["delayed", "dynamic", "static", "none"] = Field(
        Scaling.type,
        description="`delayed`: from the amaxes of earlier steps; `dynamic`: from the tensor at hand; "
        "`static`: frozen at the switch; `none`: scale 1",
    )
    algorithm: RuleName = Field(
        Scaling.algorithm,
        description="delayed: largest or latest amax of the window, or their exponential moving average",
    )
    ema_decay: float = Field(
        Scaling.ema_decay, gt=0.0, lt=1.0, description="ema: weight of an amax over that of the next newer one"
    )
    window: Count = Field(Scaling.window, description="delayed: length of the amax history, in `unit`s")
    update_interval: Count = Field(Scaling.update_interval, description="delayed: a new scale every so many `unit`s")
    unit: Literal["optimizer_step", "microbatch"] = Field(
        Scaling.unit, description="delayed: what pushes one entry onto the amax history"
    )
    rounding: Rounding = Field(
        Scaling.rounding,
        description="`power_of_two`: scales are rounded up to one, so that serving engines compute the very same numbers; "
        "costs next to nothing in HiF8 and FP8, in INT8 about half of its precision",
    )


def _nullable(section: type[Section], name: str) -> Any:
    """A section of the same keys, each of which may be null, and is by default: so it says only what differs."""
    keys: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        of_field = field.asdict()
        kind: Any = of_field["annotation"]
        attributes = of_field["attributes"] | {"default": None, "exclude_if": is_null}
        keys[key] = (Annotated[kind | None, *of_field["metadata"], Field(**attributes)], None)
    return create_model(name, __base__=Section, __doc__=section.__doc__, **keys)


if TYPE_CHECKING:
    RoleScaling = ScalingConfig
else:
    RoleScaling = _nullable(ScalingConfig, "RoleScaling")


class RoleConfig(Section):
    """How one role's tensors are quantized; what is null is inherited."""

    format: FormatName | None = Field(None, description="number format; null: `qat.format`")
    granularity: Granularity = Field(
        "per_tensor",
        description="what shares a scale: the tensor, an output channel (weight only), a token (input only), or 32 values "
        "of a row (`per_block`: a power of two by OCP MX; of FP8 alone, which is MXFP8 then)",
    )
    target_amax: PositiveFloat | None = Field(
        None,
        description="grid value that amax is mapped to, at most the format's largest; null: the format's default",
    )
    symmetric: bool = Field(
        True,
        exclude_if=bool,  # as `is_null` says
        description="whether zero has the middle code; false: the range from the least to the largest value takes all "
        "codes, which a zero-point shifts (int8 inputs only)",
    )
    scaling: RoleScaling | None = Field(
        None,
        description="keys that differ from `qat.scaling`; null: none do "
        "(but `dynamic` for per_channel, per_token and per_block, their only type)",
    )


class CalibrationConfig(Section):
    """How scales are found without training: from training text, for arms with `method: ptq` and for `init: ptq`."""

    input: Literal["absmax", "mse"] = Field(
        "absmax",
        description="scale of an input tensor: its largest value fits, or what loses least of it on the average "
        "(INT8: about half the loss; no difference in HiF8 and FP8)",
    )
    smooth: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="SmoothQuant: move outliers from the channels of inputs into weights, by this share (0.5 is usual), "
        "folded into norms and up-projections by powers of two, so that the model stays the same bit for bit; null: not",
    )
    sequences: Count = Field(64, description="packed training sequences")


if TYPE_CHECKING:
    RoleOverrides = RoleConfig
else:
    RoleOverrides = _nullable(RoleConfig, "RoleOverrides")


class ModuleConfig(Section):
    """Linears with schemes of their own. What an entry does not say is as `qat` has it, but for targets of another format
    and types of scaling that a granularity cannot have."""

    match: Annotated[
        Patterns, Field(min_length=1), BeforeValidator(_as_list, json_schema_input_type=str | tuple[str, ...])
    ] = Field(description="the linears: one pattern or a list of them, as in `targets`", examples=[["*.down_proj"]])
    format: FormatName | None = Field(
        default_factory=lambda: None,  # so that no schema shows a null that means another thing
        description="number format of every role that states none; null: left in BF16; default: `qat.format`",
    )
    scaling: RoleScaling = Field(RoleScaling(), description="keys that differ from `qat.scaling`")
    weight: RoleOverrides = Field(RoleOverrides(), description="keys that differ from `qat.weight`")
    input: RoleOverrides = Field(RoleOverrides(), description="keys that differ from `qat.input`")
    grad_output: RoleOverrides | None = Field(
        default_factory=lambda: None,
        description="keys that differ from `qat.grad_output`; null: not quantized; default: as `qat` has it",
    )

    @property
    def in_bf16(self) -> bool:
        """Whether its linears are left as they are."""
        return "format" in self.model_fields_set and self.format is None

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What it says alone: null is not what a key left out means."""
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


class SkipBlocks(Section):
    """Transformer blocks kept in BF16."""

    first: NonNegativeInt = Field(0, description="blocks at the input end")
    last: NonNegativeInt = Field(0, description="blocks at the output end")


class QatConfig(Section):
    """Quantization-aware training; null trains in BF16 throughout."""

    init: Literal["history", "ptq"] = Field(
        "history",
        exclude_if=lambda init: init == "history",  # as `is_null` says
        description="what the first QAT step has its scales from: `history`: the amaxes of the warmup, without one the "
        "tensors themselves; `ptq`: `calibration`, whose smoothing the weights then have, too",
    )
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
    clip: Clip = Field(
        "format", description="edge at which values saturate: the format's largest value, or `target_amax`"
    )
    ste: Ste = Field("clipped", description="straight-through gradient: of every value, or zero for the saturated ones")
    saved_activations: SavedActivations = Field(
        "values",
        description="what quantized linears keep for the backward: grid values, or their 8-bit codes: "
        "less memory, some time, the same results bit for bit",
    )
    calibration: CalibrationConfig | None = Field(
        None,
        exclude_if=is_null,
        description="how scales are found without training (`method: ptq`, `init: ptq`); null: with the defaults",
    )
    targets: Patterns | None = Field(
        None, description="linears to quantize: names, globs or `re:` regular expressions; null: all but lm_head"
    )
    ignore: Patterns = Field((), description="linears left in BF16, same patterns; wins over `targets`")
    skip_blocks: SkipBlocks = Field(SkipBlocks(), description="transformer blocks kept in BF16")
    modules: Annotated[tuple[ModuleConfig, ...], Field(strict=False)] = Field(
        (),
        exclude_if=lambda modules: not modules,  # as `is_null` says
        description="linears with schemes of their own: the first entry that matches one decides, before `targets` and "
        "after `ignore` and `skip_blocks`; each must match some",
    )

    @property
    def schemes(self) -> dict[Role, Scheme]:
        """Of each role that is quantized, with format, target and scaling inherited."""
        return {role: self._scheme(role, config) for role in ROLES if (config := getattr(self, role)) is not None}

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """Which linears are quantized; the first that names one decides."""
        return (
            Assignment("qat.ignore", None, self.ignore),
            Assignment("qat.skip_blocks", None, edge_blocks=(self.skip_blocks.first, self.skip_blocks.last)),
            *(
                Assignment(f"qat.modules[{index}].match", self.schemes_of(module), module.match)
                for index, module in enumerate(self.modules)
            ),
            Assignment("qat.targets", self.schemes, self.targets),
        )

    def schemes_of(self, module: ModuleConfig) -> dict[Role, Scheme] | None:
        """Those of the linears of one of `modules`; None where it leaves them in BF16."""
        if module.in_bf16:
            return None
        own = module.model_dump(exclude={"match"})
        for role in ROLES:
            if (said := own.get(role)) and said.get("granularity") in PER_ROW:
                said["scaling"] = {"type": "dynamic", **said.get("scaling", {})}
        laid = QatConfig.model_validate(deep_merge(self.model_dump(exclude={"modules"}), own)).schemes
        here = self.schemes
        return {
            role: replace(scheme, target_amax=_default_target(role, scheme.format, symmetric=scheme.symmetric))
            if role in here and here[role].format != scheme.format and "target_amax" not in own.get(role, {})
            else scheme
            for role, scheme in laid.items()
        }

    @property
    def all_schemes(self) -> tuple[dict[Role, Scheme], ...]:
        """Those of the section and of each of `modules` that is quantized."""
        return (self.schemes, *(own for module in self.modules if (own := self.schemes_of(module)) is not None))

    @property
    def formats(self) -> tuple[str, ...]:
        """The section's, and others that entries of `modules` name."""
        return tuple(dict.fromkeys((self.format, *(module.format for module in self.modules if module.format))))

    @property
    def saves_codes(self) -> bool:
        """Whether linears keep codes for the backward."""
        return self.saved_activations == "codes"

    @property
    def calibrating(self) -> CalibrationConfig:
        """How scales are found without training."""
        return self.calibration or CalibrationConfig()

    def _scheme(self, role: Role, config: RoleConfig) -> Scheme:
        format_name = config.format or self.format
        scaling = {} if config.scaling is None else config.scaling.model_dump()
        if config.granularity in PER_ROW:
            scaling = {"type": "dynamic", **scaling}
        return Scheme(
            format=format_name,
            granularity=config.granularity,
            target_amax=config.target_amax or _default_target(role, format_name, symmetric=config.symmetric),
            scaling=Scaling(**(self.scaling.model_dump() | scaling)),
            clip=self.clip,
            ste=self.ste,
            symmetric=config.symmetric,
        )


def _default_target(role: Role, format_name: str, *, symmetric: bool) -> float:
    return get_format(format_name).target_amax[role] if symmetric else ASYMMETRIC_STEPS

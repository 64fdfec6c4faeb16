"""How one tensor is quantized, as data: what a recipe asks for, a plan holds and a quantized folder keeps. Torch-free.

    scheme    a format, what shares a scale, how the scale is found, where values saturate
    slot      one quantized tensor of a model: a linear, and the tensor's role in it
    rule      amax history -> the amax that a delayed scale is made for; a function by name

To add a rule is to write the function and to name it in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from qatrun.formats import FORMATS, ROLES, Role

if TYPE_CHECKING:
    from torch import Tensor

ASYMMETRIC_STEPS = 255.0  # between the least and the largest of 256 codes
Clip = Literal["format", "target"]
Ste = Literal["identity", "clipped"]
Rounding = Literal["none", "power_of_two"]


@dataclass(frozen=True)
class Granularity:
    """What shares one scale: all of a tensor [..., d], each of its rows, or each block of a row.

    Attributes:
        rows: whether every row has scales of its own, which its values alone decide.
        roles: whose tensors it makes sense for.
        block: how many values of a row share a scale; None: all of them.
    """

    rows: bool
    roles: tuple[Role, ...]
    block: int | None = None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of this shape."""
        if self.block is not None:
            return (*shape[:-1], shape[-1] // self.block)
        return (*shape[:-1], 1) if self.rows else ()


GRANULARITIES: Mapping[str, Granularity] = MappingProxyType(
    {
        "per_tensor": Granularity(rows=False, roles=ROLES),
        "per_channel": Granularity(rows=True, roles=("weight",)),
        "per_token": Granularity(rows=True, roles=("input",)),
        "per_block": Granularity(rows=True, roles=("weight", "input"), block=32),
    }
)
# Formats that OCP MX 1.0 has blocks of -> exponent of their largest power of two, which the block's own is mapped to.
BLOCK_EXPONENTS: Mapping[str, int] = MappingProxyType({"fp8_e4m3": 8, "fp8_e5m2": 15})


@dataclass(frozen=True)
class Scaling:
    """How a scale is found from the amaxes seen.

    Attributes:
        type: `delayed`: from the amaxes of earlier steps; `dynamic`: from the tensor at hand; `static`: frozen at the
            switch; `none`: scale 1.
        algorithm: delayed: name of one of `RULES`.
        ema_decay: ema: weight of an amax over that of the next newer one.
        window, update_interval: delayed: how many units of history, and how many between two scales.
        unit: delayed: what pushes one entry onto the history.
        rounding: `power_of_two`: up to the next one, so that a product with the scale is exact in every float type.
    """

    type: Literal["delayed", "dynamic", "static", "none"] = "delayed"
    algorithm: str = "max"
    ema_decay: float = 0.9
    window: int = 64
    update_interval: int = 1
    unit: Literal["optimizer_step", "microbatch"] = "optimizer_step"
    rounding: Rounding = "none"

    @property
    def to_power_of_two(self) -> bool:
        """Whether scales are rounded up to powers of two."""
        return self.rounding == "power_of_two"


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized.

    Attributes:
        format: name of one of `formats.FORMATS`.
        granularity: name of one of `GRANULARITIES`.
        target_amax: grid value that amax is mapped to, 0 < target_amax <= the format's max_finite; where it is not
            symmetric `ASYMMETRIC_STEPS`, which the range is mapped to.
        clip: whether values saturate at the target or at the format's own largest value.
        ste: gradient of the rounding: all passes, or nothing passes where the value saturated.
        symmetric: whether zero has the middle code; else a zero-point says which, and the range of the values, from
            least to largest and with zero in it, takes all codes.
    """

    format: str
    granularity: str
    target_amax: float
    scaling: Scaling
    clip: Clip = "format"
    ste: Ste = "clipped"
    symmetric: bool = True

    @property
    def limit(self) -> float | None:
        """Magnitude on the grid that values are clipped to; None: the format's own range is the only edge."""
        return self.target_amax if self.clip == "target" else None

    @property
    def per_row(self) -> bool:
        """Whether every row of a tensor has scales of its own."""
        return GRANULARITIES[self.granularity].rows

    @property
    def block(self) -> int | None:
        """How many values of a row share a scale; None: all of them."""
        return GRANULARITIES[self.granularity].block

    def block_problem(self) -> str | None:
        """Why tensors cannot be scaled in blocks under this scheme; None where they can, or are not."""
        if self.block is None:
            return None
        if self.format not in BLOCK_EXPONENTS:
            return f"OCP MX has no blocks of {self.format} (one of {', '.join(BLOCK_EXPONENTS)})"
        if self.target_amax != FORMATS[self.format].max_finite:
            return "the scale of a block is a power of two by OCP MX: leave target_amax out"
        return None

    def asymmetry_problem(self, role: Role) -> str | None:
        """Why a tensor of that role cannot be asymmetric under this scheme; None where it can, or is not."""
        if self.symmetric:
            return None
        if role != "input":
            return f"a {role} is spread evenly about zero: only inputs have a zero-point"
        if self.format != "int8":
            return f"{self.format} is finest about zero, so a zero-point makes no sense: only int8 inputs have one"
        if self.scaling.type == "none":
            return "scaling 'none' finds no range to map (one of delayed, dynamic, static)"
        if self.target_amax != ASYMMETRIC_STEPS:
            return f"a range is mapped to all {ASYMMETRIC_STEPS:g} steps: leave target_amax out"
        return None


@dataclass(frozen=True)
class Assignment:
    """Which linears of a model have these schemes. Of several assignments the first that names a linear decides.

    Attributes:
        key: of the recipe, where it says so.
        schemes: role -> scheme; None: the linears stay in BF16.
        patterns: of names (see `qatrun.patterns`); None: all but the output head and what is tied to the embeddings.
        edge_blocks: instead of patterns, how many transformer blocks at the input end and at the output end.
    """

    key: str
    schemes: Mapping[Role, Scheme] | None
    patterns: tuple[str, ...] | None = None
    edge_blocks: tuple[int, int] | None = None


class Wanted(Protocol):
    """What a plan is made from; the `qat` section of a recipe is one.

    Attributes:
        saves_codes: whether linears keep 8-bit codes for the backward instead of grid values.
    """

    @property
    def assignments(self) -> tuple[Assignment, ...]: ...

    @property
    def saves_codes(self) -> bool: ...


class Slot(NamedTuple):
    """One quantized tensor of a model; in files `<linear>:<role>`."""

    linear: str
    role: Role

    def __str__(self) -> str:
        return f"{self.linear}:{self.role}"

    @classmethod
    def parse(cls, text: str) -> Slot:
        """The slot that `str` gave this name.

        Raises:
            ValueError: it is no such name.
        """
        linear, _, given = text.rpartition(":")
        for role in ROLES:
            if role == given and linear:
                return cls(linear, role)
        raise ValueError(f"'{text}' names no slot: <linear>:<role>, a role being one of {', '.join(ROLES)}")


def _largest(history: Tensor, scaling: Scaling) -> Tensor:
    return history[: scaling.window].amax(dim=0)


def _newest(history: Tensor, _: Scaling) -> Tensor:
    return history[0]


def _moving_average(history: Tensor, scaling: Scaling) -> Tensor:
    """With weights that fall by `ema_decay` a row, over the rows in which anything was seen."""
    rows = history[: scaling.window]
    ages = rows.new_ones(len(rows), 1).cumsum(0) - 1
    weights = (rows > 0) * scaling.ema_decay**ages
    average: Tensor = (rows * weights).sum(dim=0) / weights.sum(dim=0)  # 0 / 0 keeps the scale, as NaN does
    return average


# Name -> history [length, num_slots] float32, newest row first, 0 where nothing was seen -> amax estimate [num_slots].
RULES: Mapping[str, Callable[[Tensor, Scaling], Tensor]] = MappingProxyType(
    {"max": _largest, "most_recent": _newest, "ema": _moving_average}
)

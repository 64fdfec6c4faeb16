"""The 8-bit number formats: names, ranges and the value that amax is mapped to. Torch-free.

| name     | what                                      | source                              |
|----------|-------------------------------------------|-------------------------------------|
| hif8     | HiFloat8: tapered precision, 38 binades   | arXiv:2409.16626 (Ascend HiFloat8)  |
| fp8_e4m3 | OCP FP8 E4M3 (fn): no Inf, one NaN a sign | OCP 8-bit Floating Point spec v1.0  |
| fp8_e5m2 | OCP FP8 E5M2: IEEE-like, with Inf         | OCP 8-bit Floating Point spec v1.0  |
| int8     | integers, -127..127; 256 by a zero-point  | arXiv:1712.05877                    |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qatrun.errors import InputError, Problem
from qatrun.text import suggestion

Role = Literal["weight", "input", "grad_output"]
ROLES: tuple[Role, ...] = ("weight", "input", "grad_output")


@dataclass(frozen=True)
class Format:
    """One number format. Magnitudes are of the grid itself, that is, at scale 1.

    Attributes:
        target_amax: role -> the grid value that a tensor's amax is mapped to by default. HiF8 is most precise for
            magnitudes in [1/8, 16), so mapping amax to its largest value would waste it; the others use their whole range.
    """

    name: str
    max_finite: float
    min_normal: float
    min_subnormal: float
    target_amax: Mapping[Role, float]


def _same_target(value: float) -> Mapping[Role, float]:
    return MappingProxyType(dict.fromkeys(ROLES, value))


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            Format(
                name="hif8",
                max_finite=2.0**15,
                min_normal=2.0**-15,
                min_subnormal=2.0**-22,
                target_amax=MappingProxyType({"weight": 15.0, "input": 15.0, "grad_output": 224.0}),
            ),
            Format("fp8_e4m3", 448.0, 2.0**-6, 2.0**-9, _same_target(448.0)),
            Format("fp8_e5m2", 57344.0, 2.0**-14, 2.0**-16, _same_target(57344.0)),
            Format("int8", 127.0, 1.0, 1.0, _same_target(127.0)),
        )
    }
)


NOT_HERE = {
    **dict.fromkeys(
        ("int4", "uint4", "nf4", "fp4", "nvfp4", "mxfp4", "w4a16", "gptq", "awq"), "all formats have 8 bits"
    ),
    **dict.fromkeys(("fp8", "float8"), "there are two of that width"),
    **dict.fromkeys(("mxfp8", "mx"), "write fp8_e4m3 with granularity: per_block for weight and input"),
    **dict.fromkeys(("bf16", "fp16", "none"), "an arm without quantizers is written `qat: null`"),
    **dict.fromkeys(("gguf", "q8_0", "q4_0", "q4_k_m"), "llama.cpp's formats are not trained for"),
}


def nearest(name: str) -> str:
    """What to say of a format that is none: why it is not here, or the nearest that is."""
    if why := NOT_HERE.get(name.lower()):
        return f": {why} (one of {', '.join(FORMATS)})"
    return suggestion(name, FORMATS)


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        InputError: no such format; the message names the nearest one.
    """
    if name not in FORMATS:
        raise InputError(Problem(f"unknown format '{name}'{nearest(name)}"))
    return FORMATS[name]

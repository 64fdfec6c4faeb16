"""What chips compute in 8 bits today, as data with sources, and what a scheme would run as on one of them.

A chip multiplies 8-bit numbers where it has a unit for them and an engine has a kernel that takes their scales. What is not
in the table is not known, and said to be so: nothing here is guessed, and nothing was run on these chips but on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from qatrun.scheme import Scheme

Runs = Literal["natively", "as weight-only", "not at all", "not known"]


@dataclass(frozen=True)
class Kernel:
    """A product of 8-bit numbers that an engine makes on a chip: weights and inputs both in this format.

    Attributes:
        weights, inputs: granularities of the scales that it takes.
        asymmetric: whether it takes inputs with a zero-point.
        note: what it does otherwise than what was trained; empty: nothing that is known.
    """

    format: str
    engine: str
    source: str
    weights: tuple[str, ...] = ("per_tensor", "per_channel")
    inputs: tuple[str, ...] = ("per_tensor", "per_token")
    asymmetric: bool = False
    note: str = ""

    def takes(self, weight: Scheme, of_input: Scheme) -> bool:
        """Whether it multiplies what has these schemes."""
        formats = weight.format == of_input.format == self.format
        scales = weight.granularity in self.weights and of_input.granularity in self.inputs
        return formats and scales and (of_input.symmetric or self.asymmetric)

    def __str__(self) -> str:
        return f"{self.format}, weights {' or '.join(self.weights)}, inputs {' or '.join(self.inputs)}"


@dataclass(frozen=True)
class Instead:
    """What becomes of a format that a chip has no product for."""

    runs: Runs
    why: str
    source: str


@dataclass(frozen=True)
class Chip:
    """Attributes:
    about: what it is.
    kernels: the fastest first.
    instead: format -> what becomes of it; a format that is neither here nor in a kernel is not known.
    """

    about: str
    kernels: tuple[Kernel, ...]
    instead: Mapping[str, Instead]


@dataclass(frozen=True)
class Answer:
    """What a scheme would run as."""

    runs: Runs
    why: str
    source: str

    @property
    def is_native(self) -> bool:
        return self.runs == "natively"


def answer(name: str, weight: Scheme, of_input: Scheme) -> Answer:
    """What linears of these schemes run as on the chip of that name, why, and where that stands."""
    chip = CHIPS[name]
    kernel = next((kernel for kernel in chip.kernels if kernel.takes(weight, of_input)), None)
    if kernel is not None:
        return Answer("natively", f"{kernel.engine}{f'; {kernel.note}' if kernel.note else ''}", kernel.source)
    nearest = next((k for k in chip.kernels if k.format == weight.format), next(iter(chip.kernels), None))
    hint = f"; the nearest that it runs natively: {nearest}" if nearest is not None else ""
    if weight.format != of_input.format:
        return Answer("not known", f"no kernel is known that multiplies {weight.format} by {of_input.format}{hint}", "")
    if nearest is not None and nearest.format == weight.format:
        zero = "" if of_input.symmetric else ", asymmetric"
        scales = f"weights {weight.granularity} and inputs {of_input.granularity}{zero}"
        return Answer("not known", f"no kernel is known that takes {scales}{hint}", nearest.source)
    instead = chip.instead.get(weight.format)
    if instead is None:
        return Answer("not known", f"nothing is known of {weight.format} here{hint}", "")
    return Answer(instead.runs, f"{instead.why}{hint}", instead.source)


def lines(name: str, pairs: Mapping[str, tuple[Scheme, Scheme]]) -> Iterator[tuple[Answer, str]]:
    """The answer for each pair of schemes (of weight and input) and a line that says it; the key says whose they are."""
    for whose, (weight, of_input) in pairs.items():
        found = answer(name, weight, of_input)
        how = f"{weight.format} weights {weight.granularity}, {of_input.format} inputs {of_input.granularity}"
        source = f" [{found.source}]" if found.source else ""
        verb = "it is not known whether they run" if found.runs == "not known" else f"run {found.runs}"
        yield found, f"on {name}, {whose}{how}: {verb} ({found.why}){source}"


_VLLM_FP8 = "https://docs.vllm.ai/en/v0.32.0/features/quantization/llm_compressor/fp8/"
_VLLM_INT8 = "https://docs.vllm.ai/en/latest/features/quantization/int8/"
_VLLM_TABLE = "https://docs.vllm.ai/en/v0.14.0/features/quantization/"
_ONEDNN = "https://oneapi-src.github.io/oneDNN/dev_guide_int8_computations.html"
_ROCM_FP8 = "https://rocm.docs.amd.com/projects/HIP/en/docs-6.2.0/reference/fp8_numbers.html"
_CANN = "CANN's quantized matmul"
_ASCEND = (
    "https://www.hiascend.com/document/detail/zh/CANNCommunityEdition/latest/API/aolapi/context/ops-nn/"
    "aclnnQuantMatmulV5.md"
)

_FP8 = Kernel("fp8_e4m3", "vLLM's FP8 W8A8", _VLLM_FP8)
_INT8 = Kernel("int8", "vLLM's INT8 W8A8", _VLLM_INT8, asymmetric=True)
_MARLIN = Instead(
    "as weight-only",
    "FP8 units begin with compute capability 8.9: vLLM widens the weights and leaves inputs in 16 bits, so what was trained "
    "for inputs is not what runs",
    _VLLM_FP8,
)
_NO_INT8 = Instead("not at all", "vLLM has no INT8 product from compute capability 10.0 on", _VLLM_INT8)
_NO_E5M2 = Instead("not at all", "vLLM reads E4M3 alone", _VLLM_FP8)
_NO_HIF8 = Instead("not at all", "HiFloat8 is computed by Ascend 950 alone", _ASCEND)
_NOT_HERE = MappingProxyType({"fp8_e5m2": _NO_E5M2, "hif8": _NO_HIF8})
_NO_FP8_ON_CPU = Instead("not at all", "vLLM has no FP8 product for x86 CPUs", _VLLM_TABLE)


def _nvidia(about: str, capability: str) -> Chip:
    """A GPU by its compute capability."""
    major, minor = (int(part) for part in capability.split("."))
    has_fp8, has_int8 = (major, minor) >= (8, 9), major < 10
    kernels = (*([_FP8] if has_fp8 else []), *([_INT8] if has_int8 else []))
    lacks = ({} if has_fp8 else {"fp8_e4m3": _MARLIN}) | ({} if has_int8 else {"int8": _NO_INT8})
    return Chip(f"NVIDIA {about}, compute capability {capability}", kernels, MappingProxyType({**_NOT_HERE, **lacks}))


def _cpu(about: str, note: str) -> Chip:
    engine = "ONNX Runtime's MatMulInteger, vLLM's INT8 on x86"
    kernel = Kernel("int8", engine, _ONEDNN, asymmetric=True, note=note)
    return Chip(about, (kernel,), MappingProxyType({**_NOT_HERE, "fp8_e4m3": _NO_FP8_ON_CPU}))


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "t4": _nvidia("T4", "7.5"),
        "a100": _nvidia("A100", "8.0"),
        "a10": _nvidia("A10", "8.6"),
        "l4": _nvidia("L4", "8.9"),
        "l40s": _nvidia("L40S", "8.9"),
        "rtx-4090": _nvidia("RTX 4090", "8.9"),
        "h100": _nvidia("H100", "9.0"),
        "h200": _nvidia("H200", "9.0"),
        "b200": _nvidia("B200", "10.0"),
        "rtx-5090": _nvidia("RTX 5090", "12.0"),
        "mi300x": Chip(
            "AMD Instinct MI300X, gfx942",
            (
                Kernel(
                    "fp8_e4m3",
                    "vLLM's FP8 W8A8",
                    _ROCM_FP8,
                    note="in the FNUZ variant, whose codes stand for half as much: the engine converts, not bit for bit",
                ),
            ),
            MappingProxyType(
                {
                    **_NOT_HERE,
                    "int8": Instead("not at all", "vLLM has no INT8 product for AMD GPUs", _VLLM_TABLE),
                }
            ),
        ),
        "ascend-950": Chip(
            "Huawei Ascend 950PR and 950DT",
            (
                *(Kernel(name, _CANN, _ASCEND) for name in ("hif8", "fp8_e4m3", "fp8_e5m2", "int8")),
                Kernel("fp8_e4m3", f"{_CANN}, MX blocks of 32", _ASCEND, ("per_block",), ("per_block",)),
            ),
            MappingProxyType({}),
        ),
        "ascend-910b": Chip(
            "Huawei Ascend 910B and 910C, Atlas A2 and A3",
            (Kernel("int8", _CANN, _ASCEND),),
            MappingProxyType(
                {
                    name: Instead(
                        "not at all", "CANN's quantized matmul takes 8-bit floats from Ascend 950 on", _ASCEND
                    )
                    for name in ("hif8", "fp8_e4m3", "fp8_e5m2")
                }
            ),
        ),
        "cpu-amx": _cpu("x86 CPU with AMX (Xeon from Sapphire Rapids on)", ""),
        "cpu-vnni": _cpu("x86 CPU with VNNI (AVX512-VNNI or AVX-VNNI)", ""),
        "cpu-avx2": _cpu(
            "x86 CPU without VNNI",
            "products of oneDNN, vLLM's too, saturate in 16 bits and are wrong there; those of ONNX Runtime are exact, and "
            "slower than float32",
        ),
    }
)
HARDWARE_NAMES = tuple(CHIPS)

"""ONNX: one graph that runs INT8 as integers, in ONNX Runtime or OpenVINO. INT8 weights and inputs, the rest in float32.

    model.onnx       input_ids [batch, sequence] int64 -> logits [batch, sequence, vocabulary] float32
    model.onnx.data  the weights, where they are too many for one file

Each quantized linear N is spelled out, so that its codes are those that were scored, whichever engine runs it:

    q = Cast<int8>(Clip(Round(x * N.input_inv_scale), -127, 127))
    y = Cast<float>(MatMulInteger(q, N.codes)) * (N.input_scale * N.weight_scale) + N.bias

with scales of tokens from Abs, ReduceMax and Div. QuantizeLinear would divide by s and clip at -128. Under a zero-point z it
is q = Cast<int8>(Clip(Round(x * N.input_inv_scale) + z, -128, 127)), and MatMulInteger takes z off. N.codes are [in, out].
Attention is the plain one, since that is made of operators that every engine has.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from qatrun.errors import InputError, RunError
from qatrun.export.folder import Stored, write_description
from qatrun.export.linears import expert_problems
from qatrun.files import reading
from qatrun.model.config import sentence
from qatrun.quant import QuantizedLinear, QuantPlan, quantized_linears

NAME = "onnx"
ENGINES: tuple[str, ...] = ("onnxruntime",)
FILE = "model.onnx"
MOST_IN_ONE_FILE = 2**31 - 2**24  # bytes; what a protocol buffer holds, less the graph
CODES, WEIGHT_SCALE, INPUT_SCALE, ZERO_POINT = "codes", "weight_scale", "input_scale", "input_zero_point"
_SCALES = 2.0**-126, 2.0**126  # as of `numerics.scale_from_amax`
_FLOAT, _INT8 = 1, 3  # types of ONNX


def problems(plan: QuantPlan, model: nn.Module) -> Iterator[str]:
    """What of a plan cannot be written, and what to do instead."""
    yield from expert_problems(NAME, plan, model)
    schemes = {scheme for name in plan.linears for role, scheme in plan.schemes[name].items() if role != "grad_output"}
    for format_name in sorted({scheme.format for scheme in schemes} - {"int8"}):
        nearest = "hif8" if format_name == "hif8" else "compressed-tensors"
        yield f"{NAME} is INT8 here, which runs as integers, and this is {format_name} (--to {nearest}, or train int8)"
    if any(scheme.per_row and not scheme.symmetric for scheme in schemes):
        yield "asymmetric token scales are not written (qat.input.symmetric: true, or per_tensor)"
    if any(plan.schemes[name]["input"].per_row and _input(plan, name).scaling.to_power_of_two for name in plan.linears):
        yield "no operator rounds a token scale to a power of two (qat.input.scaling.rounding: none)"


def notes(plan: QuantPlan) -> Iterator[str]:
    """What engines do otherwise than what was scored, or may not do."""
    yield (
        "all but the quantized products runs in float32; ONNX Runtime took 2.3 times float32's time for it on a small model "
        "(one core, AVX-512 VNNI)"
    )


def save(model: Any, tokenizer: Any, plan: QuantPlan, folder: Path) -> None:
    """Fill the folder from a frozen model (see `qatrun.quant.freeze`).

    Raises:
        InputError: the libraries that write ONNX are not installed.
        RunError: torch cannot make a graph of the model.
    """
    try:
        import onnxscript  # noqa: F401 -- what torch's exporter is made of
    except ImportError:
        raise InputError(f"--to {NAME} needs onnx and onnxscript (pip install 'qatrun[export]')") from None
    graph = _graph(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                graph,
                kwargs={"input_ids": torch.zeros(2, 3, dtype=torch.long)},
                dynamo=True,
                optimize=False,  # it would fold scales into each other
                verbose=False,
                custom_translation_table={torch.ops.qatrun_onnx.linear.default: _translated},
                dynamic_shapes={"input_ids": {0: "batch", 1: "sequence"}},
                input_names=["input_ids"],
                output_names=["logits"],
            )
        _forget_sources(program.model)
        program.save(folder / FILE, external_data=size > MOST_IN_ONE_FILE)
    except OSError:
        raise
    except Exception as error:  # the code of any model
        raise RunError(f"torch makes no ONNX graph of this model: {sentence(error)}") from error
    write_description(model, tokenizer, folder, {"dtype": "float32"})


def read(folder: Path) -> dict[str, Stored]:
    """The quantized linears of a folder."""
    import onnx

    with reading(folder / FILE):
        graph = onnx.load(folder / FILE).graph
        tensors = {part.name: part for part in graph.initializer if part.name.endswith((CODES, "_scale", ZERO_POINT))}
    found: dict[str, Stored] = {}
    for key in tensors:
        owner, _, leaf = key.rpartition(".")
        if leaf == CODES:
            parts: dict[str, Tensor] = {
                other: torch.from_numpy(onnx.numpy_helper.to_array(tensors[f"{owner}.{other}"]).copy())
                for other in (CODES, WEIGHT_SCALE, INPUT_SCALE, ZERO_POINT)
                if f"{owner}.{other}" in tensors
            }
            codes = parts[CODES].t().contiguous()
            weight_scale = parts[WEIGHT_SCALE].expand(len(codes))
            found[owner] = Stored(codes, weight_scale, parts.get(INPUT_SCALE), parts.get(ZERO_POINT))
    return found


def decoded_by(linears: Mapping[str, Stored]) -> str | None:
    """Nobody need say what an integer means."""
    return None


def ends_of_linears(graph: Any, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Linear -> names of its input and its output in a graph that `save` wrote."""
    makers = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    tensors = {tensor.name for tensor in graph.initializer}
    ends: dict[str, tuple[str, str]] = {}
    for name in names:
        product = readers[f"{name}.{CODES}"]
        start, end = product.input[0], product.output[0]
        before = ("Cast", "Clip", "Round", "Mul", "Add")[: 5 if f"{name}.{ZERO_POINT}" in tensors else 4]
        for _ in before:
            start = makers[start].input[0]
        for _ in ("Cast", "Mul", "Add")[: 3 if f"{name}.bias" in tensors else 2]:
            end = readers[end].output[0]
        ends[name] = start, end
    return ends


@custom_op("qatrun_onnx::linear", mutates_args=())
def _linear(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None,
    input_inv_scale: Tensor | None,
    input_zero_point: Tensor | None,
    bias: Tensor | None,
    target: float,
    edge: float,
) -> Tensor:
    """Stands for a quantized linear in the graph that torch makes; never run.

    Args:
        target, edge: grid values that a token's amax is mapped to, and that symmetric inputs are clipped at.
    """
    raise NotImplementedError


@_linear.register_fake
def _(x: Tensor, codes: Tensor, *_args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[1])


def _translated(
    x: Any,
    codes: Any,
    weight_scale: Any,
    input_scale: Any,
    input_inv_scale: Any,
    zero: Any,
    bias: Any,
    target: float,
    edge: float,
) -> Any:
    """The linear in operators of ONNX."""
    from onnxscript import opset18 as op

    scale, inv_scale = input_scale, input_inv_scale
    if scale is None:
        amax = op.ReduceMax(op.Abs(x), op.Constant(value_ints=[-1]), keepdims=1)
        fitting = op.Clip(op.Div(amax, target), *_SCALES)
        scale = op.Where(op.Greater(amax, 0.0), fitting, 1.0)
        # Clipping changes nothing, but keeps ONNX Runtime from making x * (1 / s) an x / s, which rounds otherwise.
        inv_scale = op.Clip(op.Div(1.0, scale), *_SCALES)
    rounded = op.Round(op.Mul(x, inv_scale))
    if zero is None:
        total = op.MatMulInteger(op.Cast(op.Clip(rounded, -edge, edge), to=_INT8), codes)
    else:
        shifted = op.Clip(op.Add(rounded, op.Cast(zero, to=_FLOAT)), -128.0, 127.0)
        total = op.MatMulInteger(op.Cast(shifted, to=_INT8), codes, zero)
    product = op.Cast(total, to=_FLOAT)
    y = op.Mul(product, op.Mul(scale, weight_scale))
    return y if bias is None else op.Add(y, bias)


class _Spelled(nn.Module):
    """A quantized linear as the graph has it; buffers are its tensors there."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        stored, scheme = Stored.of(linear), linear.input_scheme
        self.target, self.edge = scheme.target_amax, linear.input_grid.edge(scheme.limit)
        self.register_buffer(CODES, stored.codes.t().contiguous())
        self.register_buffer(WEIGHT_SCALE, linear.weight_scale.flatten().clone())
        self.register_buffer(INPUT_SCALE, None if scheme.per_row else linear.input_scale.clone())
        self.register_buffer("input_inv_scale", None if scheme.per_row else linear.input_inv_scale.clone())
        self.register_buffer(ZERO_POINT, None if linear.input_zero_point is None else linear.input_zero_point.clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        of_input = self.input_scale, self.input_inv_scale, self.input_zero_point
        y: Tensor = torch.ops.qatrun_onnx.linear(
            x, self.codes, self.weight_scale, *of_input, self.bias, self.target, self.edge
        )
        return y


def _graph(model: Any) -> Any:
    """A copy of a frozen model in float32, its quantized linears spelled out."""
    spelled = copy.deepcopy(model).float().eval()
    for name, linear in quantized_linears(spelled).items():
        parent, _, child = name.rpartition(".")
        setattr(spelled.get_submodule(parent), child, _Spelled(linear))
    spelled.set_attn_implementation("eager")
    return spelled


def _input(plan: QuantPlan, name: str) -> Any:
    return plan.schemes[name]["input"]


def _forget_sources(model: Any) -> None:
    """torch notes at every node where in which file on this machine it came from."""
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter warns of its own workings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""The fake-quantized linear against a float64 transcription of its formulas.

The exact cases use tensors whose scales are powers of two and whose values are small multiples of 1/8, so that every
product and sum is exact in float32 and results must be equal, not close.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qatrun import QatConfig
from qatrun.numerics import round_to_format
from qatrun.quant import FakeQuantLinear, Mode, QuantState, attach, make_plan
from qatrun.recipe import RoleConfig, ScalingConfig
from qatrun.scheme import Slot

FORMATS = ("hif8", "fp8_e4m3", "fp8_e5m2", "int8")
# A target below the format's largest value, so that the two clip rules differ, and an amax that it divides to 2^k.
TARGET = {"hif8": 15.0, "fp8_e4m3": 224.0, "fp8_e5m2": 28672.0, "int8": 64.0}
AMAX = {"hif8": 15.0, "fp8_e4m3": 7.0, "fp8_e5m2": 7.0, "int8": 64.0}
# (format, clip) -> the edge, halfway to what would be the next value, and whether the halfway point rounds past the edge.
EDGES = {
    ("hif8", "target"): (15.0, 15.5, True),
    ("hif8", "format"): (32768.0, 40960.0, True),
    ("fp8_e4m3", "target"): (224.0, 232.0, False),
    ("fp8_e4m3", "format"): (448.0, 464.0, False),
    ("fp8_e5m2", "target"): (28672.0, 30720.0, True),
    ("fp8_e5m2", "format"): (57344.0, 61440.0, True),
    ("int8", "target"): (64.0, 64.5, False),
    ("int8", "format"): (127.0, 127.5, True),
}


@dataclass(frozen=True)
class Case:
    format: str
    weight: str = "per_tensor"
    input: str = "per_tensor"
    clip: str = "format"
    ste: str = "clipped"
    quantized_gradient: bool = False

    def qat(self) -> QatConfig:
        def role(granularity: str = "per_tensor") -> RoleConfig:
            return RoleConfig(granularity=granularity, target_amax=TARGET[self.format])

        return QatConfig(
            format=self.format,
            clip=self.clip,
            ste=self.ste,
            weight=role(self.weight),
            input=role(self.input),
            grad_output=role() if self.quantized_gradient else None,
        )


CASES = [
    Case(*settings)
    for settings in product(
        FORMATS,
        ("per_tensor", "per_channel"),
        ("per_tensor", "per_token"),
        ("format", "target"),
        ("clipped", "identity"),
        (False, True),
    )
]


@dataclass(frozen=True)
class Result:
    """What a linear computes: the output and the gradients."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor | None


@dataclass(frozen=True)
class Rounded:
    """Grid values, scale and saturation mask in float64; scale [] or [rows, 1]."""

    q: Tensor
    scale: Tensor
    saturated: Tensor


def rounded(values: Tensor, case: Case, granularity: str, scale: float | None) -> Rounded:
    """values [rows, d] on their grid; their own scale where none is given or it is not per tensor."""
    own = values.abs().amax() if granularity == "per_tensor" else values.abs().amax(-1, keepdim=True)
    given = scale is not None and granularity == "per_tensor"
    step = torch.tensor(scale) if given else own / TARGET[case.format]
    edge, halfway, tie_saturates = EDGES[case.format, case.clip]
    units = values.double() / step.double()
    q = round_to_format(units.float(), case.format, limit=edge).double()
    saturated = units.abs() >= halfway if tie_saturates else units.abs() > halfway
    return Rounded(q, step.double(), saturated)


def reference(x: Tensor, w: Tensor, b: Tensor | None, g: Tensor, case: Case, scales: dict[str, float]) -> Result:
    """The module's formulas in float64. x [..., in], w [out, in], b [out], g [..., out]."""
    rows = x.flatten(0, -2)
    of_x = rounded(rows, case, case.input, scales.get("input"))
    of_w = rounded(w, case, case.weight, scales.get("weight"))
    y = (of_x.q * of_x.scale) @ (of_w.q * of_w.scale).T + (0.0 if b is None else b.double())
    upstream = g.flatten(0, -2).double()
    if case.quantized_gradient:
        of_g = rounded(g.flatten(0, -2), case, "per_tensor", scales.get("grad_output"))
        upstream = of_g.q * of_g.scale
    dx = upstream @ (of_w.q * of_w.scale)
    dw = upstream.T @ (of_x.q * of_x.scale)
    if case.ste == "clipped":
        dx, dw = dx * ~of_x.saturated, dw * ~of_w.saturated
    db = None if b is None else g.flatten(0, -2).double().sum(0)
    return Result(y.view(*x.shape[:-1], -1), dx.view(x.shape), dw, db)


def attached(linear: nn.Module, case: Case, scales: dict[str, float]) -> tuple[FakeQuantLinear, QuantState]:
    """The linear behind quantizers, in training, with per-tensor scales taken from a history of one step."""
    model = nn.Sequential(linear).train()
    state = attach(model, make_plan(model, case.qat()))
    for role, scale in scales.items():
        state.scales.observe(state.scales.index[Slot("0", role)], torch.tensor(scale * TARGET[case.format]))
    if scales:
        state.push()
    state.enter(Mode.QUANTIZE)
    module = model[0]
    assert isinstance(module, FakeQuantLinear)
    return module, state


def computed(module: nn.Module, x: Tensor, g: Tensor) -> Result:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(g)
    assert leaf.grad is not None
    assert module.weight.grad is not None
    return Result(y.detach(), leaf.grad, module.weight.grad, None if module.bias is None else module.bias.grad)


def eighths(shape: tuple[int, ...], amax: float, seed: int, rows_differ: bool = True) -> Tensor:
    """Multiples of 1/8 whose rows all reach +-amax times a power of two."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-int(8 * amax), int(8 * amax) + 1, shape, generator=generator) / 8
    values[..., 0] = amax
    powers = 2.0 ** (torch.arange(values.flatten(0, -2).shape[0]) % 3)
    return values * powers.view(*shape[:-1], 1) if rows_differ else values


def scales_of(tensors: dict[str, Tensor], case: Case) -> dict[str, float]:
    """Per role a power of two, so much too small for its tensor that some values saturate."""
    underestimate = 2.0**12 if (case.format, case.clip) == ("hif8", "format") else 4.0
    return {role: float(tensor.abs().max()) / TARGET[case.format] / underestimate for role, tensor in tensors.items()}


def exact_tensors(case: Case, shape: tuple[int, ...] = (6, 8)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [..., 8], W [5, 8], b [5], g [..., 5]."""
    amax = AMAX[case.format]
    x, w = eighths(shape, amax, seed=1), eighths((5, 8), amax, seed=2)
    g = eighths((*shape[:-1], 5), amax, seed=3, rows_differ=False)
    return x, w, torch.arange(5.0) - 2, g


def linear_of(w: Tensor, b: Tensor | None) -> nn.Linear:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=b is not None)
    linear.weight.data = w.clone()
    if b is not None:
        linear.bias.data = b.clone()
    return linear


def assert_equal(result: Result, expected: Result) -> None:
    for name, value in vars(expected).items():
        got = getattr(result, name)
        if value is None:
            assert got is None
        else:
            assert torch.equal(got.double(), value), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_the_formulas_exactly(case: Case) -> None:
    x, w, b, g = exact_tensors(case)
    roles = {"input": x, "weight": w} | ({"grad_output": g} if case.quantized_gradient else {})
    scales = scales_of(roles, case)
    module, _ = attached(linear_of(w, b), case, scales)
    assert_equal(computed(module, x, g), reference(x, w, b, g, case, scales))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("clip", ["format", "target"])
def test_the_clipped_estimator_holds_back_some_gradients_and_the_identity_none(format_name: str, clip: str) -> None:
    clipped = Case(format_name, clip=clip)
    x, w, b, g = exact_tensors(clipped)
    scales = scales_of({"input": x, "weight": w}, clipped)
    kept = ~rounded(x, clipped, "per_tensor", scales["input"]).saturated
    assert 0 < kept.sum() < kept.numel()
    of_clipped = computed(attached(linear_of(w, b), clipped, scales)[0], x, g)
    of_identity = computed(attached(linear_of(w, b), replace(clipped, ste="identity"), scales)[0], x, g)
    assert torch.equal(of_clipped.y, of_identity.y)
    assert torch.equal(of_clipped.dx, torch.where(kept, of_identity.dx, 0.0))


@pytest.mark.parametrize("format_name", FORMATS)
def test_three_dimensional_inputs_are_their_rows(format_name: str) -> None:
    case = Case(format_name, "per_channel", "per_token", quantized_gradient=True)
    x, w, b, g = exact_tensors(case, (2, 3, 8))
    module, _ = attached(linear_of(w, b), case, {})
    result = computed(module, x, g)
    assert result.y.shape == (2, 3, 5)
    assert_equal(result, reference(x, w, b, g, case, {}))


def test_a_single_vector_is_an_input_too() -> None:
    case = Case("hif8", "per_channel", "per_token")
    x, w, b, g = exact_tensors(case, (1, 8))
    result = computed(attached(linear_of(w, b), case, {})[0], x[0], g[0])
    expected = reference(x, w, b, g, case, {})
    assert_equal(result, replace(expected, y=expected.y[0], dx=expected.dx[0]))


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_linear_without_bias(format_name: str) -> None:
    case = Case(format_name)
    x, w, _, g = exact_tensors(case)
    module, _ = attached(linear_of(w, None), case, {})
    assert_equal(computed(module, x, g), reference(x, w, None, g, case, {}))


@pytest.mark.parametrize("case", [case for case in CASES if case.format == "hif8" and case.clip == "format"], ids=str)
def test_conv1d_is_the_linear_of_its_transposed_weight(case: Case) -> None:
    x, w, b, g = exact_tensors(case)
    conv = Conv1D(5, 8)
    conv.weight.data, conv.bias.data = w.t().contiguous(), b.clone()
    result = computed(attached(conv, case, {})[0], x, g)
    assert_equal(replace(result, dw=result.dw.t()), reference(x, w, b, g, case, {}))


@pytest.mark.parametrize("case", [case for case in CASES if case.clip == "format" and case.ste == "clipped"], ids=str)
def test_float32_is_within_its_accumulation_error(case: Case) -> None:
    """No rounding but that of float32 sums: a scale that is no power of two, 64 terms a sum."""
    x, w, b, g = gaussian_tensors()
    result = computed(attached(linear_of(w, b), case, {})[0], x, g)
    assert_within(result, reference(x, w, b, g, case, {}), x, w, g, unit_roundoff=64 * 2.0**-24)


@pytest.mark.parametrize("case", [case for case in CASES if case.clip == "format" and case.ste == "clipped"], ids=str)
def test_bfloat16_autocast_rounds_twice_forward_and_backward(case: Case) -> None:
    """The product is rounded to bfloat16 (unit roundoff 2^-8) and the result again; where the scale varies along the
    summed dimension, the scaled gradient is rounded too, so each term may be off by as much."""
    x, w, b, g = gaussian_tensors()
    module, _ = attached(linear_of(w, b), case, {})
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(leaf)
    assert y.dtype == torch.bfloat16
    y.backward(g.bfloat16())
    assert leaf.grad is not None
    assert leaf.grad.dtype == module.weight.grad.dtype == module.bias.grad.dtype == torch.float32
    result = Result(y.detach(), leaf.grad, module.weight.grad, module.bias.grad)
    assert_within(result, reference(x, w, b, g, case, {}), x, w, g, unit_roundoff=2.0**-8)


def gaussian_tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [2, 8, 64], W [24, 64], b [24], g [2, 8, 24]; g is exact in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    x, w, b, g = (torch.randn(shape, generator=generator) for shape in ((2, 8, 64), (24, 64), (24,), (2, 8, 24)))
    return x, 0.05 * w, b, (0.01 * g).bfloat16().float()


def assert_within(result: Result, expected: Result, x: Tensor, w: Tensor, g: Tensor, unit_roundoff: float) -> None:
    """Each sum may be off by the unit roundoff of its terms' magnitudes, and twice that of its own.

    Quantized magnitudes are at most 1.25 of the tensors' own: half a step of a grid with one mantissa bit.
    """
    of_x, of_w, of_g = (tensor.abs().double() * 1.25 for tensor in (x.flatten(0, -2), w, g.flatten(0, -2)))
    terms = Result((of_x @ of_w.T).view_as(expected.y), (of_g @ of_w).view_as(x), of_g.T @ of_x, of_g.sum(0))
    for name, value in vars(expected).items():
        bound = unit_roundoff * (getattr(terms, name) + 2 * value.abs()) * 1.01
        assert ((getattr(result, name).double() - value).abs() <= bound).all(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_stays_visible_and_an_infinite_input_saturates(bad: float) -> None:
    case = Case("fp8_e4m3")
    x, w, b, g = exact_tensors(case)
    scales = {"input": 2.0**-5, "weight": 2.0**-5}
    module, _ = attached(linear_of(w, b), case, scales)
    x[1, 2] = bad
    y = module(x)
    assert y[1].isnan().all() if bad != bad else y[1].isfinite().all()
    others = torch.arange(6) != 1
    assert torch.equal(y[others].double(), reference(x, w, b, g, case, scales).y[others])


def test_off_and_observe_compute_what_the_linear_computes() -> None:
    case = Case("int8", quantized_gradient=True)
    x, w, b, g = gaussian_tensors()
    plain = linear_of(w, b)
    expected = computed(plain, x, g)
    for mode in (Mode.OFF, Mode.OBSERVE):
        module, state = attached(linear_of(w, b), case, {})
        state.enter(mode)
        result = computed(module, x, g)
        for name, value in vars(expected).items():
            assert torch.equal(getattr(result, name), value), (mode, name)
        seen = {role: float(state.scales.amax[quantizer.index]) for role, quantizer in module.quant.of.items()}
        observed = {"weight": float(w.abs().max()), "input": float(x.abs().max()), "grad_output": float(g.abs().max())}
        assert seen == (observed if mode is Mode.OBSERVE else dict.fromkeys(seen, 0.0))


def test_dynamic_scales_in_eval_before_any_history_come_from_the_tensor_at_hand() -> None:
    dynamic = QatConfig(scaling=ScalingConfig(type="dynamic"), format="int8")
    x, w, b, _ = gaussian_tensors()
    model = nn.Sequential(linear_of(w, b))
    state = attach(model, make_plan(model, dynamic))
    state.enter(Mode.QUANTIZE)
    assert torch.equal(model.eval()[0](x), model.train()[0](x))


def test_scaling_none_rounds_at_scale_one() -> None:
    x, w, b, _ = exact_tensors(Case("int8"))
    model = nn.Sequential(linear_of(w, b)).train()
    state = attach(model, make_plan(model, QatConfig(scaling=ScalingConfig(type="none"), format="int8")))
    state.enter(Mode.QUANTIZE)
    for _ in range(2):
        assert torch.equal(model[0](x), x.round().clamp(-127, 127) @ w.round().clamp(-127, 127).T + b)
        state.push()

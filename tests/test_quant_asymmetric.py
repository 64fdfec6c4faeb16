"""Inputs with a zero-point: against torch's own affine quantization, over time, in files, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, token_ids, word_tokenizer
from quantized_training import assert_equal, attached, trained
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver
from training import TinyStudy, differences, final_state

import qatrun
from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.export import artifact
from qatrun.layout import WEIGHTS_FILE
from qatrun.numerics import codes_to_grid, own_fit
from qatrun.numerics.passes import unpack_bits
from qatrun.quant import Mode, QuantPlan, QuantState, attach, calibrate, freeze, make_plan, quantized_linears
from qatrun.quant.qtensor import to_grid
from qatrun.quant.tally import STATISTICS
from qatrun.recipe import RoleConfig, ScalingConfig, parse_recipe
from qatrun.scheme import Scheme, Slot

CODES = {"quant_min": -128, "quant_max": 127}
SKEWED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "shifted": lambda x: x + 3,
    "all below zero": lambda x: -x.abs() - 5,
    "even": torch.tanh,
    "of both signs": lambda x: x,
}


def scheme(**of_input: Any) -> Scheme:
    return QatConfig(format="int8", input=RoleConfig(symmetric=False, **of_input)).schemes["input"]


@pytest.mark.parametrize("shape", SKEWED.values(), ids=SKEWED)
def test_scale_zero_point_and_values_are_those_of_torch(shape: Callable[[Tensor], Tensor]) -> None:
    x = shape(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)))
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_affine, **CODES)
    observer(x)
    scale, zero = observer.calculate_qparams()
    fit = own_fit(x, scheme())
    assert fit[0].item() == scale.item()
    assert fit[2] is not None
    assert fit[2].item() == zero.item()
    on_grid, seen = to_grid(x, scheme(), fit, torch.bfloat16, codes=True, takes_gradient=True)
    assert torch.equal(
        on_grid.dequantized(), torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero), -128, 127)
    )
    assert on_grid.codes is not None
    codes = np.clip(np.rint(x.numpy() * np.float32(1 / scale.item())) + zero.item(), -128, 127)
    assert np.array_equal(on_grid.codes.numpy(), codes)
    assert on_grid.codes.dtype == torch.int8
    assert torch.equal(codes_to_grid(on_grid.codes, on_grid.grid, torch.float32, on_grid.zero), on_grid.values.float())
    assert seen.counts[0] == 0, "a scale of its own holds all values, those at the ends within half a step"
    assert not on_grid.blocked.any()


def test_so_they_are_for_each_token() -> None:
    x = F.silu(torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1))) * torch.logspace(-3, 3, 7)[:, None]
    per_token = scheme(granularity="per_token")
    fit = own_fit(x, per_token)
    on_grid, _ = to_grid(x, per_token, fit, torch.float32)
    rows = x.reshape(-1, 40)
    flat = (fit[0].flatten(), fit[2].flatten().int()) if fit[2] is not None else ()
    assert torch.equal(
        on_grid.dequantized().reshape(-1, 40), torch.fake_quantize_per_channel_affine(rows, *flat, 0, -128, 127)
    )
    least, largest = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    assert torch.allclose(fit[0].flatten(), (largest - least) / 255, rtol=1e-6)


def test_what_a_scale_cannot_hold_is_counted_and_gets_no_gradient() -> None:
    """torch's mask, but for values at most half a step past the edge, which no value of a longer grid would be nearer to."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    scale, zero = torch.tensor(1 / 64), torch.tensor(-100.0)
    on_grid, seen = to_grid(x, scheme(), (scale, 1 / scale, zero), torch.float32, takes_gradient=True)
    leaf = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(leaf, 1 / 64, -100, -128, 127).sum().backward()
    passes = unpack_bits(on_grid.blocked, x) == 0
    on_tie = ((x * 64 - on_grid.values).abs() - 0.5).abs() < 1e-3
    assert torch.equal(passes[~on_tie], leaf.grad.bool()[~on_tie])
    outside = (x * 64 < -28.5) | (x * 64 > 227.5)
    assert 100 < int(seen.counts[0]) == int(outside.sum())


def test_zero_is_exact_and_nothing_strange_is_hidden() -> None:
    for x in (
        torch.zeros(2, 3),
        torch.zeros(0, 3),
        torch.tensor([[0.0, 5.0, 1e-30]]),
        torch.tensor([[-3.0, 0.0, -7.0]]),
    ):
        for granularity in ("per_tensor", "per_token"):
            asked = scheme(granularity=granularity)
            on_grid, _ = to_grid(x, asked, own_fit(x, asked), torch.float32, codes=True)
            assert not on_grid.dequantized()[x == 0].any()
            assert on_grid.dequantized().isfinite().all()
    for strange in (torch.nan, torch.inf):
        x = torch.tensor([[1.0, strange, -2.0], [1.0, 2.0, 3.0]])
        on_grid, seen = to_grid(x, scheme(), own_fit(x, scheme()), torch.float32, codes=True)
        assert on_grid.values is not None
        assert torch.equal(on_grid.values.isnan(), x.isnan())
        assert int(seen.counts[0]) == int(x.isinf().sum())


def plan(**scaling: Any) -> QuantPlan:
    config = QatConfig(format="int8", scaling=ScalingConfig(**scaling), input=RoleConfig(symmetric=False))
    return QuantPlan({"a": config.schemes}, {"a": "a"})


def expected_side(sides: list[float], algorithm: str, decay: float) -> float:
    """What a rule makes of one side of the ranges, newest last."""
    if algorithm == "max":
        return max(sides)
    if algorithm == "most_recent":
        return sides[-1]
    weights = [decay**age for age in range(len(sides))]
    return sum(weight * side for weight, side in zip(weights, reversed(sides), strict=True)) / sum(weights)


@pytest.mark.parametrize("algorithm", ["max", "most_recent", "ema"])
def test_both_ends_of_a_range_have_a_history_by_the_same_rule(algorithm: str) -> None:
    """A side on which nothing lies is a zero that was seen, an empty step is not, and Inf keeps what there is."""
    ranges = [(-1.0, 2.0), (0.5, 4.0), (-3.0, 1.0), (0.0, 0.0), (-0.5, 8.0), (-2.0, 0.25)]
    state = QuantState(plan(algorithm=algorithm, window=3))
    slot = Slot("a", "input")
    quantizer = qatrun.quant.Quantizer(slot, scheme(), state)
    state.enter(Mode.OBSERVE)
    seen: list[tuple[float, float] | None] = []
    for least, largest in ranges:
        quantizer.observe(torch.tensor([least, (least + largest) / 2, largest]))
        quantizer.observe(torch.tensor([least / 2, largest / 2]))  # another micro-batch
        state.scales.observe(state.scales.index[Slot("a", "weight")], torch.tensor(1.0))
        if not state.primed:
            state.enter(Mode.OBSERVE)
        state.push()
        state.enter(Mode.QUANTIZE)
        seen.append((max(0.0, -least), max(0.0, largest)) if (least, largest) != (0.0, 0.0) else None)
        window = [sides for sides in seen[-3:] if sides is not None]
        if algorithm == "most_recent" and seen[-1] is None:
            continue  # keeps what there was
        below, above = (expected_side([sides[i] for sides in window], algorithm, 0.9) for i in (0, 1))
        if algorithm == "ema":  # rows by their age, whether or not the one between was empty
            aged = [(0.9**age, sides) for age, sides in enumerate(reversed(seen[-3:])) if sides is not None]
            below, above = (sum(w * s[i] for w, s in aged) / sum(w for w, _ in aged) for i in (0, 1))
        scale, _, zero = state.scales.fit(state.scales.index[slot])
        assert float(scale) == pytest.approx((below + above) / 255, rel=1e-6)
        assert zero is not None
        assert abs(float(zero) - (-128 + below / float(scale))) <= 0.51
    before = state.scales.fit(state.scales.index[slot])
    for _ in range(3):
        quantizer.observe(torch.tensor([-1.0, torch.inf]))
        state.push()
    assert [float(of) for of in state.scales.fit(state.scales.index[slot])] == [float(of) for of in before]


def test_overshoot_is_that_of_the_side_that_a_range_leaves() -> None:
    state = QuantState(plan(window=1))
    quantizer = qatrun.quant.Quantizer(Slot("a", "input"), scheme(), state)
    state.enter(Mode.QUANTIZE)
    for x in ((0.0, 4.0), (-4.0, 0.0), (-2.0, 0.0)):
        quantizer.on_grid(torch.tensor(x), torch.float32)
        state.push()
        amax, _, overshoot, clipped = state.tally.take()[0, :4].tolist()
        assert amax == abs(min(x)) + max(x)
        assert (overshoot > 1) == (clipped > 0) == (x == (-4.0, 0.0)), (x, overshoot, clipped)


def test_codes_kept_for_the_backward_change_nothing() -> None:
    for of_input in ({"symmetric": False}, {"symmetric": False, "granularity": "per_token"}):
        of = {"format": "int8", "input": of_input, "scaling": {"window": 2}}
        assert_equal(trained(*attached(**of)), trained(*attached(**of, saved_activations="codes")))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_what_is_read_back_computes_what_was_saved(tmp_path: Path, build: Callable[[], Any], granularity: str) -> None:
    model = build()
    config = QatConfig(format="int8", input=RoleConfig(symmetric=False, granularity=granularity))
    planned = make_plan(model, config)
    state = attach(model, planned)
    quantized_steps(model, state)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        in_memory = logits(model.eval())
    freeze(model, torch.bfloat16)
    assert torch.allclose(logits(model).float(), in_memory.float(), atol=0.1)
    artifact.save(model, word_tokenizer(), planned, tmp_path)
    assert artifact.read_plan(tmp_path) == planned
    loaded, _ = qatrun.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    for linear in quantized_linears(loaded).values():
        assert linear.input_zero_point is not None
        assert linear.input_zero_point.dtype == torch.int8


def test_a_quantized_folder_says_what_is_wrong_with_its_zero_points(tmp_path: Path) -> None:
    model = tiny_llama()
    planned = make_plan(model, QatConfig(format="int8", input=RoleConfig(symmetric=False)))
    quantized_steps(model, attach(model, planned), num_steps=1)
    freeze(model, torch.bfloat16)
    artifact.save(model, word_tokenizer(), planned, tmp_path)
    file, name = tmp_path / WEIGHTS_FILE, "model.layers.0.mlp.up_proj.input_zero_point"
    tensors = load_file(file)
    wrong = {
        "it is missing": None,
        "got float32": tensors[name].float(),
        r"got int8 of shape \[1\]": tensors[name].view(1),
    }
    for said, other in wrong.items():
        save_file({key: t for key, t in (tensors | {name: other}).items() if t is not None}, file)
        with pytest.raises(InputError, match=rf"{name} must be int8 of shape \[\] \({said}"):
            qatrun.load(tmp_path)
    save_file(tensors, file)
    described = json.loads((tmp_path / artifact.PLAN_FILE).read_text())
    for each in described["plan"]["schemes"]:
        each.pop("symmetric", None)
        each["target_amax"] = 127.0
    (tmp_path / artifact.PLAN_FILE).write_text(json.dumps(described))
    with pytest.raises(InputError, match="input_zero_point is no tensor of this model"):
        qatrun.load(tmp_path)


def test_a_plan_without_the_key_is_symmetric_and_a_wrong_one_is_refused() -> None:
    described = plan().to_dict()
    assert [each.get("symmetric") for each in described["schemes"]] == [None, False]
    assert QuantPlan.from_dict(described) == plan()
    described["schemes"][0]["symmetric"] = False
    with pytest.raises(ValueError, match=r"linears\.a\.weight: symmetric: a weight is spread evenly about zero"):
        QuantPlan.from_dict(described)


def test_an_arm_may_go_back_and_the_recipe_that_a_study_keeps_says_so() -> None:
    asymmetric, symmetric = ({"qat": {"input": {"symmetric": symmetric}}} for symmetric in (False, True))
    sections = {"model": {"path": "m"}, "data": {"train": {"path": "d"}}, "train": {"steps": 1000}}
    arms = {"bf16": {"qat": None}, "as_all": {}, "back": symmetric}
    common = {"name": "tiny", "eval": {"tasks": {"none": 0}}, "arms": arms, **sections}
    recipe = parse_recipe(common | {"qat": {"format": "int8"} | asymmetric["qat"]})
    for kept in (recipe, parse_recipe(recipe.model_dump(mode="json"))):
        of_arms = {arm.name: arm.qat.schemes["input"].symmetric for arm in kept.arm_by_name.values() if arm.qat}
        assert of_arms == {"as_all": False, "back": True}
    assert "symmetric" not in str(parse_recipe(common | {"arms": {"bf16": {"qat": None}, "a": {}}}).model_dump())


def test_calibration_finds_range_and_zero_point() -> None:
    model = tiny_llama()
    state = attach(model, make_plan(model, QatConfig(format="int8", input=RoleConfig(symmetric=False))))
    inputs: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    calibrate(model, [token_ids(seed=seed) for seed in range(3)])
    expected = own_fit(torch.cat(inputs), scheme())
    found = state.scales.fit(state.scales.index[Slot("model.layers.0.mlp.down_proj", "input")])
    assert [float(of) for of in found] == [float(of) for of in expected]


def test_a_trunk_that_sees_ranges_changes_nothing_for_an_arm_that_needs_none(tmp_path: Path) -> None:
    asymmetric = {"qat": {"format": "int8", "input": {"symmetric": False}}}
    alone = TinyStudy(tmp_path / "alone")
    beside = TinyStudy(tmp_path / "beside", arms={"bf16": {"qat": None}, "hif8": {}, "asymmetric": asymmetric})
    for study in (alone, beside):
        study.train_arm("hif8")
    assert differences(final_state(alone.arms["hif8"].own), final_state(beside.arms["hif8"].own)) == []
    beside.train(beside.arms["asymmetric"].own)
    segments = {"trunk": beside.arms["hif8"].trunk, **{name: beside.arms[name].own for name in ("hif8", "asymmetric")}}
    tensors = {name: final_state(segment)["tensors"] for name, segment in segments.items()}
    columns = {name: of["quant/history"].shape[1] for name, of in tensors.items()}
    assert columns["trunk"] == columns["asymmetric"] > columns["hif8"]
    assert tensors["asymmetric"]["quant/zero"].any()


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_new"])
def test_where_inputs_are_skewed_a_zero_point_keeps_more_of_them(activation: str) -> None:
    """SQNR of what an activation hands to the next linear, while training; a bit is 6 dB, the most that there is to gain."""
    kept: dict[bool, Tensor] = {}
    for symmetric in (True, False):
        model = tiny_gpt2(activation_function=activation)
        with torch.no_grad():
            for block in model.transformer.h:
                block.mlp.c_fc.weight *= 10  # so that activations reach past the linear part about zero
        planned = make_plan(model, QatConfig(format="int8", input=RoleConfig(symmetric=symmetric)))
        state = attach(model, planned)
        quantized_steps(model, state, num_steps=2, learning_rate=0.01)
        state.tally.take()
        state.tally.measures_noise = True
        quantized_steps(model, state, num_steps=2, learning_rate=0.01)
        rows = [state.scales.index[Slot(name, "input")] for name in planned.linears if "mlp.c_proj" in name]
        kept[symmetric] = state.tally.take()[rows, STATISTICS.index("sqnr_db")]
    gain = kept[False] - kept[True]
    assert len(gain) == 2
    assert 5.0 < float(gain.min()) <= float(gain.max()) < 6.5, gain

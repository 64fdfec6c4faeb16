"""MXFP8: FP8 in blocks of 32 with a power of two each, against the specification element by element."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from builders import logits, quantized_steps, tiny_gpt2, tiny_llama, word_tokenizer
from faulty_recipe import RECIPE, lines_of
from torch import Tensor

from qatrun import QatConfig
from qatrun.errors import InputError
from qatrun.export import artifact, compressed_tensors
from qatrun.numerics import own_fit
from qatrun.quant import attach, freeze, make_plan
from qatrun.quant.matmul import gradients, scaled_matmul
from qatrun.quant.qtensor import QTensor, to_grid

BLOCKS = {"granularity": "per_block"}
ELEMENTS = {"fp8_e4m3": (ml_dtypes.float8_e4m3fn, 8, 448.0), "fp8_e5m2": (ml_dtypes.float8_e5m2, 15, 57344.0)}


def mx(format_name: str = "fp8_e4m3", **qat: Any) -> QatConfig:
    return QatConfig.model_validate({"format": format_name, "weight": BLOCKS, "input": BLOCKS, **qat})


def quantized(x: Tensor, format_name: str, dtype: torch.dtype, role: str = "input", **settings: Any) -> QTensor:
    scheme = mx(format_name).schemes[role]  # type: ignore[index]
    return to_grid(x, scheme, own_fit(x, scheme), dtype, **settings)[0]


def by_the_specification(row: np.ndarray, format_name: str) -> list[tuple[float, list[float]]]:
    """Scale and elements of each block: OCP MX v1.0, section 6.3, one number at a time."""
    element, exponent, largest = ELEMENTS[format_name]
    blocks = []
    for start in range(0, len(row), 32):
        block = [float(value) for value in row[start : start + 32]]
        biggest = max(abs(value) for value in block)
        scale = 2.0 ** (math.floor(math.log2(biggest)) - exponent) if biggest else 1.0
        elements = [float(element(max(-largest, min(largest, value / scale)))) for value in block]
        blocks.append((scale, elements))
    return blocks


@pytest.mark.parametrize("format_name", ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_elements_are_those_of_the_specification(format_name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 96, generator=generator) * torch.exp(8 * torch.randn(6, 96, generator=generator))
    x[0, :32] = 0
    x[1, 32:64] *= 2.0**-60
    x[2, 3], x[2, 40], x[2, 70] = 448.0, -511.9, 2.0**20  # full, above the largest, a power of two
    x = x.to(dtype)
    on_grid = quantized(x, format_name, dtype, codes=True)
    assert on_grid.values is not None and on_grid.codes is not None  # noqa: PT018 -- for mypy
    assert on_grid.scale.shape == (6, 3)
    for row, values, scales in zip(x.float().numpy(), on_grid.values.float(), on_grid.scale, strict=True):
        expected = by_the_specification(row, format_name)
        assert scales.tolist() == [scale for scale, _ in expected]
        assert values.tolist() == [element for _, elements in expected for element in elements]
    assert torch.equal(on_grid.grid.decode(on_grid.codes), on_grid.values.float())
    folded, outside = on_grid.operand(dtype)
    assert outside.shape == ()
    assert outside == 1
    assert torch.equal(folded.float(), on_grid.dequantized())  # exact in bfloat16, too


def test_products_are_those_of_what_blocks_stand_for_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in ((5, 64), (7, 64), (5, 7)))
    on_x = quantized(x, "fp8_e4m3", torch.float32, takes_gradient=True)
    on_w = quantized(weight, "fp8_e4m3", torch.float32, "weight", takes_gradient=True)
    x_hat, w_hat = on_x.dequantized(), on_w.dequantized()
    assert torch.allclose(scaled_matmul(on_x, on_w, None, torch.float32), x_hat @ w_hat.t(), atol=1e-4)
    grad_x, grad_w, _ = gradients(grad, None, on_x, on_w, (torch.float32, torch.float32, None))
    assert grad_x is not None and grad_w is not None  # noqa: PT018 -- for mypy
    passes = [q.values.abs() < 448 for q in (on_x, on_w)]  # type: ignore[union-attr]
    assert torch.allclose(grad_x * passes[0], grad @ w_hat * passes[0], atol=1e-4)
    assert torch.allclose(grad_w * passes[1], grad.t() @ x_hat * passes[1], atol=1e-4)
    again = QTensor.of_saved(on_x.grid, *on_x.kept)  # as a backward has it
    assert torch.equal(again.dequantized(), x_hat)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("saved", ["values", "codes"])
def test_what_is_loaded_is_what_was_trained(build: Any, saved: str, tmp_path: Path) -> None:
    model = build()
    plan = make_plan(model, mx(saved_activations=saved))
    quantized_steps(model, attach(model, plan))
    trained = logits(model)
    freeze(model, torch.float32)
    assert torch.equal(logits(model), trained)
    artifact.save(model, word_tokenizer(), plan, tmp_path)
    assert torch.equal(logits(artifact.load(tmp_path)[0]), trained)


def test_activations_saved_as_codes_change_no_gradient() -> None:
    found = []
    for saved in ("values", "codes"):
        model = tiny_llama()
        quantized_steps(model, attach(model, make_plan(model, mx(saved_activations=saved))))
        found.append(logits(model))
    assert torch.equal(*found)


def test_widths_that_are_no_whole_number_of_blocks_are_named() -> None:
    with pytest.raises(InputError, match=r"mlp\.down_proj takes 48 values, which are no whole number of blocks of 32"):
        make_plan(tiny_llama(intermediate_size=48), mx())
    spared = mx(
        modules=[
            {"match": "*.down_proj", "weight": {"granularity": "per_channel"}, "input": {"granularity": "per_token"}}
        ]
    )
    assert make_plan(tiny_llama(intermediate_size=48), spared).linears


def test_an_export_that_has_no_blocks_says_so() -> None:
    model = tiny_llama()
    (problem,) = compressed_tensors.problems(make_plan(model, mx()), model)
    assert "scales of blocks (MXFP8) are not written as compressed-tensors yet" in problem


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  input: {granularity: per_block}",
            "r.yaml:7: qat.input.granularity -- OCP MX has no blocks of hif8 (one of fp8_e4m3, fp8_e5m2)",
        ),
        (
            "  weight: {format: fp8_e4m3, granularity: per_block, target_amax: 100}",
            "r.yaml:7: qat.weight.granularity -- the scale of a block is a power of two by OCP MX: leave target_amax out",
        ),
        (
            "  grad_output: {granularity: per_block}",
            "r.yaml:7: qat.grad_output.granularity -- per_block makes no sense for grad_output (did you mean 'per_tensor'?)",
        ),
        (
            "  weight: {format: fp8_e4m3, granularity: per_block, scaling: {type: delayed}}",
            "r.yaml:7: qat.weight.scaling.type -- delayed scaling keeps one scale per tensor; per_block takes only "
            "'dynamic'",
        ),
    ],
)
def test_a_recipe_whose_blocks_make_no_sense(
    line: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = lines_of(RECIPE.replace("  format: hif8", line))
    assert expected in lines

"""Products of bfloat16 matrices where the CPU has no unit for them: the very numbers of a product whose sums are float32's,
in a model as in a single product, and near those of a unit by no more than the order of sums explains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qatrun.numerics import GRIDS, bfloat16_products, bfloat16_way, product, recomputed_products
from qatrun.numerics.product import Float32Products
from qatrun.quant import QTensor
from qatrun.quant.matmul import scaled_matmul

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

# x [3, 5, 16], w [3, 16, 16], b [3, 5, 16] -> y; no operand is used twice, since sums of gradients are not a product's
PRODUCTS: dict[str, Product] = {
    "linear": lambda x, w, b: F.linear(x, w[0], b[0, 0]),
    "linear without bias": lambda x, w, b: F.linear(x, w[0]),
    "operator": lambda x, w, b: x @ w[0],
    "matmul": lambda x, w, b: torch.matmul(x, w[0]),
    "method": lambda x, w, b: x.matmul(w),
    "bmm": lambda x, w, b: torch.bmm(x, w),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w, beta=0.5, alpha=2.0),
    "addmm": lambda x, w, b: torch.addmm(b[0], x[0], w[0]),
    "einsum": lambda x, w, b: torch.einsum("bsd,bde->bse", x, w),
    "einsum of a list": lambda x, w, b: torch.einsum("bsd,bde->bse", [x, w]),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(x, w, w.detach() * 0.5),
    "convolution": lambda x, w, b: F.conv1d(x, w[:, :5, :3], padding=1),
}


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 5, 16), (3, 16, 16), (3, 5, 16)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def in_float32(make: Product, tensors: list[Tensor]) -> list[Tensor]:
    """y and its gradients by the definition: operands and results rounded, everything between in float32."""
    rounded = [tensor.detach().bfloat16().float().requires_grad_() for tensor in tensors]
    y = make(*rounded)
    y.backward(torch.ones_like(y))
    return [y.detach().bfloat16(), *(t.grad.bfloat16().float() for t in rounded if t.grad is not None)]


def made(make: Product, tensors: list[Tensor], *, autocast: bool) -> list[Tensor]:
    with Float32Products(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = make(*tensors)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))
    return [y.detach(), *(tensor.grad.float() for tensor in tensors if tensor.grad is not None)]


@pytest.mark.parametrize("make", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 tensors"])
def test_a_product_is_the_definition_s(make: Product, dtype: torch.dtype) -> None:
    tensors = operands(dtype)
    for found, expected in zip(
        made(make, tensors, autocast=dtype == torch.float32), in_float32(make, tensors), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_float32_products_stay_what_they_are(make: Product) -> None:
    tensors = operands(torch.float32)
    with Float32Products():
        y = make(*tensors)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, make(*tensors), rtol=0, atol=0)


def test_float64_is_left_alone_under_autocast_as_autocast_does() -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = x @ x
        with Float32Products():
            assert torch.equal(x @ x, expected)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activations recomputed"])
def test_a_model_trains_the_same_either_way_but_for_the_order_of_sums(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """One way and the other, each against float32: neither is further from it than bfloat16 is coarse."""
    input_ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(way: str, *, bf16: bool) -> Tensor:
        monkeypatch.setattr(product, "bfloat16_way", lambda: way)
        model = tiny().train()
        if checkpointing:
            options = {"use_reentrant": False, "context_fn": recomputed_products}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with bfloat16_products(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact = gradients("native", bf16=False)
    torchs, ours = gradients("native", bf16=True), gradients("float32", bf16=True)

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / exact.norm())

    assert 0 < distance(ours, exact) < 1.5 * distance(torchs, exact)
    assert distance(ours, torchs) < 1.5 * distance(torchs, exact)


def test_quantized_linears_take_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On grid values every product is exact in float32, and so are these sums: the two ways agree to the last bit."""
    q_x, q_w = (torch.randint(-15, 16, shape).bfloat16() for shape in ((2, 7, 64), (32, 64)))
    on_x = QTensor(GRIDS["int8"], q_x, None, torch.tensor(0.013))
    on_w = QTensor(GRIDS["int8"], q_w, None, torch.rand(32, 1))
    results = []
    for way in ("native", "float32"):
        monkeypatch.setattr(product, "bfloat16_way", lambda way=way: way)
        results.append(scaled_matmul(on_x, on_w, None, torch.bfloat16))
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)


def test_a_conv1d_is_a_product_too() -> None:
    linear, x = Conv1D(8, 16).bfloat16(), torch.randn(2, 16).bfloat16()
    with Float32Products():
        y = linear(x)
    assert torch.equal(y, torch.addmm(linear.bias.float(), x.float(), linear.weight.float()).bfloat16())


@pytest.mark.parametrize(
    ("supported", "unit", "limit", "way"),
    [
        (True, True, None, "native"),
        (True, True, "avx512_core_amx", "native"),
        (True, True, "AVX2", "float32"),
        (True, True, "AVX512_CORE", "float32"),
        (True, False, None, "float32"),  # AVX-512 without BF16: oneDNN emulates it, slower than float32
        (False, True, None, "float32"),  # no AVX-512
    ],
)
def test_the_way_follows_from_the_processor(
    monkeypatch: pytest.MonkeyPatch, supported: bool, unit: bool, limit: str | None, way: str
) -> None:
    monkeypatch.setattr(product.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(product, "_onednn_takes_bfloat16", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: unit)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert bfloat16_way.__wrapped__() == way


def test_where_there_is_a_unit_nothing_stands_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "bfloat16_way", lambda: "native")
    assert not isinstance(bfloat16_products(), Float32Products)
    monkeypatch.setattr(product, "bfloat16_way", lambda: "float32")
    assert isinstance(bfloat16_products(), Float32Products)

"""W8A8 arithmetic as a kernel does it, both directions.

Forward, on grid values (exact in bfloat16 for all four formats), scales multiplied after:

    y = (q_x @ q_w^T) * (s_x * s_w) + b             accumulated in float32, rounded to the compute dtype

Backward, the same way round. A scale that varies along the dimension that is summed over cannot be pulled out of the
sum, so it multiplies the gradient first:

    dx = (g @ q_w) * s_w            s_w per channel:  dx = (g * s_w) @ q_w
    dW = (g^T @ q_x) * s_x          s_x per token:    dW = (g * s_x)^T @ q_x

With `grad_output` quantized, g is q_g * s_g (per tensor) and s_g multiplies last as well.

What this leaves out: fused epilogues. The matrix product is rounded to the compute dtype before its scale is applied in
float32 and the result is rounded again, one rounding more than a fused kernel makes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qatrun.numerics import product_dtype, rescale_, scale_gradient
from qatrun.quant.qtensor import QTensor

Dtypes = tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def scaled_matmul(on_x: QTensor, on_w: QTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = (q_x @ q_w^T) * (s_x * s_w) + b

    Args:
        on_x, on_w: [..., in] and [out, in].
        bias: [out] or None.
        dtype: the compute dtype.
    Returns:
        [..., out] in the compute dtype.
    """
    (q_x, s_x), (q_w, s_w) = on_x.operand(dtype), on_w.operand(dtype)
    operands = product_dtype(dtype, q_x.device)
    with torch.autocast(q_x.device.type, enabled=False):
        product = F.linear(q_x.to(operands), q_w.to(operands)).to(dtype)
        return rescale_(product, s_x, s_w.flatten() if s_w.dim() else s_w, bias)


def gradients(grad_output: Tensor, on_g: QTensor | None, on_x: QTensor, on_w: QTensor, dtypes: Dtypes) -> Gradients:
    """(dx [..., in], dW [out, in], db [out]) in these dtypes, None where the dtype is; dx and dW are zero where the
    straight-through estimator holds the gradient of x and W back.

    Args:
        grad_output: [..., out] in the compute dtype.
        on_g: the same quantized, where it is.
    """
    to_x, to_w, to_bias = dtypes
    compute_dtype = grad_output.dtype
    operands = product_dtype(compute_dtype, grad_output.device)
    g, s_g = (grad_output, None) if on_g is None else on_g.operand(compute_dtype)
    g = g.to(operands)
    grad_x = grad_w = None
    if to_x is not None:
        q_w, s_w = on_w.operand(operands)
        grad_x = _scaled_product(g, q_w, s_w.flatten(), s_g, compute_dtype, on_x.blocked, to_x)
    if to_w is not None:
        q_x, s_x = on_x.operand(operands)
        grad_w = _scaled_product(_rows(g).t(), _rows(q_x), s_x.flatten(), s_g, compute_dtype, on_w.blocked, to_w)
    grad_bias = None if to_bias is None else _rows(grad_output).sum(0, dtype=torch.float32).to(to_bias)
    return grad_x, grad_w, grad_bias


def _scaled_product(
    a: Tensor,
    b: Tensor,
    summed_scale: Tensor,
    extra: Tensor | None,
    compute_dtype: torch.dtype,
    blocked: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(a @ b) rounded to the compute dtype, times the scale in float32, zero where blocked. A scale that varies along the
    summed dimension multiplies `a`, which is an operand in the compute dtype again."""
    if summed_scale.numel() > 1:
        a, summed_scale = (a.float() * summed_scale).to(compute_dtype).to(b.dtype), summed_scale.new_ones(())
    scale = summed_scale.reshape(()) if extra is None else summed_scale.reshape(()) * extra
    with torch.autocast(a.device.type, enabled=False):
        return scale_gradient(torch.matmul(a, b).to(compute_dtype), scale, blocked, dtype)


def _rows(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]; a single vector is one row."""
    return x.reshape(-1, x.shape[-1])

"""8-bit arithmetic as pure functions on torch tensors: rounding, codes, scales, fake quantization, metrics.

No function here holds state, and all of them compile with torch.compile(fullgraph=True); eager and compiled agree bit
for bit. Throughout, `x_hat = q * scale` and `q = round_to_format(x * inv_scale)`: values passed to the rounding and
encoding functions are in units of the grid.
"""

from qatrun.numerics.codes import decode, encode
from qatrun.numerics.fake_quant import Clip, Ste, clip_limit, fake_quantize
from qatrun.numerics.metrics import clip_fraction, sqnr_db, underflow_fraction
from qatrun.numerics.passes import Quantized, code_dtype, codes_to_grid, quantize, rescale_, scale_gradient
from qatrun.numerics.product import bfloat16_products, bfloat16_way, product_dtype, recomputed_products
from qatrun.numerics.rounding import Overflow, quantize_to_grid, round_to_format, saturates
from qatrun.numerics.scales import Granularity, amax, inverse_scale, scale_from_amax

__all__ = [
    "Clip",
    "Granularity",
    "Overflow",
    "Quantized",
    "Ste",
    "amax",
    "bfloat16_products",
    "bfloat16_way",
    "clip_fraction",
    "clip_limit",
    "code_dtype",
    "codes_to_grid",
    "decode",
    "encode",
    "fake_quantize",
    "inverse_scale",
    "product_dtype",
    "quantize",
    "quantize_to_grid",
    "recomputed_products",
    "rescale_",
    "round_to_format",
    "saturates",
    "scale_from_amax",
    "scale_gradient",
    "sqnr_db",
    "underflow_fraction",
]

"""8-bit arithmetic as pure functions on torch tensors: rounding, codes, scales, fake quantization, products.

No function here holds state, and those that round or scale compile with torch.compile(fullgraph=True); eager and
compiled agree bit for bit. Throughout, `x_hat = q * scale` and `q = round_to_format(x * inv_scale)`: values passed to the
rounding and encoding functions are in units of the grid.
"""

from qatrun.numerics.fake_quant import fake_quantize
from qatrun.numerics.grid import Grid, Overflow
from qatrun.numerics.grids import GRIDS, decode, encode, grid_of, round_to_format, saturates
from qatrun.numerics.passes import Quantized, codes_to_grid, quantize, rescale_, scale_gradient
from qatrun.numerics.product import bfloat16_products, bfloat16_way, product_dtype, recomputed_products
from qatrun.numerics.scales import Fit, affine_from_reach, amax, inverse_scale, own_fit, reach, scale_from_amax

__all__ = [
    "GRIDS",
    "Fit",
    "Grid",
    "Overflow",
    "Quantized",
    "affine_from_reach",
    "amax",
    "bfloat16_products",
    "bfloat16_way",
    "codes_to_grid",
    "decode",
    "encode",
    "fake_quantize",
    "grid_of",
    "inverse_scale",
    "own_fit",
    "product_dtype",
    "quantize",
    "reach",
    "recomputed_products",
    "rescale_",
    "round_to_format",
    "saturates",
    "scale_from_amax",
    "scale_gradient",
]

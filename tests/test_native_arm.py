"""The kernels as 64-bit Arm runs them, cross-compiled and emulated, against the reference functions: bit for bit."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from test_numerics_passes import EVERY_BFLOAT16, bits, random_patterns, ties_and_boundaries
from torch import Tensor

from qatrun.formats import FORMATS
from qatrun.numerics import GRIDS, native, native_build, passes

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)}: g++-aarch64-linux-gnu, qemu-user"
)
DRIVER = Path(__file__).with_name("native_driver.cpp")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("arm") / "driver"
    flags = (*native_build.FLAGS, *native_build.ELSEWHERE["baseline"], "-DQATRUN_VARIANT=baseline", "-static")
    subprocess.run([COMPILER, *flags, str(native_build.SOURCE), str(DRIVER), "-o", str(binary)], check=True)
    return binary


def raw(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def case(x: Tensor, format: str, dtype: torch.dtype, limit: float | None, inv_scale: Tensor, columns: Tensor) -> bytes:
    grid = GRIDS[format]
    edge, threshold = grid.edge(limit), grid.saturation_threshold(limit)
    numbers = grid.native, native.DTYPES[x.dtype], native.DTYPES[dtype]
    head = struct.pack("3i2f3i", *numbers, edge, threshold, x.numel(), x.shape[-1], int(inv_scale.dim() > 0))
    return head + raw(grid.values_of_codes()) + raw(inv_scale.reshape(-1)) + raw(columns) + raw(x)


def check(
    answer: memoryview,
    x: Tensor,
    format: str,
    dtype: torch.dtype,
    limit: float | None,
    inv_scale: Tensor,
    columns: Tensor,
) -> int:
    """Compares one answer with the reference; how many bytes it was."""
    at = 0

    def same(expected: Tensor) -> None:
        nonlocal at
        size = expected.numel() * expected.element_size()
        given = torch.frombuffer(bytearray(answer[at : at + size]), dtype=expected.dtype).view(expected.shape)
        assert torch.equal(bits(given), bits(expected))
        at += size

    reference = passes._quantize_reference(x, inv_scale, format, limit, dtype, True, True)
    assert reference.codes is not None
    assert reference.blocked is not None
    assert reference.values is not None
    same(reference.values)
    same(reference.codes.view(GRIDS[format].code_dtype))
    same(reference.blocked)
    same(reference.amax)
    same(reference.counts)
    same(passes._codes_to_grid_reference(reference.codes, format, dtype))
    first_scale = inv_scale.reshape(-1)[0]
    same(passes._scale_gradient_reference(x, first_scale, reference.blocked, dtype))
    same(passes._rescale_reference(x, inv_scale, columns, x[0]))
    return at


@pytest.mark.parametrize("format", FORMATS)
def test_all_kernels_are_the_reference(format: str, driver: Path) -> None:
    boundaries = ties_and_boundaries(format)
    boundaries = boundaries[: len(boundaries) // 9 * 9].view(-1, 9)
    inputs = [
        EVERY_BFLOAT16.view(-1, 512),
        EVERY_BFLOAT16.float().view(-1, 512),
        random_patterns(60 * 700).view(60, 700),
        boundaries,
        torch.randn(30, 513, generator=torch.Generator().manual_seed(0)).bfloat16(),
    ]
    inv_scales = [lambda x: torch.tensor(1.0), lambda x: torch.linspace(0.1, 40, x.shape[0])[:, None]]
    dtypes, limits = (torch.float32, torch.bfloat16), (None, 15.0)
    cases = [
        (x, format, dtype, limit, inv_scale(x), torch.linspace(0.3, 3, x.shape[-1]))
        for x, dtype, limit, inv_scale in product(inputs, dtypes, limits, inv_scales)
    ]
    ran = subprocess.run(
        [EMULATOR, str(driver)], input=b"".join(case(*of) for of in cases), capture_output=True, check=True
    )
    answer, at = memoryview(ran.stdout), 0
    for of in cases:
        at += check(answer[at:], *of)
    assert at == len(answer)


def test_the_kernels_are_vectors(driver: Path) -> None:
    """HiF8's rounding turns exponents into floats and back: four at a time."""
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", str(driver)], capture_output=True, text=True, check=True
    ).stdout
    for instruction in ("scvtf", "fcvtzs", "smax", "fmul"):
        assert re.search(rf"\t{instruction}\tv\d+\.4s", listing), instruction

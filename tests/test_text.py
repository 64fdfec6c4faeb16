"""How messages are worded."""

from __future__ import annotations

import pytest

from qatrun.text import interval, number, readable_size, shown, suggestion


@pytest.mark.parametrize(
    ("got", "choices", "otherwise", "said"),
    [
        ("hif9", ["hif8", "int8"], None, " (did you mean 'hif8'?)"),
        ("x", ["hif8", "int8"], None, " (one of hif8, int8)"),
        ("x", ["hif8", "int8"], "formats have short names", " (formats have short names)"),
        ("x", ["hif8", "int8"], "", ""),
        ("x", [], None, ""),
    ],
)
def test_suggestion(got: str, choices: list[str], otherwise: str | None, said: str) -> None:
    assert suggestion(got, choices, otherwise) == said


def test_how_near_is_near() -> None:
    assert suggestion("mlp", ["mlp.up_proj"]) == " (one of mlp.up_proj)"
    assert suggestion("mlp", ["mlp.up_proj"], cutoff=0.4) == " (did you mean 'mlp.up_proj'?)"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (78_000, "76.2 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_readable_size(num_bytes: int, text: str) -> None:
    assert readable_size(num_bytes) == text


def test_numbers_and_values() -> None:
    assert [number(value) for value in (2**32 - 1, 0.1, 1e-6)] == ["4294967295", "0.1", "1e-06"]
    assert [shown(value) for value in (None, True, "a", 3, [1], {})] == [
        "null",
        "true",
        "'a'",
        "3",
        "a list",
        "a mapping",
    ]
    assert [interval([-0.214, 0.94]), interval((0.0, 1.23456), 3)] == ["-0.21 .. +0.94", "+0.000 .. +1.235"]

"""The sweep over architectures: a handful of them whole, and what it makes of those that crash or hang."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import architectures

    return architectures


@pytest.mark.parametrize("architecture", ["mamba", "llama4_text", "gemma3n_text", "gemma3"])
def test_one_of_a_kind_goes_all_the_way(sweep: ModuleType, architecture: str, tmp_path: Path) -> None:
    result = sweep.attempt(architecture, tmp_path)
    assert result.outcome == sweep.SUPPORTED, result.detail


def test_one_that_sees_the_future_is_refused_at_check(sweep: ModuleType, tmp_path: Path) -> None:
    result = sweep.attempt("xlnet", tmp_path)
    assert (result.outcome, "changes with the tokens after it" in result.detail) == (sweep.REFUSED, True)


def test_every_architecture_is_one_of_the_installed_transformers(sweep: ModuleType) -> None:
    tiny_configs = sys.modules["tiny_configs"]
    assert set(tiny_configs.PARTICULAR) <= set(tiny_configs.ARCHITECTURES)
    assert tiny_configs.tiny_config("llama").num_hidden_layers == 2


@pytest.mark.parametrize(
    ("attempt", "detail"),
    [
        (lambda *_: os._exit(9), "the process died"),
        (lambda *_: time.sleep(60), "no answer in 1 s"),
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_one_that_dies_or_hangs_is_a_row_of_the_table(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, attempt: object, detail: str
) -> None:
    monkeypatch.setattr(sweep, "attempt", attempt)
    monkeypatch.setattr(sweep, "SECONDS_EACH", 1)
    result = sweep.in_own_process("llama")
    assert (result.architecture, result.outcome) == ("llama", sweep.FAILED)
    assert detail in result.detail
    written = sweep.table([result, sweep.Result("mamba", sweep.SUPPORTED, "6 of 9 | linears")], 60)
    assert f"2 tried: 1 supported; 0 {sweep.REFUSED}; 0 {sweep.NOT_BUILT}; 1 {sweep.FAILED}." in written
    assert "| mamba | supported | 6 of 9 / linears |" in written

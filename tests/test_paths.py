"""A path means the same wherever it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_world import run_qatrun

from qatrun.paths import expand_path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "/home/me"),
        ("~/a b", "/home/me/a b"),
        ("~nobody-of-that-name/a", "~nobody-of-that-name/a"),
        ("a/~/b", "a/~/b"),
        ("org/name", "org/name"),
        ("builtin:demo", "builtin:demo"),
    ],
)
def test_expand(monkeypatch: pytest.MonkeyPatch, written: str, meant: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path(written) == meant


def test_the_command_line_expands_what_the_shell_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (("report", "--output-dir=~/runs"), ("compare", "a", "b", "--output-dir=~/runs")):
        ran = run_qatrun(*arguments, cwd=tmp_path)
        assert (ran.code, ran.err.strip()) == (2, f"no study in {tmp_path}/runs yet")
    assert run_qatrun("init", "~/model", "--output=~/r.yaml", cwd=tmp_path).code == 0
    assert f'path: "{tmp_path}/model"' in (tmp_path / "r.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "arguments", [("eval", ""), ("report", ""), ("compare", "a", ""), ("report", "--output-dir", "")]
)
def test_an_empty_path_is_none(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ran = run_qatrun(*arguments, cwd=tmp_path)
    assert ran.code == 2
    assert "must not be empty" in ran.err
    assert "Traceback" not in ran.err

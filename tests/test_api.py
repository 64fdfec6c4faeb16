"""The public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import qatrun
from qatrun import errors
from qatrun.errors import InputError, Problem, QatrunError
from qatrun.formats import FORMATS, ROLES, get_format


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_resolves() -> None:
    for name in qatrun.__all__:
        assert getattr(qatrun, name) is not None
    with pytest.raises(AttributeError, match="quantise"):
        qatrun.quantise  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        *(
            "qatrun.export.artifact",
            "qatrun.data",
            "qatrun.errors",
            "qatrun.evaluate",
            "qatrun.numerics",
            "qatrun.quant",
        ),
        *("qatrun.recipe", "qatrun.study", "qatrun.train"),
    ],
)
def test_what_a_module_exports_it_has(module: str) -> None:
    home = import_module(module)
    for name in getattr(home, "__all__", ()):
        assert hasattr(home, name), name


def test_importing_qatrun_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval', 'numpy'}"
    code = f"import sys, qatrun, qatrun.formats, qatrun.errors, qatrun.recipe; print(sys.modules.keys() & {heavy})"
    assert in_a_fresh_interpreter(code) == "set()"


def test_the_format_functions_are_reached_from_the_package_itself() -> None:
    code = """
import torch, qatrun
format = qatrun.formats.get_format("hif8")
codes = qatrun.numerics.encode(torch.tensor([1.0, 40000.0]), format.name, overflow="inf")
print(qatrun.numerics.decode(codes, "hif8").tolist(), format.max_finite)
"""
    assert in_a_fresh_interpreter(code) == "[1.0, 32768.0] 32768.0"


def test_attach_train_and_detach_as_the_package_shows_it() -> None:
    from builders import quantized_steps, tiny_llama

    model = tiny_llama()
    plan = qatrun.make_plan(model, qatrun.QatConfig(format="hif8"))
    state = qatrun.attach(model, plan)
    quantized_steps(model, state)
    qatrun.detach(model)
    assert not hasattr(model, "quant_state")


def test_formats_are_known_by_name_and_mistakes_are_answered_with_the_nearest() -> None:
    for name, spec in FORMATS.items():
        assert get_format(name) is spec
        assert set(spec.target_amax) == set(ROLES)
        assert all(0 < target <= spec.max_finite for target in spec.target_amax.values())
        assert 0 < spec.min_subnormal <= spec.min_normal < spec.max_finite
    with pytest.raises(InputError, match=r"unknown format 'fp8_e4m4' \(did you mean 'fp8_e4m3'\?\)"):
        get_format("fp8_e4m4")
    with pytest.raises(InputError, match="one of hif8, fp8_e4m3, fp8_e5m2, int8"):
        get_format("zzz")


def test_errors_have_exit_codes_and_one_line_a_problem() -> None:
    exceptions = [getattr(errors, name) for name in errors.__all__ if name != "Problem"]
    assert all(issubclass(exception, QatrunError) for exception in exceptions)
    assert {e.__name__ for e in exceptions if e.exit_code == 2} == {
        *("InputError", "RecipeError", "MismatchError", "DamagedFileError"),
    }
    assert {e.exit_code for e in exceptions} == {2, 3}
    error = InputError([Problem("wrong", "a.b", "x.yaml:3"), Problem("missing")])
    assert str(error) == "x.yaml:3: a.b -- wrong\nmissing"
    assert InputError("plain").problems == (Problem("plain"),)

"""The public names, and what importing them costs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages

import pytest

import qatrun
from qatrun import errors
from qatrun.errors import InputError, Problem
from qatrun.formats import FORMATS, ROLES, get_format


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def packages() -> list[str]:
    """The package, and those in it that say what is public."""
    found = [info.name for info in walk_packages(qatrun.__path__, "qatrun.") if "_recipes" not in info.name]
    return ["qatrun", *(name for name in found if "__all__" in source_of(name))]


def source_of(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("package", packages())
def test_what_a_package_says_is_public_is_there(package: str) -> None:
    home = import_module(package)
    assert home.__all__ == sorted(home.__all__, key=as_ruff_sorts), "in the order that every list has"
    assert len(set(home.__all__)) == len(home.__all__)
    for name in home.__all__:
        assert getattr(home, name) is not None, name
    if hasattr(home, "__getattr__"):
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'quantise'"):
            home.quantise  # noqa: B018


def as_ruff_sorts(name: str) -> tuple[bool, bool, str]:
    return not name.isupper(), not name[0].isupper(), name


def test_the_package_shows_what_is_public_and_says_what_the_readme_uses() -> None:
    assert dir(qatrun) == qatrun.__all__
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bqatrun\.([a-zA-Z]\w*)(?=\()", readme)) <= set(qatrun.__all__)


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


def classes_of_the_tree() -> list[tuple[str, str | None]]:
    """(class, the class above it), from top to bottom, as the docstring of errors.py draws them."""
    drawn: list[tuple[str, str | None]] = []
    above: list[str] = []
    for branch, name in re.findall(r"^([│├└─ ]*)(\w+) +\S", errors.__doc__ or "", re.MULTILINE)[1:]:
        del above[len(branch) // 4 :]
        drawn.append((name, above[-1] if above else None))
        above.append(name)
    return drawn


def test_the_tree_of_exceptions_is_the_one_drawn_and_all_of_it_is_public() -> None:
    exceptions = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and name != "Problem"}
    exceptions = {name: kind for name, kind in exceptions.items() if issubclass(kind, BaseException)}
    assert {*exceptions, "Problem"} == set(errors.__all__)
    bases = {name: kind.__bases__[0].__name__ for name, kind in exceptions.items()}
    assert dict(classes_of_the_tree()) == bases | {"QatrunError": None}
    assert all(kind.__doc__ for kind in exceptions.values())


def test_errors_have_exit_codes_and_one_line_a_problem() -> None:
    exceptions = [getattr(errors, name) for name in errors.__all__ if name != "Problem"]
    assert {e.__name__ for e in exceptions if e.exit_code == 2} == {
        *("InputError", "RecipeError", "MismatchError", "DamagedFileError"),
    }
    assert {e.exit_code for e in exceptions} == {2, 3}
    error = InputError([Problem("wrong", "a.b", "x.yaml:3"), Problem("missing")])
    assert str(error) == "x.yaml:3: a.b -- wrong\nmissing"
    assert InputError("plain").problems == (Problem("plain"),)

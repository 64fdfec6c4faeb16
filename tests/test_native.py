"""How the CPU kernels come about: built, kept, verified, picked, checked at their entry; and how it goes without them."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qatrun.errors import InputError
from qatrun.numerics import (
    GRIDS,
    codes_to_grid,
    inverse_scale,
    native,
    native_build,
    quantize,
    rescale_,
    scale_gradient,
)

COMPILER = native_build.compiler()
ROOT = Path(__file__).resolve().parents[1]
OPTIMIZED = native_build.FLAGS
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
QUANTIZE = """
import torch
from qatrun.numerics import GRIDS, native, quantize
for _ in range(2):
    print(quantize(torch.tensor([1.04, 99.0]), torch.tensor(1.0), GRIDS["hif8"], None, values=torch.float32).values)
print(native.variant())
"""


def run(**changed: str) -> subprocess.CompletedProcess[str]:
    """Quantizes twice in a new process."""
    environment = os.environ | changed
    ran = subprocess.run([sys.executable, "-c", QUANTIZE], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[:2] == ["tensor([ 1., 96.])"] * 2
    return ran


@pytest.fixture(scope="module", autouse=True)
def quick_builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where only the way there is tested, nothing needs to be optimized, nor kept among what is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in OPTIMIZED))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    native.kernels.cache_clear()
    native._library.cache_clear()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return native_build.build(COMPILER, tmp_path_factory.mktemp("built"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str | None]]:
    """`native.variant()` as a new process would find it, the environment changed."""

    def variant(**changed: str) -> str | None:
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        native.kernels.cache_clear()
        native._library.cache_clear()
        return native.variant()

    yield variant
    native.kernels.cache_clear()
    native._library.cache_clear()


class TestCache:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: os.truncate(path, 20_000),
            lambda path: os.truncate(path, 0),
            lambda path: path.write_bytes(b"garbage" * 1000),
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
            lambda path: path.chmod(0),
        ],
        ids=["half", "empty", "garbage", "one byte", "unreadable"],
    )
    def test_a_damaged_library_is_built_again(
        self, damage: Callable[[Path], None], built: Path, tmp_path: Path, fresh: Callable[..., str | None]
    ) -> None:
        kept = tmp_path / "qatrun" / built.name
        kept.parent.mkdir()
        shutil.copy(built, kept)
        damage(kept)
        assert fresh(XDG_CACHE_HOME=str(tmp_path)) is not None
        assert kept.read_bytes() == built.read_bytes()
        assert [path.name for path in kept.parent.iterdir()] == [built.name]

    def test_one_made_from_another_source_is_left_alone(
        self, built: Path, tmp_path: Path, fresh: Callable[..., str | None]
    ) -> None:
        other = tmp_path / "qatrun" / f"native-{'0' * 16}-{'0' * 32}.so"
        other.parent.mkdir()
        other.write_bytes(b"older")
        assert fresh(XDG_CACHE_HOME=str(tmp_path)) is not None
        assert {path.name for path in other.parent.iterdir()} == {built.name, other.name}

    def test_a_kept_library_needs_no_compiler(
        self, built: Path, tmp_path: Path, fresh: Callable[..., str | None]
    ) -> None:
        (tmp_path / "qatrun").mkdir()
        shutil.copy(built, tmp_path / "qatrun")
        assert fresh(XDG_CACHE_HOME=str(tmp_path), CXX="", PATH="") is not None

    def test_one_beside_the_source_comes_first(
        self, built: Path, tmp_path: Path, fresh: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a wheel lays it."""
        source = shutil.copy(native_build.SOURCE, built.parent)
        monkeypatch.setattr(native_build, "SOURCE", Path(source))
        assert fresh(XDG_CACHE_HOME=str(tmp_path), CXX="false") is not None
        assert not list(tmp_path.iterdir())

    @needs_compiler
    def test_where_no_cache_can_be_written_temporary_files_serve(
        self, tmp_path: Path, fresh: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        assert fresh(XDG_CACHE_HOME=str(tmp_path / "file")) is not None
        (private,) = tmp_path.glob("qatrun-*")
        assert private.stat().st_mode & 0o777 == 0o700
        assert len(list(private.iterdir())) == 1

    @needs_compiler
    def test_a_temporary_folder_that_others_can_write_is_not_trusted(
        self, tmp_path: Path, fresh: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        (tmp_path / f"qatrun-{os.getuid()}").mkdir()
        (tmp_path / f"qatrun-{os.getuid()}").chmod(0o777)
        assert fresh(XDG_CACHE_HOME=str(tmp_path / "file")) is None

    def test_processes_that_build_at_once_do_no_harm(self, built: Path, tmp_path: Path) -> None:
        assert COMPILER is not None
        with ThreadPool(3) as pool:
            made = pool.starmap(native_build.build, [(COMPILER, tmp_path)] * 3)
        assert {path.read_bytes() for path in made} == {built.read_bytes()}
        assert list(tmp_path.iterdir()) == [tmp_path / built.name]


class TestCompiler:
    @pytest.mark.parametrize(
        "changed", [{"CXX": "/nonexistent/g++"}, {"CXX": "false"}, {"CXX": "", "PATH": ""}], ids=str
    )
    def test_without_one_the_reference_runs_and_one_line_says_so(
        self, changed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran = run(XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path), **changed)
        assert ran.stdout.splitlines()[2] == "None"
        (line,) = ran.stderr.splitlines()
        assert line.startswith("the CPU kernels cannot be built (")

    @pytest.mark.parametrize("command", ["env g++", "g++ -Wall -Wextra -Werror", "ccache g++", "clang++"])
    def test_any_command_will_do(
        self, command: str, tmp_path: Path, fresh: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if command == "clang++":  # the code that users get; g++'s is what all other tests run
            monkeypatch.setattr(native_build, "FLAGS", OPTIMIZED)
        if missing := [word for word in command.split() if word[0] != "-" and shutil.which(word) is None]:
            pytest.skip(f"no {missing[0]}")
        assert fresh(XDG_CACHE_HOME=str(tmp_path), CXX=command) is not None
        x = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
        for format, grid in GRIDS.items():
            made = quantize(x, torch.tensor(3.7), grid, None, values=torch.bfloat16, codes=True, blocked=True)
            assert_as_reference(made, x, format)

    def test_what_is_built_asks_for_no_instruction_set_and_no_openmp(self) -> None:
        assert not [flag for flag in OPTIMIZED if flag.startswith("-m") or flag == "-fopenmp"]


def assert_as_reference(made: Any, x: Tensor, format: str) -> None:
    from qatrun.numerics.passes import _quantize_reference

    expected = _quantize_reference(x, torch.tensor(3.7), format, None, torch.bfloat16, True, True)
    assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))


@needs_compiler
class TestVariant:
    def test_the_best_that_the_processor_runs(self, fresh: Callable[..., str | None]) -> None:
        torch_runs = torch.backends.cpu.get_cpu_capability()
        expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch_runs, "baseline")
        assert fresh() == os.environ.get("QATRUN_NATIVE", expected)

    @pytest.mark.parametrize("variant", native_build.variants())
    def test_the_environment_chooses(self, variant: str, fresh: Callable[..., str | None]) -> None:
        try:
            assert fresh(QATRUN_NATIVE=variant) == variant
        except InputError as refused:
            pytest.skip(str(refused))

    def test_torch_held_to_an_older_one_holds_the_kernels_too(self, fresh: Callable[..., str | None]) -> None:
        assert fresh(ATEN_CPU_CAPABILITY="default", QATRUN_NATIVE="") == "baseline"

    def test_off(self) -> None:
        ran = run(QATRUN_NATIVE="off")
        assert (ran.stdout.splitlines()[2], ran.stderr) == ("None", "")

    def test_one_that_there_is_not_is_an_error(self, fresh: Callable[..., str | None]) -> None:
        with pytest.raises(InputError, match=r"QATRUN_NATIVE=avx9: this processor runs .*baseline"):
            fresh(QATRUN_NATIVE="avx9")


ROWS, COLUMNS = 4, 6


def arguments(**changed: Any) -> dict[str, Any]:
    usual = {
        "x": torch.randn(ROWS, COLUMNS),
        "inv_scale": torch.ones(ROWS, 1),
        "codes": torch.zeros(5, dtype=torch.uint8),
        "row_scale": torch.ones(ROWS, 1),
        "column_scale": torch.ones(COLUMNS),
        "bias": torch.zeros(COLUMNS),
        "scale": torch.ones(()),
        "blocked": torch.zeros(3, dtype=torch.uint8),
    }
    return usual | changed


def call_all(of: dict[str, Any], x: Tensor | None = None) -> None:
    x = of["x"] if x is None else x
    quantize(x, of["inv_scale"], GRIDS["hif8"], None, values=torch.float32)
    codes_to_grid(of["codes"], GRIDS["hif8"], torch.float32)
    rescale_(x.clone(), of["row_scale"], of["column_scale"], of["bias"])
    scale_gradient(x, of["scale"], of["blocked"], torch.float32)


@pytest.mark.parametrize("with_kernels", [True, False])
class TestEntry:
    """A pass takes addresses and trusts sizes, so what does not fit must not come so far; nor may it without kernels."""

    @pytest.fixture(autouse=True)
    def kernels(self, with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not with_kernels:
            monkeypatch.setattr(native, "kernels", lambda: None)

    def test_what_fits(self) -> None:
        call_all(arguments())
        call_all(arguments(inv_scale=torch.ones(()), row_scale=torch.ones(()), column_scale=torch.ones(()), bias=None))
        call_all(arguments(blocked=None, row_scale=torch.ones(()).expand(ROWS, 1)))
        call_all(
            arguments(x=torch.zeros(0, COLUMNS), inv_scale=torch.zeros(0, 1), row_scale=torch.ones(0, 1), blocked=None)
        )
        call_all(
            arguments(
                x=torch.zeros(ROWS, 0), column_scale=torch.ones(0), bias=torch.ones(0), blocked=torch.zeros(0).byte()
            )
        )

    @pytest.mark.parametrize(
        ("name", "wrong", "error"),
        [
            (
                "inv_scale",
                torch.ones(0),
                "inv_scale must be torch.float32 of shape [] or [4, 1], got torch.float32 [0]",
            ),
            ("inv_scale", torch.ones(ROWS), "inv_scale must be torch.float32 of shape [] or [4, 1]"),
            ("inv_scale", torch.ones(ROWS - 1, 1), "inv_scale must be"),
            ("inv_scale", torch.ones((), dtype=torch.float64), "inv_scale must be torch.float32"),
            ("inv_scale", torch.ones((), dtype=torch.bfloat16), "inv_scale must be torch.float32"),
            ("codes", torch.zeros(5, dtype=torch.int8), "codes must be torch.uint8"),
            ("codes", torch.zeros(5), "codes must be torch.uint8"),
            ("row_scale", torch.ones(ROWS + 1, 1), "row_scale must be"),
            ("row_scale", torch.ones(0), "row_scale must be"),
            ("column_scale", torch.ones(COLUMNS - 1), "column_scale must be"),
            ("column_scale", torch.ones(COLUMNS, dtype=torch.float16), "column_scale must be"),
            ("bias", torch.ones(COLUMNS + 1), "bias must be torch.float32 of shape [6]"),
            ("scale", torch.ones(0), "scale must be"),
            ("scale", torch.ones(2), "scale must be"),
            ("blocked", torch.zeros(2, dtype=torch.uint8), "blocked must be torch.uint8 of shape [3]"),
            ("blocked", torch.zeros(3, dtype=torch.bool), "blocked must be torch.uint8"),
        ],
    )
    def test_what_does_not(self, name: str, wrong: Tensor, error: str) -> None:
        with pytest.raises((TypeError, ValueError)) as raised:
            call_all(arguments(**{name: wrong}))
        assert str(raised.value).startswith(error)


@needs_compiler
class TestPlainTensors:
    """Values of other tensors lie elsewhere, or nowhere."""

    def test_a_subclass_goes_the_reference_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Sub(Tensor):
            pass

        x = torch.randn(ROWS, COLUMNS).as_subclass(Sub)
        expected = quantize(x.as_subclass(Tensor), torch.ones(()), GRIDS["hif8"], None, values=torch.float32)
        monkeypatch.setattr(native, "kernels", lambda: pytest.fail("its address was asked for"))
        made = quantize(x, torch.ones(()), GRIDS["hif8"], None, values=torch.float32)
        assert made.values is not None
        assert torch.equal(made.values.as_subclass(Tensor), expected.values)

    def test_a_fake_tensor_goes_the_reference_way(self) -> None:
        with FakeTensorMode():
            x = torch.randn(ROWS, COLUMNS)
            made = quantize(x, inverse_scale(torch.ones(())), GRIDS["hif8"], None, values=torch.float32)
        assert made.values is not None
        assert (type(made.values), made.values.shape) == (type(x), x.shape)

    def test_a_negated_view_is_read_as_it_is(self) -> None:
        x = torch.randn(8, dtype=torch.complex64).conj().imag
        assert x.is_neg()
        made = quantize(x, torch.ones(()), GRIDS["int8"], None, values=torch.float32)
        assert made.values is not None
        assert torch.equal(made.values, x.resolve_neg().round() + 0.0)

    def test_parameters_are_plain(self) -> None:
        assert native.is_plain(torch.nn.Parameter(torch.ones(2)))


class TestWheel:
    """What `hatch_build.py` puts into a wheel; a stand-in for the compiler, since what it makes is tested above."""

    def built(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, version: str
    ) -> tuple[Any, list[str]]:
        pytest.importorskip("hatchling")
        monkeypatch.syspath_prepend(str(ROOT))
        hook_of = importlib.import_module("hatch_build").KernelsBuildHook
        stand_in = tmp_path / "cxx"
        stand_in.write_text(f"#!/bin/sh\n{script}\n")
        stand_in.chmod(0o755)
        monkeypatch.setenv("CXX", str(stand_in))
        said: list[str] = []
        app = SimpleNamespace(display_warning=said.append)
        hook = hook_of(str(ROOT), {}, None, None, str(tmp_path), "wheel", app)
        build_data: dict[str, Any] = {"force_include": {}}
        hook.initialize(version, build_data)
        assert all(Path(file).is_file() for file in build_data["force_include"])
        hook.finalize(version, build_data, "")
        assert not any(Path(file).exists() for file in build_data["force_include"])
        return build_data, said

    def test_with_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = 'for last; do :; done; echo made > "$last"'
        build_data, said = self.built(tmp_path, monkeypatch, script, "standard")
        (place,) = build_data["force_include"].values()
        assert place.startswith("qatrun/numerics/native-")
        assert build_data["tag"].startswith("py3-none-")
        assert (build_data["pure_python"], said) == (False, [])

    def test_without_one_the_wheel_is_a_pure_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build_data, said = self.built(tmp_path, monkeypatch, "echo it does not work >&2; exit 1", "standard")
        assert build_data == {"force_include": {}}
        assert said == ["this wheel carries no CPU kernels, they are built at first use: it does not work"]

    def test_an_editable_install_carries_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.built(tmp_path, monkeypatch, "exit 1", "editable") == ({"force_include": {}}, [])

"""Fixtures shared by all tests. Data that is not in the repository is optional: tests that want it skip without it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from qatrun.numerics import Quantized

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Threads that wait for a core cost more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
# As the benchmarks do, and why: scripts/benchmarks/__init__.py.
_COMPILED = f"qatrun-inductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}-{os.getuid()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / _COMPILED))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real models, texts and benchmark questions (QATRUN_SHARED, or `shared` beside the checkout)."""
    folder = Path(os.environ.get("QATRUN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "models" / "gut3m").is_dir():
        pytest.skip(f"needs real models and data; none at {folder}")
    return folder


@pytest.fixture(scope="session")
def trained_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny_world` with two finished studies, to look at only: `tiny` (bf16, hif8), then `ruined` (bf16, ruined)."""
    from tiny_world import RUINED_ARM, run_qatrun, write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    for arguments in ((), ("--set", "name=ruined", "--set", RUINED_ARM)):
        ran = run_qatrun("train", "tiny.yaml", *arguments, cwd=folder)
        assert ran.code == 0, ran.err
        (folder / f"{ran.out.splitlines()[-1].split('/')[-1]}.log").write_text(ran.out, encoding="utf-8")
    return folder


@pytest.fixture
def world(trained_world: Path, tmp_path: Path) -> Path:
    """A copy of `trained_world` that a test may change."""
    folder = tmp_path / "world"
    shutil.copytree(trained_world, folder)
    return folder


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own for `datasets`, which else keeps every file of every test in the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that more threads only slow them down."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes_made(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How often a tensor of each shape was quantized."""
    from qatrun.quant import qtensor

    made: Counter[tuple[int, ...]] = Counter()
    original = qtensor.quantize

    def counting(x: Tensor, *args: Any, **settings: Any) -> Quantized:
        made[tuple(x.shape)] += 1
        return original(x, *args, **settings)

    monkeypatch.setattr(qtensor, "quantize", counting)
    return made

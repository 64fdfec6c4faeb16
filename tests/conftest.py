"""Fixtures shared by all tests. Data that is not in the repository is optional: tests that want it skip without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real models, texts and benchmark questions (QATRUN_SHARED, or `shared` beside the checkout)."""
    folder = Path(os.environ.get("QATRUN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "models" / "gut3m").is_dir():
        pytest.skip(f"needs real models and data; none at {folder}")
    return folder

"""What a test needs to be compiled."""

from __future__ import annotations

import os
import shlex
import shutil

import pytest

needs_compiler = pytest.mark.skipif(
    shutil.which(next(iter(shlex.split(os.environ.get("CXX", "")) or ["g++"]))) is None,
    reason="torch.compile on a CPU needs a C++ compiler",
)

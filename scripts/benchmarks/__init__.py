"""Benchmarks of quantization-aware training: every number a ratio of things that were measured in one run.

timing    interleaved rounds, and the rows they become
arms      the models compared: unquantized, qatrun's formats, torchao's QAT
kernel, step, memory, scoring, startup, scaling    one benchmark each: settings -> rows
worker    what must run in a process of its own
report    tables on screen, JSON and Markdown, and the bands that ratios must stay in
"""

import logging
import os
import tempfile
from pathlib import Path

# Inductor's cache does not tell apart the instruction sets that torch is held to: what was generated for AVX2 and is then
# compiled for AVX-512 writes past the end of a tensor. To be set before torch, which reads it when imported.
_COMPILED = f"qatrun-inductor-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}-{os.getuid()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / _COMPILED))

# transformers imports torchao where it is installed, which then reports each of its GPU libraries that cannot be loaded.
logging.disable(logging.ERROR)
import transformers.quantizers.auto  # noqa: E402, F401

logging.disable(logging.NOTSET)

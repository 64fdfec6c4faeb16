"""Benchmarks of quantization-aware training: every number a ratio of things that were measured in one run.

timing    interleaved rounds, and the rows they become
arms      the models compared: unquantized, qatrun's formats, torchao's QAT
kernel, step, memory, scoring, startup, scaling    one benchmark each: settings -> rows
worker    what must run in a process of its own
report    tables on screen, JSON and Markdown, and the bands that ratios must stay in
"""

import logging

# transformers imports torchao where it is installed, which then reports each of its GPU libraries that cannot be loaded.
logging.disable(logging.ERROR)
import transformers.quantizers.auto  # noqa: E402, F401

logging.disable(logging.NOTSET)

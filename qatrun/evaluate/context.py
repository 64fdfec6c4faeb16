"""What a model, and the process, look like while a model is scored, and how they are put back."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import datasets
import lm_eval.api.task
import numpy as np
import torch
from torch import nn

from qatrun.numerics import bfloat16_products

# The seeds that lm-eval's command line sets by default.
PYTHON_SEED, NUMPY_SEED, TORCH_SEED, FEWSHOT_SEED = 0, 1234, 1234, 1234


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, its bfloat16 products made as suits this CPU; afterwards every module is in the mode it
    was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with bfloat16_products():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the global generators as lm-eval does; afterwards they are as they were: scoring disturbs no training."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    torch.default_generator.manual_seed(TORCH_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's log and tokenizer warnings below errors, and all progress bars but ours, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    levels = [logger.level for logger in loggers]
    bars, task_bar = datasets.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(task_bar, disable=True)  # it offers no switch
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = task_bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()

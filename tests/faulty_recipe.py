"""A recipe without mistakes to make some in, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qatrun.errors import RecipeError
from qatrun.recipe import load_recipe

RECIPE = """\
name: study
model: {path: m}
data: {train: {path: d}}
train:
  steps: 1000
qat:
  format: hif8
arms:
  bf16: {qat: null}
  hif8: {}
eval: {tasks: {mmlu: 5, hellaswag: 10}}
"""


def lines_of(text: str, overrides: Sequence[str] = ()) -> list[str]:
    """Every line of the error, the recipe being r.yaml in the working folder."""
    Path("r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()

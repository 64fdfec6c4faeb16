"""Quantization-aware-training recipes for language models, and what quantization really cost.

    qatrun.run("recipe.yaml")                       # what `qatrun train` does -> StudyResult
    model, tokenizer = qatrun.load("runs/demo/hif8")  # quantizers on, scales frozen
    plan = qatrun.make_plan(model, qatrun.QatConfig(format="hif8"))
    state = qatrun.attach(model, plan)              # fake-quantized linears on the same parameters
    qatrun.detach(model)                            # and the very modules that were there before

Names are resolved when first used, so that importing qatrun imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from qatrun.lazy import lazy_names

if TYPE_CHECKING:
    from qatrun.export.artifact import load
    from qatrun.numerics import fake_quantize
    from qatrun.quant import attach, detach, freeze, make_plan
    from qatrun.recipe import QatConfig, load_recipe
    from qatrun.study import StudyResult, run

__version__ = version("qatrun")
__all__ = [
    "QatConfig",
    "StudyResult",
    "__version__",
    "attach",
    "detach",
    "fake_quantize",
    "freeze",
    "load",
    "load_recipe",
    "make_plan",
    "run",
]

_HOMES = {
    "QatConfig": "qatrun.recipe",
    "StudyResult": "qatrun.study",
    "attach": "qatrun.quant",
    "detach": "qatrun.quant",
    "fake_quantize": "qatrun.numerics",
    "freeze": "qatrun.quant",
    "load": "qatrun.export.artifact",
    "load_recipe": "qatrun.recipe",
    "make_plan": "qatrun.quant",
    "run": "qatrun.study",
}
_SUBMODULES = {"formats", "numerics"}
_resolve = lazy_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"qatrun.{name}")
    return _resolve(name)

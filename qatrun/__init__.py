"""Quantization-aware-training recipes for language models, and what quantization really cost.

    qatrun.run("recipe.yaml")                       # what `qatrun train` does -> StudyResult
    model, tokenizer = qatrun.load("runs/demo/hif8")  # quantizers on, scales frozen
    plan = qatrun.make_plan(model, qatrun.QatConfig(format="hif8"))
    state = qatrun.attach(model, plan)              # fake-quantized linears on the same parameters
    qatrun.calibrate(model, batches)                # scales from these batches; to train, state.begin_quantizing()
    qatrun.detach(model)                            # and the very modules that were there before

Names are resolved when first used, so that importing qatrun imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from qatrun.lazy import lazy_names
from qatrun.on_import import when_imported

if TYPE_CHECKING:
    from qatrun import errors, formats, numerics
    from qatrun.export.artifact import load, save
    from qatrun.numerics import fake_quantize
    from qatrun.quant import Mode, attach, calibrate, detach, freeze, make_plan
    from qatrun.recipe import QatConfig, load_recipe, parse_recipe
    from qatrun.study import StudyResult, run
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "qatrun": ("errors", "formats", "numerics"),
            "qatrun.export.artifact": ("load", "save"),
            "qatrun.numerics": ("fake_quantize",),
            "qatrun.quant": ("Mode", "attach", "calibrate", "detach", "freeze", "make_plan"),
            "qatrun.recipe": ("QatConfig", "load_recipe", "parse_recipe"),
            "qatrun.study": ("StudyResult", "run"),
        },
    )

# `from_pretrained` opens quantized folders.
when_imported("transformers.quantizers.auto", lambda auto: import_module("qatrun.pretrained").register(auto))

__version__ = version("qatrun")
__all__ = [
    "Mode",
    "QatConfig",
    "StudyResult",
    "__version__",
    "attach",
    "calibrate",
    "detach",
    "errors",
    "fake_quantize",
    "formats",
    "freeze",
    "load",
    "load_recipe",
    "make_plan",
    "numerics",
    "parse_recipe",
    "run",
    "save",
]


def __dir__() -> list[str]:
    return __all__

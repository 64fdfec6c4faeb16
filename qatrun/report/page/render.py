"""A document as one HTML file that needs nothing else: style, script and drawings are inside it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qatrun.report.page.document import Document
from qatrun.report.page.heatmap import DARK, LIGHT
from qatrun.report.page.scores import VARIANTS
from qatrun.report.page.table import printable, shown
from qatrun.report.page.theme import NUM_ARM_COLORS, arm_glyph

# Columns of words, and those of numbers that are written out as text.
LEFT_ALIGNED = {
    *("arm", "arms", "twin", "task", "score", "metric", "verdict", "effect", "from", "to", "kind", "alarm", "tensor"),
    *("worst tensor", "findings", "quantized linears", "blocks", "role", "format", "granularity", "scaling"),
    *("clipped at", "contrast", "a", "b", "answer", "the last one kept", "advice", "keep"),
}
LONG_TEXT = {"answer", "findings", "advice"}
NUMERIC_TEXT = {
    *("start", "BF16 twin", "on", "off", "drop pp", "95% interval", "flips", "relative drop %", "McNemar p"),
    *("detects pp", "mean |Δll|", "accuracy % mean", "sd", "sd pp", "loss APE %", "perplexity", *VARIANTS.values()),
    *("|x| / scale from", "to"),
}

_WITHIN_NAMES = re.compile(r"(?<=\w[._:/])(?=[^\W\d])")


def render(document: Document) -> str:
    """The page.

    Every name and text is escaped. Should one slip through, the page's own content security policy still lets no script
    run but the one that is shipped, known by its hash, and lets nothing be loaded.
    """
    environment = _environment()
    script = _source("hover.js")
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{_sha256(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("page.html.j2").render(
        document=document,
        style=Markup(style_sheet()),
        script=Markup(script),
        policy=policy,
        heat={"light": LIGHT, "dark": DARK},
        num_colors=NUM_ARM_COLORS,
        left=LEFT_ALIGNED,
        numeric=NUMERIC_TEXT,
        long=LONG_TEXT,
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("qatrun.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "printable": printable,
        "breakable": breakable,
        "glyph": arm_glyph,
        "drawing": Markup,  # SVG that `svg.themed` serialised, text escaped
        "json_in_script": lambda text: Markup(text.replace("<", "\\u003c")),
    }
    return environment


def style_sheet() -> str:
    """Of every page."""
    return _source("style.css")


def breakable(text: str) -> Markup:
    """Escaped text that may break within the dotted names of tensors and keys."""
    return Markup(_WITHIN_NAMES.sub("<wbr>", str(escape(text))))


def _source(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

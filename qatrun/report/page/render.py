"""A document as one HTML file that needs nothing else: style, script and drawings are inside it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from qatrun.report.page.document import Document
from qatrun.report.page.glossary import GLOSSARY, explained
from qatrun.report.page.heatmap import DARK, LIGHT
from qatrun.report.page.table import printable, shown
from qatrun.report.page.theme import NUM_ARM_COLORS, arm_glyph

MOST_PACKED = 120_000  # characters of a CSV file inside the page
LONG_TEXT = {"answer", "findings", "item", "seen on", "advice"}
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
        long=LONG_TEXT,
        glossary=GLOSSARY,
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
        "plainly": lambda text: explained(text, breakable(text)),
        "explained": explained,
        "packed": packed,
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


def packed(text: str) -> str:
    """A CSV text as an address that needs no file, so that it is mailed with the page; empty where it is large."""
    data = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return f"data:application/gzip;base64,{data}" if len(data) <= MOST_PACKED else ""


def _source(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

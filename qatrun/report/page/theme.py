"""Colours and type of all figures.

Matplotlib wants colours as numbers, the page decides them by light and dark. So figures are drawn in stand-ins, one for
each role that a colour has, and `svg.py` turns every stand-in into the style sheet's variable of that role.
"""

from __future__ import annotations

from typing import Any

INK, MUTED, RULE, GOOD, WARN, BAD = (f"#0101{number:02x}" for number in range(1, 7))
NUM_ARM_COLORS = 8
_ARM_COLORS = tuple(f"#0102{number:02x}" for number in range(NUM_ARM_COLORS))

VARIABLES: dict[str, str] = {
    **dict(zip((INK, MUTED, RULE, GOOD, WARN, BAD), ("ink", "muted", "rule", "good", "warn", "bad"), strict=True)),
    **{color: f"arm-{number}" for number, color in enumerate(_ARM_COLORS)},
}

# matplotlib's marker, and the character that looks like it in a legend.
_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("*", "★"))

TEXT_PX = 11.5
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": TEXT_PX,
    "axes.titlesize": TEXT_PX,
    "axes.labelsize": TEXT_PX,
    "xtick.labelsize": TEXT_PX,
    "ytick.labelsize": TEXT_PX,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 7,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-5, 9),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "lines.markeredgewidth": 0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72,
    "savefig.dpi": 72,
}


def arm_color(index: int) -> str:
    """Stand-in of an arm's colour."""
    return _ARM_COLORS[index % NUM_ARM_COLORS]


def arm_marker(index: int) -> str:
    """Matplotlib marker of an arm; arms that share a colour, the ninth with the first, differ in it."""
    return _MARKERS[_marker_index(index)][0]


def arm_glyph(index: int) -> str:
    """The same marker as a character."""
    return _MARKERS[_marker_index(index)][1]


def _marker_index(index: int) -> int:
    return (index + index // NUM_ARM_COLORS) % len(_MARKERS)

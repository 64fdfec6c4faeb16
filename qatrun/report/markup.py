"""A table as Markdown or LaTeX, for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "±": r"$\pm$",
    "−": "$-$",
}


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table; columns of numbers to the right."""
    right = _numeric(rows)
    rule = ["---:" if number else "---" for number in right]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = (cells[0], rule, *cells[1:])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A `tabular` of the booktabs package (\usepackage{booktabs})."""
    layout = "".join("r" if number else "l" for number in _numeric(rows))
    body = [" & ".join(map(_escaped, row)) + r" \\" for row in (columns, *rows)]
    lines = [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Of each column, whether it holds nothing but numbers, intervals and blanks."""
    number = re.compile(r"(|-|[+−-]?\d[\d.,]*.*)")
    return [all(number.fullmatch(cell) for cell in column) for column in zip(*rows, strict=True)]


def _escaped(text: str) -> str:
    cells = re.sub(r"(?<![\w])-(?=\d)", "−", text)
    return "".join(_LATEX.get(character, character) for character in cells)

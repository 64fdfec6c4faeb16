"""Matplotlib's SVG made fit for a page: themed, small, safe beside others, with what the pointer reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from qatrun.report.page.theme import VARIABLES

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
HREF = f"{{{XLINK}}}href"
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_COLOR = re.compile("|".join(VARIABLES))
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
# What the style sheet says once for all figures.
_DROPPED_STYLES = {"font-family", "stroke-miterlimit", "stroke-linejoin", "stroke-linecap"}

ET.register_namespace("", SVG)
ET.register_namespace("xlink", XLINK)


@dataclass(frozen=True)
class Picture:
    """A bitmap behind the axes, in the drawing's pixels; as data URIs for light and for dark."""

    left: float
    top: float
    width: float
    height: float
    light: str
    dark: str


def themed(source: str, prefix: str, label: str, titles: Mapping[str, str], pictures: Sequence[Picture] = ()) -> str:
    """Inline SVG from what matplotlib wrote.

    Args:
        prefix: put before every id, so that figures on one page do not reach into each other.
        label: what a screen reader says.
        titles: gid of an artist -> text shown when the pointer rests on it.
    """
    root = ET.fromstring(source)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    _add_titles(root, titles)
    _scope_ids(root, prefix)
    for element in root.iter():
        _slim(element)
    for place, picture in enumerate(pictures):
        _insert(root, picture, place)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ET.tostring(root, encoding="unicode")


def standalone(svg: str, style: str) -> str:
    """An inline drawing as a file of its own, in the colours and type of the page.

    Args:
        style: the page's style sheet, which opens with its colours, light and dark.
    """
    root = ET.fromstring(svg)
    colours = re.match(r"(?s):root \{.*?\}\n@media screen[^{]*\{\s*:root \{.*?\}\s*\}", style)
    sheet = ET.Element(f"{{{SVG}}}style")
    sheet.text = f"{colours.group() if colours else ''}\nsvg {{ background: var(--paper); font-family: sans-serif }}"
    root.insert(0, sheet)
    return ET.tostring(root, encoding="unicode")


def _add_titles(root: ET.Element, titles: Mapping[str, str]) -> None:
    for element in list(root.iter()):
        text = titles.get(element.get("id", ""))
        if text is not None:
            title = ET.Element(f"{{{SVG}}}title")
            title.text = text
            element.insert(0, title)
            element.set("class", "mark")


def _scope_ids(root: ET.Element, prefix: str) -> None:
    used = {target for element in root.iter() for target in _references(element)}
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in used:
            element.set("id", f"{prefix}-{name}")
        for key, value in element.attrib.items():
            if key == HREF:
                element.set(key, f"#{prefix}-{value.removeprefix('#')}")
            elif key != "id":
                element.set(key, _REFERENCE.sub(rf"url(#{prefix}-\1)", value))


def _references(element: ET.Element) -> set[str]:
    found = {target for value in element.attrib.values() for target in _REFERENCE.findall(value)}
    return found | {element.attrib[HREF].removeprefix("#")} if HREF in element.attrib else found


def _slim(element: ET.Element) -> None:
    """Two decimals of a pixel are enough, colours are variables, and white space between elements is none."""
    element.text = element.text if element.text and element.text.strip() else None
    element.tail = None
    for key in ("d", "x", "y", "width", "height", "transform"):
        if key in element.attrib:
            element.set(key, _NUMBER.sub(lambda found: f"{float(found.group()):.2f}", element.attrib[key]).strip())
    if "style" in element.attrib:
        parts = (part.split(":", 1) for part in element.attrib["style"].split(";") if ":" in part)
        kept = [f"{key.strip()}:{value.strip()}" for key, value in parts if key.strip() not in _DROPPED_STYLES]
        element.set("style", _COLOR.sub(lambda found: f"var(--{VARIABLES[found.group()]})", ";".join(kept)))


def _insert(root: ET.Element, picture: Picture, place: int) -> None:
    box = {"x": picture.left, "y": picture.top, "width": picture.width, "height": picture.height}
    for theme, data in (("light", picture.light), ("dark", picture.dark)):
        image = ET.Element(f"{{{SVG}}}image", {key: f"{value:.2f}" for key, value in box.items()})
        image.attrib |= {"href": data, "class": f"pixels {theme}", "preserveAspectRatio": "none"}
        root.insert(place, image)

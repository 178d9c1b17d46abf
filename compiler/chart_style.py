"""How charts look, and how they become SVG: files of their own, or parts of a page.

Matplotlib takes about a second to import, so functions import what they need of it. Nothing here
or in the charts uses pyplot, which keeps state.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that most kinds of colour blindness tell apart (Okabe and Ito, 2008).
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#707070"
GRID = "#e0e0e0"
POINTS_PER_INCH = 72

_STYLE: Mapping[str, object] = {
    "axes.titlesize": 11,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same sizes everywhere
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "qnpu",
    "text.parse_math": False,
}

# In a page, text and axes take its colours. This one, which nothing else has, stands for them.
_INK = "#1b1e23"
_INK_SETTINGS = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
_PAGE_STYLE: Mapping[str, object] = {
    **dict.fromkeys(_INK_SETTINGS, _INK),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
_PAGE_COLOURS = {
    _INK: "currentColor",
    BLUE: "var(--blue)",
    VERMILION: "var(--vermilion)",
    GREEN: "var(--green)",
    GREY: "var(--muted)",
    GRID: "var(--grid)",
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@contextmanager
def drawing(more: Mapping[str, object] = MappingProxyType({})) -> Iterator[None]:
    """Settings for all that is drawn and saved inside, whatever the user's are."""
    import matplotlib.style  # noqa: PLC0415

    settings = {**_STYLE, **more}
    with matplotlib.style.context(["default", settings]), warnings.catch_warnings():
        # Text stays text: a glyph that this font lacks is for the viewer's fonts to have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save_svg(figure: Figure, path: Path, title: str, description: str) -> None:
    """Writes a figure as a file, cut to what is drawn; the same figure, the same bytes."""
    metadata = {"Title": title, "Description": description, "Creator": "qnpu", "Date": None}
    figure.savefig(path, format="svg", bbox_inches="tight", metadata=metadata)


def inline_svg(
    draw: Callable[[], Figure], key: str, title: str, description: str, *, cut: bool = False
) -> str:
    """A figure as an ``<svg>`` element for an HTML page; the same figure, the same text.

    It takes the page's text colour, and its custom properties ``--blue``, ``--vermilion``,
    ``--green``, ``--muted``, ``--grid`` and ``--page``; all identifiers begin with ``key``.

    Args:
        draw: makes the figure.
        key: of letters, digits and hyphens; differs between charts of a page.
        title: what a screen reader calls it.
        description: what it says of it.
        cut: to what is drawn, where that may lie outside of the figure.
    """
    buffer = io.BytesIO()
    with drawing(_PAGE_STYLE):
        edge = "tight" if cut else None
        draw().savefig(buffer, format="svg", bbox_inches=edge, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for child in [item for item in root if item.tag in (f"{_SVG}metadata", f"{_SVG}title")]:
        root.remove(child)
    for item in root.iter():
        for style in item.findall(f"{_SVG}style"):  # it would hold for all of the page
            item.remove(style)
    for item in root.iter():
        _adapt(item, key)
    for tag, text in (("desc", description), ("title", title)):
        element = ElementTree.Element(tag, id=f"{key}-{tag}")
        element.text = text
        root.insert(0, element)
    box = root.get("viewBox", "")
    width, height = box.split()[2:]
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-labelledby": f"{key}-title",
        "aria-describedby": f"{key}-desc",
        "width": f"{float(width) * 96 / POINTS_PER_INCH:.0f}",
        "height": f"{float(height) * 96 / POINTS_PER_INCH:.0f}",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(item: ElementTree.Element, key: str) -> None:
    """Tag without namespace, identifiers of their own, colours of the page, fewer digits."""
    item.tag = item.tag.removeprefix(_SVG)
    if _LINK in item.attrib:
        item.attrib["href"] = item.attrib.pop(_LINK)
    for name, whole in item.attrib.items():
        value = whole.replace("url(#", f"url(#{key}-")
        if name == "id":
            item.attrib[name] = f"{key}-{value}"
        elif name == "href":
            item.attrib[name] = f"#{key}-{value.removeprefix('#')}"
        elif name == "style":
            item.attrib[name] = _recoloured(value)
        elif name in ("d", "transform", "x", "y", "width", "height"):
            item.attrib[name] = re.sub(r"(\.\d{2})\d+", r"\1", " ".join(value.split()))
        else:
            item.attrib[name] = value
    item.tail = None
    if item.text is not None and not item.text.strip():
        item.text = None


def _recoloured(style: str) -> str:
    style = style.replace("stroke: #ffffff", "stroke: var(--page)")
    return re.sub(r"#[0-9a-f]{6}", lambda found: _PAGE_COLOURS.get(found[0], found[0]), style)

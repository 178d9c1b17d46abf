"""Charts as parts of a page: its colours, identifiers of their own, and nothing for all of it."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from qnpu.compiler.chart_style import BLUE, drawing, inline_svg, save_svg

AWKWARD = '<b> & "quoted" é 漢字'


def figure() -> Figure:
    made = Figure(figsize=(3, 2))
    axes = made.add_subplot()
    axes.plot([0, 1], [1, 2], color=BLUE, marker="o")
    axes.bar([0.5], [1.5], color="#123456", edgecolor="white")
    axes.set_title(AWKWARD)
    return made


def inline(key: str = "one", *, cut: bool = False) -> str:
    return inline_svg(figure, key, AWKWARD, "what it shows", cut=cut)


def test_colours_are_those_of_the_page() -> None:
    text = inline()
    assert "fill: currentColor" in text and "stroke: currentColor" in text
    assert "var(--blue)" in text and BLUE not in text
    assert "stroke: var(--page)" in text
    assert "fill: #123456" in text  # what the page has no name for stays
    assert "#ffffff" not in text and "#000000" not in text


def test_name_and_description_come_first() -> None:
    root = ElementTree.fromstring(inline())
    assert [(child.tag, child.text) for child in root][:2] == [
        ("title", AWKWARD),
        ("desc", "what it shows"),
    ]
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == root[0].attrib["id"]
    assert root.attrib["aria-describedby"] == root[1].attrib["id"]
    assert any(item.text == AWKWARD for item in root.iter("text"))


def test_two_charts_share_no_identifier() -> None:
    first, second = (ElementTree.fromstring(inline(key)) for key in ("one", "two"))
    ids = [{item.get("id") for item in root.iter()} - {None} for root in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    for root, known in zip((first, second), ids, strict=True):
        for item in root.iter():
            for value in item.attrib.values():
                assert set(re.findall(r"url\(#([^)]*)\)", value)) <= known
            if "href" in item.attrib:
                assert item.attrib["href"].removeprefix("#") in known


def test_nothing_is_meant_for_the_rest_of_the_page() -> None:
    text = inline()
    assert "<style" not in text and "<metadata" not in text and "xmlns" not in text
    assert "http" not in text


@pytest.mark.parametrize("cut", [False, True])
def test_size_in_pixels(cut: bool) -> None:
    root = ElementTree.fromstring(inline(cut=cut))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    found = [float(root.attrib[side]) for side in ("width", "height")]
    assert found == pytest.approx([width * 4 / 3, height * 4 / 3], abs=0.5)
    if not cut:
        assert found == [288, 192]


def test_the_same_figure_gives_the_same_text() -> None:
    assert inline() == inline()


def test_a_file_keeps_its_own_colours(tmp_path: Path) -> None:
    with drawing():
        save_svg(figure(), tmp_path / "chart.svg", "title", "description")
    text = (tmp_path / "chart.svg").read_text("utf-8")
    assert BLUE in text and "var(" not in text and "currentColor" not in text
    assert "<title>title</title>" in text and "description" in text

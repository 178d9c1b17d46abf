"""report.html by its structure: what is in it, what is not, and that names do no harm."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import pytest

from qnpu.compiler.output import write_json
from qnpu.compiler.report_page import page, write_page
from qnpu.compiler.report_parts import STATES
from qnpu.compiler.rules import manual_page
from tests.reports import (
    FLOAT,
    KINDS,
    LSB_COUNTS,
    QUANTIZED,
    ROLES,
    Report,
    bits,
    failed_parity,
    legalized_report,
    report,
)

VOID = {"meta", "link", "br", "hr", "img", "input"}
CHARTS = ["chart-bits", "chart-losses", "chart-promotion", "chart-sqnr", "chart-histogram-0",
          "chart-histogram-1", "chart-learning", "chart-blocks", "chart-block-curves",
          "chart-front", "chart-parity"]  # fmt: skip
AWKWARD = [
    "</title></script><script>alert(1)</script>",
    '"\' onload=alert(1) x="',
    "<svg/onload=alert(1)>&amp;&lt;",
    "漢字 é 🙂 \u202e backwards",
    "a\x00b\x07c\ud800d\x85e",
    "n" * 10_000,
    "{{ 7 * 7 }}{% raw %}",
    "$x^2$ ``code`` ```",
    "",
]


@dataclass
class Item:
    """An element."""

    tag: str
    attributes: dict[str, str | None]
    parent: Item | None
    content: list[Item | str] = field(default_factory=list)

    @property
    def children(self) -> list[Item]:
        return [child for child in self.content if isinstance(child, Item)]

    def every(self, *tags: str) -> Iterator[Item]:
        for child in self.children:
            if not tags or child.tag in tags:
                yield child
            yield from child.every(*tags)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.content)


class Reader(HTMLParser):
    """Builds a tree; every end tag must fit."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.open = Item("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        item = Item(tag, dict(attrs), self.open)
        assert len(item.attributes) == len(attrs)
        self.open.content.append(item)
        if tag not in VOID:
            self.open = item

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.content.append(Item(tag, dict(attrs), self.open))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.tag
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, data: str) -> None:
        self.open.content.append(data)


def read(text: str) -> Item:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open is reader.root
    return reader.root


@lru_cache
def text_of(make: Callable[[], Report]) -> str:
    return page(make())


@lru_cache
def tree_of(make: Callable[[], Report]) -> Item:
    return read(text_of(make))


@pytest.fixture(scope="module")
def whole() -> Item:
    return tree_of(report)


def light() -> Report:
    """A report of which little is drawn."""
    drawn = ("sensitivities", "learning", "tensors", "histograms", "parity")
    what = report() | dict.fromkeys(drawn)
    what["search"]["tensors"] = []
    return what


def by_id(root: Item) -> dict[str, Item]:
    return {str(item.attributes["id"]): item for item in root.every() if "id" in item.attributes}


def charts(root: Item) -> list[str]:
    svgs = [item for item in root.every("svg") if item.attributes.get("role") == "img"]
    return [str(item.attributes["aria-labelledby"]).removesuffix("-title") for item in svgs]


def section(root: Item, key: str) -> Item:
    return by_id(root)[key]


def rows(item: Item, caption: str) -> list[list[str]]:
    (table,) = [
        table
        for table in item.every("table")
        if next(table.every("caption")).text.strip() == caption
    ]
    return [[cell.text for cell in row.children] for row in table.every("tr")]


def states(root: Item) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(section(root, "summary"), "Checks")[1:]}


# -------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("make", [report, legalized_report, failed_parity, dict])
def test_structure(make: Callable[[], Report]) -> None:
    root = tree_of(make)
    every = list(root.every())
    (html,) = root.every("html")
    assert html.attributes["lang"] == "en"
    assert [len(list(root.every(tag))) for tag in ("main", "header", "footer", "nav", "h1")] == [
        1
    ] * 5
    ids = [item.attributes["id"] for item in every if "id" in item.attributes]
    assert [name for name, times in Counter(ids).items() if times > 1] == []
    levels = [int(item.tag[1]) for item in every if re.fullmatch("h[1-6]", item.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(item.text.strip() for item in every if re.fullmatch("h[1-6]", item.tag))
    first = next(root.every("a"))
    assert first.attributes["href"] == "#main" and "skip" in str(first.attributes["class"])
    assert all(int(item.attributes.get("tabindex") or 0) <= 0 for item in every)


@pytest.mark.parametrize("make", [report, legalized_report, failed_parity])
def test_references_resolve(make: Callable[[], Report]) -> None:
    root = tree_of(make)
    known = set(by_id(root))
    for item in root.every():
        target = item.attributes.get("href")
        if target is not None and item.tag != "link":
            assert target.startswith("#") and target[1:] in known
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((item.attributes.get(name) or "").split()) <= known
        for value in item.attributes.values():
            assert set(re.findall(r"url\(#([^)]*)\)", value or "")) <= known


def test_nothing_is_loaded_and_nothing_runs(whole: Item) -> None:
    text = text_of(report)
    assert not re.search(r"https?:|@import|@font-face|javascript:", text)
    assert {item.tag for item in whole.every()}.isdisjoint(
        {"script", "iframe", "object", "embed", "img", "form"}
    )
    for item in whole.every():
        assert not [name for name in item.attributes if name.startswith("on") or name == "src"]


def test_every_chart_has_a_name_and_its_data(whole: Item) -> None:
    assert charts(whole) == CHARTS
    known = by_id(whole)
    for key in CHARTS:
        title, description = known[f"{key}-title"], known[f"{key}-desc"]
        assert (title.tag, description.tag) == ("title", "desc")
        assert title.text.strip() and description.text.strip()
    for figure in whole.every("figure"):
        (details,) = figure.every("details")
        assert details.children[0].tag == "summary"
        assert len(list(details.every("tr"))) > 1
    assert len(list(whole.every("figure"))) == len(CHARTS)


def test_tables_are_headed(whole: Item) -> None:
    tables = list(whole.every("table"))
    assert tables
    for table in tables:
        assert table.children[0].tag == "caption" and table.children[0].text.strip()
        head, body = table.children[1:]
        width = len(list(head.every("th")))
        assert {cell.attributes["scope"] for cell in head.every("th")} == {"col"}
        for row in body.every("tr"):
            assert row.children[0].attributes["scope"] == "row" and len(row.children) == width
        box = table.parent
        assert box is not None and box.attributes["tabindex"] == "0"
        assert box.attributes["aria-label"] == table.children[0].text


def test_charts_take_the_colours_of_the_page() -> None:
    text = text_of(report)
    assert "#1b1e23" not in text  # what stands for ink while drawing
    (front,) = re.findall(r'<svg[^>]*aria-labelledby="chart-front-title".*?</svg>', text, re.S)
    assert "currentColor" in front and "var(--vermilion)" in front
    assert not re.search(r"#(?:000000|ffffff|d55e00|0072b2)", front)


# ----------------------------------------------------------------------------------------- numbers


def test_headline(whole: Item) -> None:
    summary = section(whole, "summary")
    figures = {
        next(item.every("dt")).text: " ".join(next(item.every("dd")).text.split())
        for item in summary.every("div")
        if any(child.tag == "dt" for child in item.children)
    }
    assert figures["Perplexity, float"] == f"{FLOAT:g} measured"
    assert figures["Perplexity, quantized"] == f"{QUANTIZED:g} 1.0500 times float; measured"
    assert figures["Perplexity, on integers"].startswith("21.5 1.0750 times")
    assert figures["Latency"].startswith("270 µs prefill 250 µs, decode 20 µs, 512/64 tokens")
    assert figures["Latency"].endswith("modelled")
    assert figures["Weights and caches"] == "1.5 MB on the target; modelled"
    assert set(states(whole).values()) == {STATES["info"], STATES["pass"]}
    assert next(summary.every("p")).text == "No check failed."


def verdict(what: Report) -> str:
    return next(section(read(page(what)), "summary").every("p")).text


def test_a_broken_limit_fails() -> None:
    root = tree_of(failed_parity)
    assert states(root)["Integer graph against the quantized one"] == STATES["fail"]
    assert states(root)["Diagnostics"] == STATES["warn"]
    told = next(section(root, "summary").every("p")).text
    assert told == "Failed: Integer graph against the quantized one."


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ("latency=250us", {"latency": True}),
        ("latency=249us,size=2MB", {"latency": False, "size": True}),
        ("size=1MB,ppl=1.2", {"size": False, "ppl": True}),
        ("ppl=1.05", {"ppl": False}),
    ],
)
def test_budgets(budget: str, kept: dict[str, bool]) -> None:
    what = light()
    what["search"]["budget"] = budget
    root = read(page(what))
    found = states(root)
    expected = {f"Budget: {name}": STATES["pass" if ok else "fail"] for name, ok in kept.items()}
    assert {name: state for name, state in found.items() if "Budget" in name} == expected
    told = next(section(root, "summary").every("p")).text
    assert (told == "No check failed.") == all(kept.values())


def test_a_target_that_rejects_a_node_fails() -> None:
    what = legalized_report()
    assert states(read(page(what)))["Nodes as the target takes them"] == STATES["pass"]
    what["verdicts"]["after"] = {"int": 4, "float": 1}
    assert states(read(page(what)))["Nodes as the target takes them"] == STATES["warn"]
    what["verdicts"]["after"] = {"int": 4, "reject": 1}
    assert verdict(what) == "Failed: Nodes as the target takes them."


def test_bits_are_those_of_the_plan(whole: Item) -> None:
    head, *body = rows(section(whole, "bits"), "Bits by layer and role")
    assert head == ["layer", *ROLES, "input of head", "head"]
    assert [row[0] for row in body] == ["0", "1", "head"]
    known = {(item.layer, item.role): str(item.bits) for item in bits(2)}
    for layer, row in enumerate(body):
        expected = [known.get((layer, role), "") for role in head[1:]]
        assert row[1:] == expected


def test_bits_without_a_search() -> None:
    what = light() | {"search": None}
    what["bits"] = [
        {"name": item.name, "layer": item.layer, "role": item.role, "bits": item.bits, "losses": {}}
        for item in bits(2)
    ]
    root = read(page(what))
    assert "chart-bits" in charts(root) and "chart-losses" not in charts(root)
    assert rows(section(root, "bits"), "Bits by layer and role")[1][1] == "4"
    assert "front" not in by_id(root)


def test_bits_in_blocks() -> None:
    what = light() | {"search": None}
    kept = ("name", "layer", "role", "bits")
    what["bits"] = [{key: getattr(item, key) for key in kept} | {"losses": {}} for item in bits(2)]
    what["bits"][1] |= {"bits": 4, "block": 32}
    text = page(what)
    assert "4, blocks of 32" in text
    assert "1 of 4 bits in blocks of 32" in text
    assert ">4b32<" in text


def test_errors_by_layer(whole: Item) -> None:
    errors = section(whole, "errors")
    found = rows(errors, "SQNR by layer, dB")[1:]
    assert [row[0] for row in found] == ["start", "0", "1", "head"]
    assert found[0][1:] == ["t-1_29", "29", "32", "46", "60"]  # the exact one is left out
    assert found[-1][1:] == ["t2_29", "30", "29", "43.5", "58"]
    worst = rows(errors, "Lowest SQNR: 15 of 119 tensors")[1:]
    assert worst[0][:3] == ["t2_29", "head", "29"] and len(worst) == 15
    ratios = [float(row[2]) for row in worst]
    assert ratios == sorted(ratios)
    assert "SQNR is not finite for 1 of them." in errors.text


def test_layers_may_be_unknown() -> None:
    what = light() | {"tensors": report()["tensors"]}
    for row in what["tensors"]:
        del row["layer"]
    errors = section(read(page(what)), "errors")
    assert "not known" in errors.text and not list(errors.every("svg"))
    assert {row[1] for row in rows(errors, "Lowest SQNR: 15 of 119 tensors")[1:]} == {"unknown"}


def test_histograms_tell_the_encoding(whole: Item) -> None:
    part = section(whole, "histograms")
    (first, _) = [item.text for item in part.every("figcaption")]
    assert "Codes of 8 bits reach from -4.1 to 4.4 in steps of 0.0333." in first
    assert "Values before -8 to 7.5, after -4 to 4.5." in first
    counts = rows(part, "Elements by value, input of q in layer 0")[1:]
    assert sum(int(row[1]) for row in counts) == sum(report()["histograms"][0]["before"]["counts"])
    assert sum(int(row[2]) for row in counts) == sum(report()["histograms"][0]["after"]["counts"])


def test_parity_counts(whole: Item) -> None:
    found = rows(section(whole, "parity"), "Codes by LSB off")[1:]
    assert found == [[kind, *(f"{count:,}" for count in LSB_COUNTS)] for kind in KINDS]


def test_parity_without_histograms() -> None:
    what = light() | {"parity": report()["parity"]}
    for row in what["parity"]:
        del row["histogram"]
    root = read(page(what))
    assert "chart-parity" not in charts(root)
    assert len(rows(section(root, "parity"), "Integer graph against the quantized one")) == 5


def test_learning(whole: Item) -> None:
    part = section(whole, "learning")
    assert rows(part, "Loss: model")[1:] == [
        ["0", "1"], ["2", "0.5"], ["4", "0.3333"], ["6", "0.25"], ["8", "0.2"]
    ]  # fmt: skip
    assert rows(part, "Loss of blocks")[1] == ["block 1", "0.25", "0.15", "0.6"]
    assert rows(part, "Loss of blocks by step, relative to the start")[:3] == [
        ["block", "step 0", "step 5", "step 10"],
        ["block 1", "1", "0.6", "0.8"],
        ["block 2", "1", "0.6", "0.6"],
    ]  # fmt: skip


def test_a_block_that_stopped_early() -> None:
    what = light()
    what["learning"] = [
        {"what": name, "step": step, "loss": 2.0**-step}
        for name, steps in (("block 0", (0, 1, 2)), ("block 1", (0, 1)))
        for step in steps
    ]
    part = section(read(page(what)), "learning")
    table = rows(part, "Loss of blocks by step, relative to the start")
    assert table[1:] == [["block 0", "1", "0.5", "0.25"], ["block 1", "1", "0.5", ""]]
    assert "block 1 gains least" in part.text


def test_diagnostics_are_explained_inside_the_page(whole: Item) -> None:
    part = section(whole, "diagnostics")
    assert "5 more of these are in report.json." in part.text  # 25, of which 20 are shown
    links = {item.text: str(item.attributes["href"])[1:] for item in part.every("a")}
    assert set(links) == {"What QN205 means", "What QN308 means"}
    for label, target in links.items():
        manual = manual_page(label.split()[1])
        assert manual is not None
        shown = " ".join(by_id(whole)[target].text.split())
        assert {"What it checks", "Why it matters", "Example", "How to fix"} <= {
            item.text for item in by_id(whole)[target].every("h4")
        }
        words = re.sub(r"```\w*|``", " ", manual.partition("\n")[2]).split()
        assert "".join(words) in shown.replace(" ", "")


def test_a_code_without_a_manual_page() -> None:
    what = light()
    what["diagnostics"] = [what["diagnostics"][0] | {"code": "QN000"}]
    root = read(page(what))
    assert "no explanation of QN000" in section(root, "diagnostics").text
    assert "explanations" not in by_id(root)


# ------------------------------------------------------------------------------------------ absence


@pytest.mark.parametrize(
    ("key", "sections", "told"),
    [
        ("search", {"bits", "sensitivity", "front"}, "Sensitivity to bits"),
        ("tensors", {"errors"}, "The error of single tensors"),
        ("histograms", {"histograms"}, "Histograms"),
        ("learning", {"learning"}, "Learning"),
        ("parity", {"parity"}, "The integer graph"),
        ("cost", set(), "Latency: "),
        ("perplexity", set(), "Perplexity:"),
        ("sensitivities", {"sensitivity"}, ""),
        ("diagnostics", {"explanations"}, ""),
    ],
)
def test_a_report_of_one_thing(key: str, sections: set[str], told: str) -> None:
    root = read(page({key: report()[key]}))
    always = {"main", "summary", "diagnostics", "provenance"}
    assert {str(item.attributes["id"]) for item in root.every("section", "main")} == (
        sections | always
    )
    links = {item.attributes["href"] for item in next(root.every("nav")).every("a")}
    assert links == {f"#{name}" for name in (sections | always) - {"main", "explanations"}}
    unmeasured = [item.text for item in section(root, "summary").every("li")]
    assert told == "" or not any(text.startswith(told) for text in unmeasured)


def test_an_empty_report_says_what_was_not_measured() -> None:
    root = read(page({}))
    found = {item.text.partition(":")[0] for item in section(root, "summary").every("li")}
    assert len(found) == 7 and "Perplexity" in found and "The integer graph" in found
    assert charts(root) == []
    assert not list(section(root, "summary").every("dl"))


def test_a_whole_report_leaves_little_unmeasured(whole: Item) -> None:
    assert [item.text for item in section(whole, "summary").every("li")] == [
        "Latency on a device: the figure here comes from a model of the target."
    ]


def test_a_quantized_input() -> None:
    root = read(page(legalized_report()))
    part = section(root, "changes")
    table = rows(part, "Nodes by what the target makes of them")
    assert table == [["rewrite", "int", "float"], ["before", "3", "2"], ["after", "5", "0"]]
    assert rows(part, "What rewrites changed in outputs")[1][2:] == ["no encoding", "no encoding"]


# ---------------------------------------------------------------------------------------- extremes


NAMES = {"name", "what", "label", "role", "kind", "message", "help", "node", "value", "file",
         "operator", "rewrite", "calibration", "evaluation", "sha256", "sensitivity"}  # fmt: skip


def renamed(value: Any, names: Iterator[str]) -> Any:
    """Every text that is a name is another."""
    if isinstance(value, dict):
        return {
            key: next(names) if key in NAMES and isinstance(item, str) else renamed(item, names)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [renamed(item, names) for item in value]
    return value


@pytest.mark.parametrize("names", [AWKWARD, AWKWARD[:1], AWKWARD[5:6]])
def test_names_do_no_harm(names: list[str], whole: Item, tmp_path: Path) -> None:
    what = renamed(report(), cycle(names))
    what["command"] = names
    what["config"]["calib"] = names[0]
    what["outputs"] = {f"{name}.onnx": {"bytes": 1, "sha256": name} for name in names}
    what["sensitivities"] = dict.fromkeys(names, 0.1)
    what["rewrites"] = dict.fromkeys(names, 1)
    what["versions"] = dict(zip(names, names, strict=True))
    path = tmp_path / "report.html"
    write_page(what, path)
    text = path.read_text("utf-8")
    root = read(text)
    kinds = {(item.tag, *sorted(item.attributes)) for item in whole.every()}
    assert {(item.tag, *sorted(item.attributes)) for item in root.every()} <= kinds
    assert len(text) < 600_000 and "n" * 1000 not in text
    ids = [item.attributes["id"] for item in root.every() if "id" in item.attributes]
    assert len(ids) == len(set(ids))


def test_a_name_is_shown_as_it_is() -> None:
    what = light()
    what["input"]["name"] = 'a<b>&"c'
    assert next(read(page(what)).every("h1")).text == 'a<b>&"c'


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    write_json(report(), tmp_path / "report.json")
    write_page(json.loads((tmp_path / "report.json").read_text("utf-8")), tmp_path / "two.html")
    assert (tmp_path / "two.html").read_text("utf-8") == text_of(report)


def test_the_report_is_not_changed() -> None:
    what = light()
    page(what)
    assert json.dumps(what) == json.dumps(light())


def test_thirty_layers_stay_small() -> None:
    what = report(layers=30)
    assert len(what["tensors"]) > 900
    text = page(what)
    assert len(text.encode()) < 1_500_000
    head, *body = rows(section(read(text), "bits"), "Bits by layer and role")
    assert len(body) == 31 and len(head) == len(ROLES) + 3


@pytest.mark.parametrize("value", [math.inf, 0.0, -1.0])
def test_numbers_that_are_no_numbers(value: float | None) -> None:
    what = report() | {"histograms": None, "parity": None}
    for graph in what["perplexity"].values():
        graph["value"] = value
    for point in what["learning"]:
        point["loss"] = value
    for row in what["tensors"]:
        row["sqnr_db"] = value
    for plan in (what["search"]["chosen"], *what["search"]["front"]):
        plan["perplexity"] = value
    for tensor in what["search"]["tensors"]:
        tensor["losses"] = dict.fromkeys(tensor["losses"], value)
    what["sensitivities"] = dict.fromkeys(what["sensitivities"], value)
    read(page(what))

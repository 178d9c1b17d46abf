"""Charts of a search for bits: what the SVG says, where its marks are, and that it stays put."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Bbox

from qnpu.compiler.bit_charts import write_front, write_heat_map
from qnpu.compiler.bit_search import BitSearch, MeasuredPlan, TensorBits

SVG = "{http://www.w3.org/2000/svg}"
USE, TEXT, PATH = f"{SVG}use", f"{SVG}text", f"{SVG}path"
FLOAT = 20.0
ROLES = ("q", "k", "o", "input of q", "keys")
AWKWARD = "$x^2$ & <b> é 漢字"
Write = Callable[[BitSearch, Path], None]


def plan(label: str, seconds: float, ratio: float) -> MeasuredPlan:
    return MeasuredPlan(label, seconds, 1e8, 0.1, 0.1, ratio * FLOAT)


FRONT = tuple(plan(f"front {i}", 0.2 + 0.1 * i, 1 + 0.5 / (1 + i)) for i in range(6))
OTHERS = (plan("w4a8", 0.25, 1.7), plan("w4a8, 10% promoted", 0.3, 1.4))


def tensor(layer: int, role: str, loss: float = 1e-3, bits: int = 8) -> TensorBits:
    return TensorBits(f"{layer}.{role}", layer, role, bits, {"4": loss, "8": 1e-8})


def layers(number: int) -> tuple[TensorBits, ...]:
    """Losses of all sizes, as many bits as there are columns before, and a head."""
    return (
        *(
            tensor(layer, role, 10.0 ** -(1 + (layer + i) % 5), 4 + i)
            for layer in range(number)
            for i, role in enumerate(ROLES)
        ),
        tensor(number, "head", 0.01, 16),
        tensor(number, "input of head", 0.0, 16),
    )


def search(
    tensors: tuple[TensorBits, ...] = layers(3),
    front: tuple[MeasuredPlan, ...] = FRONT,
    others: tuple[MeasuredPlan, ...] = OTHERS,
) -> BitSearch:
    chosen = replace(front[len(front) // 2], label="chosen")
    return BitSearch(
        target="t75",
        workload="512/128",
        budget="loss=0.05",
        sensitivity="kl",
        float_perplexity=FLOAT,
        gap=0.0,
        tensors=tensors,
        chosen=chosen,
        trials=(chosen,),
        front=front,
        others=others,
    )


def drawn(write: Write, what: BitSearch, folder: Path) -> Element:
    """The parsed chart; nothing may be warned of."""
    path = folder / "chart.svg"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(what, path)
    return ElementTree.parse(path).getroot()


def texts(root: Element) -> list[str]:
    return [item.text or "" for item in root.iter(TEXT)]


def groups(root: Element, pattern: str) -> dict[str, Element]:
    """Id → element of those whose whole id matches."""
    items = {item.get("id", ""): item for item in root.iter(f"{SVG}g")}
    return {name: item for name, item in items.items() if re.fullmatch(pattern, name)}


def place(marker: Element) -> tuple[float, float]:
    """Of its centre, from the left and from the top."""
    (use,) = marker.iter(USE)
    return float(use.get("x", "")), float(use.get("y", ""))


def fill(item: Element, tag: str) -> str:
    """Colour of the one shape or text in a group; black is not written out."""
    (shape,) = item.iter(tag)
    found = re.search(r"fill: (#\w{6})", shape.get("style", ""))
    return found[1] if found else "#000000"


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# ------------------------------------------------------------------------------------------ front


def test_every_plan_has_a_marker_and_a_label(tmp_path: Path) -> None:
    root = drawn(write_front, search(), tmp_path)
    assert len(groups(root, r"front-\d+")) == len(FRONT)
    assert len(groups(root, r"others-\d+")) == len(OTHERS)
    assert len(groups(root, r"chosen-\d+")) == 1
    for item in (*FRONT, *OTHERS):
        assert texts(root).count(item.label) == 1
    assert {"chosen", "Pareto front", "chosen plan", "by simple rules", "float"} <= set(texts(root))


def test_axes_say_what_is_modelled_and_what_measured(tmp_path: Path) -> None:
    words = texts(drawn(write_front, search(), tmp_path))
    assert "latency in ms: modelled, t75, 512/128 tokens" in words
    assert "perplexity relative to float (20): measured" in words
    assert "budget: loss=0.05" in words


@pytest.mark.parametrize(("seconds", "unit"), [(2.0, "s"), (0.02, "ms"), (2e-5, "µs")])
def test_unit_fits_the_latency(seconds: float, unit: str, tmp_path: Path) -> None:
    front = (plan("a", seconds / 2, 1.2), plan("b", seconds, 1.1))
    root = drawn(write_front, search(front=front, others=()), tmp_path)
    assert any(word.startswith(f"latency in {unit}:") for word in texts(root))


def test_markers_lie_where_the_numbers_say(tmp_path: Path) -> None:
    root = drawn(write_front, search(), tmp_path)
    front = [place(item) for item in groups(root, r"front-\d+").values()]
    steps = [right[0] - left[0] for left, right in pairwise(front)]
    assert steps == pytest.approx([steps[0]] * len(steps), abs=1e-3) and steps[0] > 0
    # Logarithmic: heights go with logarithms of perplexity.
    top, bottom = front[0][1], front[-1][1]
    logs = [math.log(item.perplexity) for item in FRONT]
    expected = [top + (logs[0] - log) * (bottom - top) / (logs[0] - logs[-1]) for log in logs]
    assert [y for _, y in front] == pytest.approx(expected, abs=1e-3) and bottom > top
    assert place(groups(root, "chosen-0")["chosen-0"]) == front[len(FRONT) // 2]


def test_kinds_of_plans_look_different(tmp_path: Path) -> None:
    root = drawn(write_front, search(), tmp_path)
    marks = groups(root, r"(front|others|chosen)-0").values()
    assert len({fill(item, USE) for item in marks}) == 3
    assert len({next(item.iter(PATH)).get("d") for item in marks}) == 3


def label_boxes(root: Element) -> Iterator[Bbox]:
    """Where labels are, y from the top; without what hangs below the line."""
    font = FontProperties(family="DejaVu Sans", size=8)
    for label in groups(root, r".*-label").values():
        for line in label.iter(TEXT):
            width, height, below = text_to_path.get_text_width_height_descent(
                line.text or "", font, False
            )
            found = re.search(r"translate\(([\d.]+) ([\d.]+)\)", line.get("transform", ""))
            x, y = found.groups() if found else (line.get("x", ""), line.get("y", ""))
            yield Bbox.from_bounds(float(x), float(y) - height + below, width, height - below)


def test_labels_cover_neither_markers_nor_line_nor_each_other(tmp_path: Path) -> None:
    below = plan("a long name, on the line if it went to the right", 0.22, 1.2)
    root = drawn(write_front, search(others=(*OTHERS, below)), tmp_path)
    boxes = list(label_boxes(root))
    assert len(boxes) == len(FRONT) + len(OTHERS) + 2
    spots = [place(item) for item in groups(root, r"(front|others|chosen)-\d+").values()]
    line = [place(item) for item in groups(root, r"front-\d+").values()]
    for start, end in pairwise(line):
        spots += [
            (start[0] + t / 50 * (end[0] - start[0]), start[1] + t / 50 * (end[1] - start[1]))
            for t in range(51)
        ]
    assert not any(box.count_contains(spots) for box in boxes)
    assert not any(Bbox.count_overlaps(one, [other]) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize(
    ("ratio", "value"),
    [(2e4, "↑ 2e+04"), (math.inf, "↑ not finite"), (math.nan, "↑ not finite")],
)
def test_plans_off_the_chart_are_at_its_edge(ratio: float, value: str, tmp_path: Path) -> None:
    far = search(others=(*OTHERS, plan("w4a4", 0.2, ratio)))
    root = drawn(write_front, far, tmp_path)
    assert {"w4a4", value} <= set(texts(root))
    heights = {name: place(item)[1] for name, item in groups(root, r"(front|others)-\d+").items()}
    assert min(heights, key=heights.__getitem__) == "others-2"
    # The front keeps most of the height.
    assert heights["front-5"] - heights["front-0"] > 0.3 * (
        heights["front-5"] - heights["others-2"]
    )


def test_front_with_a_plan_of_no_finite_perplexity(tmp_path: Path) -> None:
    root = drawn(write_front, search(front=(plan("broken", 0.1, math.inf), *FRONT)), tmp_path)
    assert {"broken", "↑ not finite"} <= set(texts(root))
    (line,) = groups(root, "front").values()
    ((path),) = line.iter(PATH)
    assert path.get("d", "").count("M") == 1 and path.get("d", "").count("L") == len(FRONT) - 1


@pytest.mark.parametrize("ratio", [1.0, 1.3, 5.0, math.inf])
def test_one_plan(ratio: float, tmp_path: Path) -> None:
    root = drawn(write_front, search(front=(plan("only", 0.0, ratio),), others=()), tmp_path)
    assert {"only", "chosen"} <= set(texts(root))
    assert len(groups(root, r"(front|others|chosen)-\d+")) == 2


# --------------------------------------------------------------------------------------- heat map


@pytest.mark.parametrize("number", [1, 2, 30])
def test_every_tensor_has_a_cell_with_its_bits(number: int, tmp_path: Path) -> None:
    tensors = layers(number)
    root = drawn(write_heat_map, search(tensors), tmp_path)
    columns = [*ROLES, "head", "input of head"]
    bits = {name: next(item.iter(TEXT)).text for name, item in groups(root, "bits-.*").items()}
    assert bits == {
        f"bits-{item.layer}-{columns.index(item.role)}": str(item.bits) for item in tensors
    }
    assert len(groups(root, "cell-.*")) == len(tensors)
    words = texts(root)
    assert [word for word in words if word in columns or word == "head"][:-1] == columns
    assert {"layer", "head", *map(str, range(number))} <= set(words)
    assert words.count("head") == 2  # the row and the column
    assert "loss at the fewest bits, nats per token" in words


def test_cells_lie_in_rows_and_columns(tmp_path: Path) -> None:
    root = drawn(write_heat_map, search(layers(2)), tmp_path)
    corner: dict[str, tuple[float, float]] = {}
    for name, item in groups(root, "cell-.*").items():
        found = re.match(r"M ([\d.]+) ([\d.]+)", next(item.iter(PATH)).get("d", ""))
        assert found
        corner[name] = float(found[1]), float(found[2])
    assert corner["cell-0-0"][0] == corner["cell-1-0"][0] < corner["cell-0-1"][0]
    assert corner["cell-0-0"][1] == corner["cell-0-1"][1] < corner["cell-1-0"][1]


def test_colour_goes_with_the_loss_at_the_fewest_bits(tmp_path: Path) -> None:
    losses = [0.0, 1e-9, 1e-4, 1e-4, 1e-3, 1e-2, 0.1]
    row = tuple(tensor(0, f"r{i}", loss) for i, loss in enumerate(losses))
    cells = groups(drawn(write_heat_map, search(row), tmp_path), "cell-.*")
    colours = [fill(cells[f"cell-0-{i}"], PATH) for i in range(len(losses))]
    assert colours[0] == colours[1]  # below the scale's end
    assert colours[2] == colours[3]
    assert len(set(colours)) == 5
    light = [luminance(colour) for colour in colours]
    assert light == sorted(light)


def test_bits_can_be_read_on_any_colour(tmp_path: Path) -> None:
    row = tuple(tensor(0, f"r{i}", 10 ** (-i / 10)) for i in range(50))
    root = drawn(write_heat_map, search((*row, tensor(0, "none", math.nan))), tmp_path)
    cells, bits = groups(root, "cell-.*"), groups(root, "bits-.*")
    for i in range(51):
        light = luminance(fill(cells[f"cell-0-{i}"], PATH)) + 0.05
        ink = luminance(fill(bits[f"bits-0-{i}"], TEXT)) + 0.05
        assert max(light, ink) / min(light, ink) >= 4.5


@pytest.mark.parametrize("loss", [0.0, -1e-12, 1.0, 3e-3, 1e-300, 1e30])
def test_all_losses_alike(loss: float, tmp_path: Path) -> None:
    row = (tensor(0, "q", loss), tensor(0, "k", loss))
    cells = groups(drawn(write_heat_map, search(row), tmp_path), "cell-.*")
    assert len({fill(item, PATH) for item in cells.values()}) == 1


def test_losses_that_are_not_finite_are_grey(tmp_path: Path) -> None:
    unmeasured = replace(tensor(0, "v"), losses={})
    row = (tensor(0, "q"), tensor(0, "k", math.nan), unmeasured, tensor(0, "o", math.inf))
    root = drawn(write_heat_map, search(row), tmp_path)
    colours = [fill(item, PATH) for item in groups(root, "cell-.*").values()]
    red, green, blue = (colours[1][i : i + 2] for i in (1, 3, 5))
    assert red == green == blue
    assert colours[1] == colours[2] == colours[3] != colours[0]
    assert "loss at the fewest bits, nats per token; grey: not finite" in texts(root)


def test_second_tensor_of_a_role_has_its_own_column(tmp_path: Path) -> None:
    pair = (tensor(0, "q", bits=4), tensor(0, "q", bits=8), tensor(1, "q", bits=16))
    root = drawn(write_heat_map, search(pair), tmp_path)
    assert {"q", "q 2"} <= set(texts(root))
    bits = {name: next(item.iter(TEXT)).text for name, item in groups(root, "bits-.*").items()}
    assert bits == {"bits-0-0": "4", "bits-0-1": "8", "bits-1-0": "16"}


# ------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("write", [write_front, write_heat_map])
def test_same_search_same_bytes_whatever_the_settings(write: Write, tmp_path: Path) -> None:
    write(search(), tmp_path / "a.svg")
    with matplotlib.rc_context():
        matplotlib.rcParams["font.size"] = 30
        matplotlib.rcParams["svg.fonttype"] = "path"
        matplotlib.rcParams["axes.grid"] = True
        matplotlib.rcParams["savefig.pad_inches"] = 1
        before = dict(matplotlib.rcParams)
        write(search(), tmp_path / "b.svg")
        assert dict(matplotlib.rcParams) == before
    text = (tmp_path / "a.svg").read_bytes()
    assert text == (tmp_path / "b.svg").read_bytes()
    assert b"dc:date" not in text and b"<image" not in text


@pytest.mark.parametrize("write", [write_front, write_heat_map])
def test_names_are_text_and_not_markup(write: Write, tmp_path: Path) -> None:
    awkward = replace(
        search((tensor(0, AWKWARD),), (plan(AWKWARD, 0.1, 1.1),), (plan("_a$b$", 0.2, 1.2),)),
        target=AWKWARD,
        budget="a $b",
    )
    root = drawn(write, awkward, tmp_path)
    words = texts(root)
    assert AWKWARD in words
    assert "_a$b$" in words or write is write_heat_map
    assert any(word.endswith(f": {AWKWARD}") for word in words)


@pytest.mark.parametrize("write", [write_front, write_heat_map])
def test_title_and_description_for_screen_readers(write: Write, tmp_path: Path) -> None:
    root = drawn(write, search(), tmp_path)
    assert root[0].tag == f"{SVG}title" and "t75" in (root[0].text or "")
    description = root.find(".//{http://purl.org/dc/elements/1.1/}description")
    assert description is not None
    numbers = re.findall(r"\d+", description.text or "")
    expected = (len(FRONT), len(OTHERS)) if write is write_front else (4, len(layers(3)))
    assert all(str(number) in numbers for number in expected)


def test_matplotlib_is_imported_late_and_without_pyplot(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from qnpu.compiler.bit_charts import write_front, write_heat_map
from qnpu.compiler.bit_search import BitSearch, MeasuredPlan, TensorBits
assert "matplotlib" not in sys.modules
plan = MeasuredPlan("a", 1.0, 1.0, 0.1, 0.1, 2.0)
tensor = TensorBits("w", 0, "q", 4, {"4": 0.1})
search = BitSearch("t", "1/1", "b", "kl", 1.5, 0.0, (tensor,), plan, (plan,), (plan,), ())
write_front(search, Path(sys.argv[1]))
write_heat_map(search, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path / "chart.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

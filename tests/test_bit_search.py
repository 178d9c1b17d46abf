"""bit_search: ``--scheme auto`` as a user runs it: files, another budget, a kill, a plan edited."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qnpu.compiler.bit_search import SEARCH_FILES, SENSITIVITIES, search_writers
from qnpu.compiler.cached_decoder import compile_cached
from qnpu.compiler.config import CompileConfig
from qnpu.runtime_check.bit_losses import Measure
from tests.commands import call, finish, start
from tests.decoders import exported
from tests.test_cached_decoder import CHUNK, CONTEXT, WINDOWS

SIZES = ("--seq-len", "16", "--calib-windows", "4", "--learn-windows", "8", "--eval-windows", "2")
AUTO = ("--scheme", "auto", "--target", "qnn-htp-v75", *SIZES, "--quiet", "--json")
BUDGET = ("--budget", "latency=350us")
SAME = ("model.qdq.onnx", "bit_plan.json", "encodings.json", *SEARCH_FILES)
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and the result of a search in ``out``."""
    folder = tmp_path_factory.mktemp("home")
    options = ["--seq-len", "16", "--out", "tiny.onnx", "--quiet", "--json"]
    assert call("qnpu-export", "tiny-llama", *options, folder=folder).exit_code == 0
    done = call("qnpu-compile", "tiny.onnx", *AUTO, *BUDGET, "--out", "out", folder=folder)
    assert done.exit_code == 0, done.stderr
    (folder / "stdout.json").write_text(done.stdout)
    return folder


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def numbers(folder: Path) -> list[bytes]:
    (file,) = (folder / ".qnpu-losses").iterdir()
    return file.read_bytes().splitlines()


def test_what_is_written_and_printed(home: Path) -> None:
    assert {path.name for path in (home / "out").iterdir()} == {
        *SAME,
        "report.html",
        "report.json",
        "HANDOFF.md",
        ".qnpu-losses",
    }
    printed, report = read(home / "stdout.json"), read(home / "out" / "report.json")
    assert set(report["outputs"]) == {*SAME, "HANDOFF.md", "report.html"}
    chosen = printed["search"]["chosen"]
    assert printed["search"]["kind"] == "modelled"
    assert chosen == report["search"]["chosen"] == read(home / "out" / "pareto.json")["chosen"]
    assert chosen["seconds"] <= 350e-6
    assert len(report["search"]["tensors"]) == 2 * (4 + 7 + 2) + 2
    assert read(home / "out" / "bit_plan.json")["scheme"] == "auto"
    for name in ("pareto.svg", "bits.svg"):
        assert ElementTree.parse(home / "out" / name).getroot().tag.endswith("svg")


def test_bits_in_the_graph_are_those_that_were_chosen(home: Path) -> None:
    plan, report = read(home / "out" / "bit_plan.json"), read(home / "out" / "report.json")
    chosen = {item["name"]: item["bits"] for item in report["search"]["tensors"]}
    encodings = read(home / "out" / "encodings.json")["tensors"]
    kept = [name for name in plan["linears"] if name in encodings]  # one may be made finer
    assert len(kept) > len(plan["linears"]) / 2
    for name in kept:
        assert plan["linears"][name]["weight"] == chosen[name] == encodings[name]["bits"]
    assert {bits["weight"] for bits in plan["linears"].values()} == {4, 8}


def test_another_budget_takes_the_losses_that_are_there(home: Path) -> None:
    before = numbers(home / "out")
    more = ("--budget", "latency=400us", "--losses", "out/.qnpu-losses")
    done = call("qnpu-compile", "tiny.onnx", *AUTO, *more, "--out", "large", folder=home)
    assert done.exit_code == 0, done.stderr
    assert not (home / "large" / ".qnpu-losses").exists()
    after = numbers(home / "out")
    assert after[: len(before)] == before
    assert all(json.loads(line)[0].startswith("plan ") for line in after[len(before) :])
    small, large = (read(home / name / "pareto.json")["chosen"] for name in ("out", "large"))
    assert large["measured"] < small["measured"]


def test_killed_it_goes_on_to_the_same_files(home: Path, tmp_path: Path) -> None:
    command = ("qnpu-compile", home / "tiny.onnx", *AUTO, *BUDGET, "--out", "out")
    process = start(*command, folder=tmp_path)
    last = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("out/.qnpu-losses/*")) or len(numbers(tmp_path / "out")) < 7:
        assert time.monotonic() < last
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert finish(process).exit_code == -signal.SIGKILL
    before = numbers(tmp_path / "out")
    assert len(before) < len(numbers(home / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".qnpu-losses"}
    done = finish(start(*command, folder=tmp_path))
    assert done.exit_code == 0, done.stderr
    assert numbers(tmp_path / "out")[: len(before) - 1] == before[:-1]
    for name in SAME:
        assert (tmp_path / "out" / name).read_bytes() == (home / "out" / name).read_bytes(), name


def test_a_plan_is_taken_back_and_may_be_edited(home: Path) -> None:
    command = ("qnpu-compile", "tiny.onnx", "--target", "qnn-htp-v75", *SIZES, "--quiet", "--json")
    done = call(*command, "--plan", "out/bit_plan.json", "--out", "again", folder=home)
    assert done.exit_code == 0, done.stderr
    for name in ("model.qdq.onnx", "bit_plan.json", "encodings.json"):
        assert (home / "again" / name).read_bytes() == (home / "out" / name).read_bytes(), name
    plan = read(home / "out" / "bit_plan.json")
    name = next(n for n, bits in plan["linears"].items() if bits["weight"] == 4 and ".q_" in n)
    plan["linears"][name]["weight"] = 8
    (home / "edited.json").write_text(json.dumps(plan))
    done = call(*command, "--plan", "edited.json", "--out", "edited", folder=home)
    assert done.exit_code == 0, done.stderr
    assert read(home / "edited" / "encodings.json")["tensors"][name]["bits"] == 8


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--scheme", "auto"), "QN503"),
        (("--scheme", "auto", "--budget", "speed=3"), "QN503"),
        (("--scheme", "w8a8", "--budget", "size=1MB"), "QN503"),
        (("--scheme", "auto", "--budget", "size=1MB", "--workload", "12"), "QN503"),
        (("--scheme", "auto", "--budget", "size=1MB", "--sensitivity", "hope"), "QN503"),
        (("--scheme", "auto", "--budget", "size=1MB", "--search-windows", "0"), "QN503"),
        (("--scheme", "auto", "--budget", "size=1MB", "--promote", "0.5"), "QN503"),
        (("--scheme", "auto", "--budget", "size=1kB", "--target", "qnn-htp-v75"), "QN509"),
        (("--scheme", "auto", "--budget", "size=1MB"), "QN508"),
    ],
)
def test_faults(options: tuple[str, ...], code: str, home: Path) -> None:
    done = call("qnpu-compile", "tiny.onnx", *options, *SIZES, "--out", "fault", folder=home)
    assert (done.exit_code, done.codes) == (1, [code])
    assert not (home / "fault").exists()


def test_names_of_measures() -> None:
    assert list(SENSITIVITIES) == [measure.value for measure in Measure]


def test_without_a_search_there_are_no_files_of_one() -> None:
    assert search_writers(None) == {}


def test_with_a_cache_both_graphs_have_the_bits_that_were_chosen() -> None:
    config = CompileConfig(
        scheme="auto",
        budget="latency=350us",
        target="qnn-htp-v75",
        seq_len=CHUNK,
        context=CONTEXT,
        learn_windows=2,
        search_windows=1,
    )
    decoder = compile_cached(exported("llama", "cached"), config, WINDOWS)
    search = decoder.prefill.bit_search
    assert search is not None
    chosen = {item.name: item.bits for item in search.tensors}
    for graph in (decoder.prefill.model.graph, decoder.decode.graph):
        widths = {
            weight: value.dtype.bitwidth
            for weight in decoder.prefill.bit_plan.choices.linears
            for name, value in graph.initializers.items()
            if name.removesuffix("_quantized") == weight and value.dtype is not None
        }
        assert widths == {name: chosen[name] for name in widths}
        assert set(widths.values()) == {4, 8}

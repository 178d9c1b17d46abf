"""HANDOFF.md: the commands, tensors and hashes of one compile."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qnpu.compiler.bit_plan import BitPlan
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.handoff import cache_pairs, placeholders, write_handoff
from qnpu.compiler.integer_io import mark_integer
from qnpu.compiler.output import hash_file
from qnpu.compiler.pipeline import CompileResult
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.target import TargetProfile, Vendor, load_target, target_names
from tests.conftest import parse

CACHED = """
    g (int64[1, 2] ids, float[1, 4] past_key_0_in) =>
        (float[1, 4] logits, float[1, 4] past_key_0_out)
    { past_key_0_out = Relu(past_key_0_in)  logits = Neg(past_key_0_out) }
"""
U8 = QuantSpec(8, False, False)


def encoding(scale: float = 0.1, zero: int = 128) -> Encoding:
    return Encoding(U8, np.array(scale, np.float32), np.array(zero, np.int32))


def result(text: str = CACHED, **encodings: Encoding) -> CompileResult:
    """A compile of a graph, as far as the page looks at it."""
    model = parse(text)
    table = EncodingTable()
    for name in ("past_key_0_in", "past_key_0_out", "logits"):
        table[name] = encodings.get(name, encoding())
    return CompileResult(model, model, model, BitPlan(), table, diagnostics=[], rewrites={})


TARGET = TargetProfile(
    id="t75",
    vendor=Vendor(arch=75, soc_model=57),
    handoff=(
        "convert {float} --with {encodings} --for v{arch},{soc_model}",
        "run {model} --target {target}",
    ),
)


def page(
    folder: Path,
    compiled: CompileResult | None = None,
    target: TargetProfile = TARGET,
    emitted: tuple[str, ...] = (),
) -> str:
    write_handoff(folder / "HANDOFF.md", compiled or result(), target, emitted, -50.0)
    return (folder / "HANDOFF.md").read_text("utf-8")


def test_commands_name_the_files(tmp_path: Path) -> None:
    text = page(tmp_path, emitted=("encodings-2.0.0", "float"))
    assert "convert model.float.onnx --with model.2.0.0.encodings --for v75,57\n" in text
    assert "run model.qdq.onnx --target t75\n" in text
    assert "--emit" not in text


@pytest.mark.parametrize(
    ("emitted", "wanted"),
    [
        ((), "--emit encodings-1.0.0,float"),
        (("float",), "--emit float,encodings-1.0.0"),
        (("encodings-0.6.1",), "--emit encodings-0.6.1,float"),
    ],
)
def test_files_that_the_commands_lack(
    emitted: tuple[str, ...], wanted: str, tmp_path: Path
) -> None:
    assert f"`{wanted}`" in page(tmp_path, emitted=emitted)


def test_files_and_hashes(tmp_path: Path) -> None:
    for name in ("model.qdq.onnx", "model.ctx.onnx", "model.ctx_qnn.bin"):
        (tmp_path / name).write_text(name)
    rows = {
        cells[1].strip(" `"): cells[2:]
        for line in page(tmp_path, emitted=("epcontext",)).splitlines()
        if line.startswith("| `model") and len(cells := line.split("|")) == 6
    }
    assert set(rows) == {"model.qdq.onnx", "model.ctx.onnx", "model.ctx_qnn.bin"}
    for name, cells in rows.items():
        assert cells[0].strip() == str(len(name))
        assert cells[1].strip(" `") == hash_file(tmp_path / name)
        assert cells[2].strip()
    assert "`model.ctx.onnx`" in rows["model.ctx_qnn.bin"][2]


def test_inputs_and_outputs(tmp_path: Path) -> None:
    text = page(tmp_path, result(logits=encoding(0.5, 7)))
    assert "| in | `ids` | 1 x 2 | int64 |  |  |  |" in text
    assert "| out | `logits` | 1 x 4 | float | uint8 | 0.5 | 7 |" in text
    assert "| out | `past_key_0_out` | 1 x 4 | float | uint8 | 0.100000001 | 128 |" in text


def test_codes_in_and_out(tmp_path: Path) -> None:
    assert "takes and returns real numbers" in page(tmp_path)
    compiled = result()
    mark_integer(compiled.model, {"logits": encoding()})
    assert "takes and returns codes" in page(tmp_path, compiled)


def test_scales_are_exact(tmp_path: Path) -> None:
    scale = np.float32(1 / 3)
    shown = re.search(
        r"`logits` .* uint8 \| (\S+) ", page(tmp_path, result(logits=encoding(1 / 3)))
    )
    assert shown is not None
    assert np.float32(shown[1]) == scale


def test_a_cache_is_tied_or_not(tmp_path: Path) -> None:
    assert "Tied: each of the 1 cache inputs" in page(tmp_path)
    text = page(tmp_path, result(past_key_0_out=encoding(0.2)))
    assert "Not tied" in text
    assert "* `past_key_0_in`, `past_key_0_out`" in text
    plain = result("g (int64[1, 2] ids, float[1, 4] x) => (float[1, 4] logits) { logits = Neg(x) }")
    assert "takes no cache" in page(tmp_path, plain)


def test_requantize_points(tmp_path: Path) -> None:
    text = """
        g (float[1, 4] past_key_0_in) => (float[1, 4] logits) { logits = Identity(past_key_0_in) }
    """
    assert "Requantize" not in page(tmp_path, result(text))
    assert "\n1 tensors are needed at two widths" in page(
        tmp_path, result(text, logits=encoding(0.2))
    )


@pytest.mark.parametrize(
    ("before", "after", "paired"),
    [
        ("past_key_values.3.value", "present.3.value", True),
        ("past_key_0_in", "past_key_0_out", True),
        ("past_key_0_in", "past_key_1_out", False),
        ("x", "y", False),
    ],
)
def test_caches_are_paired_by_name(before: str, after: str, paired: bool) -> None:
    graph = parse("g (float[1, 4] x) => (float[1, 4] y) { y = Relu(x) }").graph
    graph.inputs[0].name, graph.outputs[0].name = before, after
    assert cache_pairs(graph) == ([(before, after)] if paired else [])


@pytest.mark.parametrize("name", target_names())
def test_commands_of_every_profile_can_be_filled_in(name: str) -> None:
    target = load_target(name)
    for line in target.handoff:
        filled = line.format_map(placeholders(target, ()))
        assert "{" not in re.sub(r"\{\{|\}\}", "", filled)

"""HANDOFF.md: the commands, tensors and hashes of one compile."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.handoff import cache_pairs, placeholders, write_handoff
from qnpu.compiler.handout import Handout, make_handout
from qnpu.compiler.integer_io import io_encodings
from qnpu.compiler.op_traits import float_values
from qnpu.compiler.output import hash_file
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.quant_types import Encoding, QuantSpec
from qnpu.compiler.target import TargetProfile, Vendor, load_target, target_names
from qnpu.passes.insert_qdq import InsertQdq
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.passes.lower_io import LowerIo
from tests.conftest import parse

CACHED = """
    g (int64[1, 2] ids, float[1, 4] past_key_0_in) =>
        (float[1, 4] logits, float[1, 4] past_key_0_out)
    { past_key_0_out = Relu(past_key_0_in)  logits = Neg(past_key_0_out) }
"""
U8 = QuantSpec(8, False, False)


def encoding(scale: float = 0.1, zero: int = 128) -> Encoding:
    return Encoding(U8, np.array(scale, np.float32), np.array(zero, np.int32))


def result(text: str = CACHED, **encodings: Encoding) -> Handout:
    """A graph with Q/DQ pairs on every float tensor."""
    model = parse(text)
    compilation = Compilation(model)
    for value in float_values(model.graph):
        compilation.encodings[name_of(value)] = encodings.get(name_of(value), encoding())
    InsertQdq().run(compilation)
    return make_handout(model)


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
    handout: Handout | None = None,
    target: TargetProfile = TARGET,
    emitted: tuple[str, ...] = (),
) -> str:
    write_handoff(folder / "HANDOFF.md", handout or result(), target, emitted, -50.0)
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
    model = result(past_key_0_in=encoding(0.25, 3)).model
    assert LowerIo()(model).modified
    text = page(tmp_path, make_handout(model))
    assert "takes and returns codes" in text
    assert "| in | `past_key_0_in` | 1 x 4 | uint8 | uint8 | 0.25 | 3 |" in text
    assert "| in | `ids` | 1 x 2 | int64 |  |  |  |" in text


def test_real_numbers_without_an_encoding(tmp_path: Path) -> None:
    text = page(tmp_path, make_handout(parse(CACHED)))
    assert "| out | `logits` | 1 x 4 | float |  |  |  |" in text
    assert "have no encoding" in text


def test_the_page_tells_what_legalization_made(tmp_path: Path) -> None:
    """Sigmoid's encoding is forced; what was planned is not what comes out."""
    wide = QuantSpec(16, False, False)
    planned = Encoding(wide, np.array(1 / 32768, np.float32), np.array(0, np.int32))
    text = "g (float[1, 4] x) => (float[1, 4] y) { h = Sigmoid(x)  y = Reshape(h, s) }"
    text = text.replace(" {", " <int64[2] s = {1, 4}> {")
    model = result(text, x=planned, h=planned, y=planned).model
    assert "| uint16 | 3.05175781e-05 | 0 |" in page(tmp_path, make_handout(model))
    assert LegalizeTarget("qnn-htp-v75")(model).modified
    handout = make_handout(model)
    assert float(handout.encodings["h"].scale) == 1 / 65536
    assert float(handout.encodings["y"].scale) == float(io_encodings(model)["y"].scale)
    assert f"| {float(handout.encodings['y'].scale):.9g} |" in page(tmp_path, handout)


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
    text = "g (float[1, 4] x) => (float[1, 4] y) { h = Relu(x)  y = Identity(h) }"
    assert "Requantize" not in page(tmp_path, result(text))
    assert "\n1 tensors are needed at two encodings" in page(
        tmp_path, result(text, y=encoding(0.2))
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

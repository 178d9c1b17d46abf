"""Constants of a Q/DQ graph decoded once: the same bits, and only where that is safe."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.graph_edit import static_shape
from qnpu.compiler.printer import model_to_text
from qnpu.runtime_check.decoded_constants import decode_constants
from qnpu.runtime_check.session import Mode, open_session, run
from tests.conftest import normal, parse

WEIGHT = """
    g (float[1, 4] x) => (float[1, 2] y)
    <int8[4, 2] w = {1, -2, 3, 4, 5, -6, 7, 8}, float[2] s = {0.1, 0.3}, float[1, 2] b = {1, 2}>
    { f = DequantizeLinear <axis = 1> (w, s)  m = MatMul(x, f)  y = Add(m, b) }
"""
BLOCKS = """
    g (float[1, 4] x) => (float[1, 2] y)
    <int8[2, 4] w = {1, -2, 3, 4, 5, -6, 7, -7}, uint8[2, 2] k = {1, 2, 3, 15},
     float[2] s = {0.1, 0.3}>
    {
        c = DequantizeLinear <axis = 0> (k, s)
        f = DequantizeLinear <axis = 1, block_size = 2> (w, c)
        t = Transpose <perm = [1, 0]> (f)
        y = MatMul(x, t)
    }
"""
SHARED = """
    g (float[1, 2] x) => (float[1, 2] y, int8[2, 2] z)
    <int8[2, 2] w = {1, -2, 3, 4}, float s = {0.5}>
    {
        f = DequantizeLinear(w, s)
        t = Transpose <perm = [1, 0]> (f)
        m = MatMul(x, f)
        y = MatMul(m, t)
        z = Identity(w)
    }
"""


@pytest.mark.parametrize(
    ("text", "count", "left", "kept"),
    [
        (WEIGHT, 1, ["MatMul", "Add"], {"b", "f_decoded"}),
        (BLOCKS, 1, ["MatMul"], {"t_decoded"}),
        (SHARED, 2, ["MatMul", "MatMul", "Identity"], {"f_decoded", "t_decoded", "w"}),
    ],
)
def test_the_same_values_without_decoding(
    text: str, count: int, left: list[str], kept: set[str]
) -> None:
    before, after = parse(text), parse(text)
    feeds = {"x": normal(*(static_shape(before.graph.inputs[0]) or ()))}
    assert decode_constants(after) == count
    assert [node.op_type for node in after.graph] == left
    assert set(after.graph.initializers) == kept
    wanted = run(open_session(before, Mode.REFERENCE), None, feeds)
    found = run(open_session(after, Mode.REFERENCE, pack=False), None, feeds)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert decode_constants(after) == 0


@pytest.mark.parametrize("kind", ["", ", output_dtype = 0", ", output_dtype = 1"])
def test_types_that_a_file_does_not_tell(kind: str) -> None:
    model = parse(WEIGHT.replace("<axis = 1>", f"<axis = 1{kind}>"))
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].type = node.outputs[0].shape = None
    assert decode_constants(model) == 1
    (value,) = (v for name, v in model.graph.initializers.items() if name == "f_decoded")
    assert value.dtype == ir.DataType.FLOAT
    assert value.const_value is not None
    exact = np.array([[0.1, -0.6], [0.3, 1.2], [0.5, -1.8], [0.7, 2.4]], np.float32)
    np.testing.assert_allclose(value.const_value.numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        # Codes that a run is given, alone and as a default.
        """
        g (int8[2] x) => (float[2] y) <float s = {0.5}>
        { f = DequantizeLinear(x, s)  y = Neg(f) }
        """,
        """
        g (int8[2] x, float s) => (float[2] y) <float s = {0.5}, int8[2] w = {1, 2}>
        { f = DequantizeLinear(w, s)  y = Neg(f) }
        """,
        # A result, which has a name to keep.
        """
        g (float[2] x) => (float[2] y, float[2] f) <int8[2] w = {1, 2}, float s = {0.5}>
        { f = DequantizeLinear(w, s)  y = Add(x, f) }
        """,
        # Floats, whose products have their order from being packed.
        """
        g (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
        { t = Transpose <perm = [1, 0]> (w)  y = MatMul(x, t) }
        """,
    ],
    ids=["input", "default", "output", "float"],
)
def test_what_stays(text: str) -> None:
    model = parse(text)
    before = model_to_text(model)
    assert decode_constants(model) == 0
    assert model_to_text(model) == before


@pytest.mark.parametrize("rows", [1, 16])
def test_sums_keep_their_order(rows: int) -> None:
    """A packed weight is summed up in another order where ONNX Runtime likes to."""
    ones = ", ".join(["1"] * 64 * 64)
    text = f"""
        g (float[{rows}, 64] x) => (float[{rows}, 64] y)
        <int8[64, 64] w = {{{ones}}}, float s = {{0.1}}>
        {{ f = DequantizeLinear(w, s)  y = MatMul(x, f) }}
    """
    codes = np.random.default_rng(0).integers(-127, 128, (64, 64), np.int8)
    found = []
    for decode in (False, True):
        model = parse(text)
        model.graph.initializers["w"].const_value = ir.tensor(codes, name="w")
        assert not decode or decode_constants(model) == 1
        session = open_session(model, Mode.REFERENCE, pack=not decode)
        found.append(run(session, None, {"x": normal(rows, 64)})[0])
    np.testing.assert_array_equal(found[1], found[0])


def test_numbers_are_drawn_in_each_run() -> None:
    model = parse("""
        g (float[2] x) => (float[2] y) <int8[2] w = {1, 2}, float s = {0.5}>
        { f = DequantizeLinear(w, s)  r = RandomNormalLike(f)  y = Add(x, r) }
    """)
    assert decode_constants(model) == 1
    assert [node.op_type for node in model.graph] == ["RandomNormalLike", "Add"]


@pytest.mark.parametrize(("free", "count"), [(63, 0), (64, 1)])
def test_no_more_than_half_of_the_free_memory(
    free: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = parse(WEIGHT)  # 8 floats
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
    assert decode_constants(model) == count
    assert len(model.graph) == 3 - count

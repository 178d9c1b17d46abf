"""What a node computes on, as an NPU compiler sees it through the Q/DQ pairs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.operands import Operation, operations
from tests.conftest import parse

QDQ = """
    g (float[2, 4] x) => (float[2, 3] y)
    <float s = {0.5}, uint16 z = {32768}, float[3] t = {0.1, 0.2, 0.3}, int8[3] zw = {0, 0, 0},
     int8[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        wd = DequantizeLinear<axis: int = -1>(w, t, zw)
        p = MatMul(xd, wd)
        pq = QuantizeLinear(p, s, z)
        y = DequantizeLinear(pq, s, z)
    }
"""


def found(text: str) -> list[Operation]:
    return list(operations(parse(text).graph))


def test_a_linear() -> None:
    (matmul,) = found(QDQ)
    first, second = matmul.present
    assert str(matmul) == "MatMul(u16, constant s8 per channel) -> u16"
    assert (first.shape, first.granularity, first.axis, first.constant) == (
        (2, 4),
        "tensor",
        0,
        False,
    )
    assert (second.shape, second.granularity, second.axis) == ((4, 3), "channel", 1)
    assert second.scale is not None
    np.testing.assert_allclose(second.scale, [0.1, 0.2, 0.3])
    assert second.zero_point is not None
    assert second.zero_point.tolist() == [0, 0, 0]
    assert matmul.rank == 2
    assert matmul.outputs[0].same_encoding(first)
    assert not second.same_encoding(first)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("pq = QuantizeLinear(p, s, z)", "r = Relu(p) pq = QuantizeLinear(r, s, z)", "float"),
        (
            "float[3] t = {0.1, 0.2, 0.3}, int8[3] zw = {0, 0, 0}",
            "float t = {0.1}, int8 zw = {0}",
            "u16",
        ),
    ],
)
def test_a_result_is_encoded_only_where_each_user_quantizes_it(
    old: str, new: str, expected: str
) -> None:
    assert found(QDQ.replace(old, new))[0].outputs[0].dtype == expected


def test_users_that_quantize_differently() -> None:
    text = QDQ.replace("(float[2, 3] y)", "(float[2, 3] y, float[2, 3] v)").replace(
        "y = Deq", "v8 = QuantizeLinear(p, t8, z8) v = DequantizeLinear(v8, t8, z8) y = Deq"
    )
    text = text.replace("<float s", "<float t8 = {0.5}, uint8 z8 = {0}, float s")
    assert found(text)[0].outputs[0].dtype == "float"


def test_a_change_of_encoding_is_an_operation() -> None:
    text = """
        g (float[4] x) => (float[4] y)
        <float s = {0.5}, uint16 z = {32768}, float t = {0.1}, uint8 w = {128}>
        {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            vq = QuantizeLinear(xd, t, w)
            y = DequantizeLinear(vq, t, w)
        }
    """
    (convert,) = found(text)
    assert str(convert) == "Convert(u16) -> u8"
    same = text.replace("(xd, t, w)", "(xd, s, z)").replace("(vq, t, w)", "(vq, s, z)")
    assert found(same) == []


NIBBLES = "int4[4, 2] w = {1, 2, 3, 4, 5, 6, 7, -8}"
BYTES = "int8[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}"
BLOCKS = "float[2, 2] t = {1, 1, 1, 1}, int4[2, 2] z = {0, 0, 0, 0}"
BLOCK_CODES = "uint8[2, 2] q = {1, 2, 3, 4}, float[2] t = {1, 1}, uint8[2] zq = {0, 0}"
BY_BLOCK = "DequantizeLinear<axis: int = 0, block_size: int = 2>"


@pytest.mark.parametrize(
    ("constants", "dequantize", "expected"),
    [
        (f"{NIBBLES}, {BLOCKS}", f"wd = {BY_BLOCK}(w, t, z)", ("s4", "block", 0, 2)),
        (
            f"{BYTES}, float[1] t = {{1}}, int8[1] z = {{0}}",
            "wd = DequantizeLinear(w, t, z)",
            ("s8", "tensor", 0, 0),
        ),
        (f"{BYTES}, float t = {{1}}", "wd = DequantizeLinear(w, t)", ("s8", "tensor", 0, 0)),
        (
            f"{BYTES}, {BLOCK_CODES}",
            f"b = DequantizeLinear<axis: int = 1>(q, t, zq) wd = {BY_BLOCK}(w, b)",
            ("s8", "lpbq", 0, 2),
        ),
    ],
)
def test_granularities(
    constants: str, dequantize: str, expected: tuple[str, str, int, int]
) -> None:
    text = f"g (float[4] x) => (float[2] y) <{constants}> {{ {dequantize} y = MatMul(x, wd) }}"
    operand = found(text)[-1].inputs[1]
    assert operand is not None
    assert (operand.dtype, operand.granularity, operand.axis, operand.block) == expected


def test_tensors_without_an_encoding_keep_their_onnx_type() -> None:
    text = """
        g (float[5, 4] table, int64[2] ids) => (float[2, 4] y)
        { y = Gather(table, ids) }
    """
    (gather,) = found(text)
    assert str(gather) == "Gather(float, int64) -> float"
    assert not any(operand.quantized for operand in gather.present)


def test_names_of_other_domains_and_inputs_left_out() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[4] x) => (float[4] y) { v = Clip(x, , x) y = com.microsoft.Gelu(v) }
    """
    clip, gelu = operations(ir.from_onnx_text(text).graph)
    assert clip.inputs[1] is None
    assert gelu.op_type == "com.microsoft.Gelu"

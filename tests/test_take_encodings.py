"""take-encodings: encodings, chosen codes and constants by name, and graphs that do not agree."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.bit_plan import BitPlan
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.pass_base import Compilation, Stage
from qnpu.compiler.quant_types import Encoding, PerTensor, QuantSpec
from qnpu.passes.take_encodings import TakeEncodings
from tests.conftest import parse

U8, S8 = (QuantSpec(8, signed, signed, PerTensor()) for signed in (False, True))
TEXT = """
    g (float[1, 2] x) => (float[1, 2] y)
    <float[2, 2] w = {1, 2, 3, 4}, float[1, 2] mask = {5, 6}> {
        h = MatMul(x, w)
        y = Add(h, mask)
    }
"""
PLAN = {"x": U8, "w": S8, "mask": U8, "h": U8, "y": U8}
CONSTANTS = {
    "w": ir.tensor(np.full((2, 2), 7, np.float32), name="w"),
    "mask": ir.tensor(np.zeros((3, 2), np.float32), name="mask"),
}


def planned() -> Compilation:
    return Compilation(parse(TEXT), bit_plan=BitPlan("w8a8", dict(PLAN)), stage=Stage.PLANNED)


def table() -> EncodingTable:
    found = EncodingTable()
    for place, (name, spec) in enumerate(PLAN.items(), start=1):
        scale = np.array(place, np.float32)
        found[name] = Encoding(spec, scale, np.array(0, np.int32))
    found.choose_codes("w", found["w"], np.array([[9, 8], [7, 6]], np.int8))
    return found


def test_everything_is_the_other_graphs() -> None:
    compilation, other = planned(), table()
    item = TakeEncodings(BitPlan("w8a8", dict(PLAN)), other, CONSTANTS)
    assert item.run(compilation) == 5
    assert all(compilation.encodings[name].same_as(other[name]) for name in PLAN)
    weight = compilation.graph.initializers["w"].const_value
    assert weight is CONSTANTS["w"]
    codes = compilation.encodings.quantize("w", weight.numpy())
    np.testing.assert_array_equal(codes, [[9, 8], [7, 6]])
    mask = compilation.graph.initializers["mask"].const_value
    assert mask is not None
    np.testing.assert_array_equal(mask.numpy(), [[5, 6]])  # of another length there
    assert item.run(compilation) == 0


def test_graphs_that_differ() -> None:
    """QN312 names every tensor that the other graph lacks or holds in another way."""
    other = table()
    other.forget("h")
    plan = BitPlan("w8a8", PLAN | {"y": S8})
    with pytest.raises(DiagnosticError) as caught:
        TakeEncodings(plan, other, {}).run(planned())
    found = [(d.code, d.location.value) for d in caught.value.diagnostics]
    assert found == [("QN312", "h"), ("QN312", "y")]

"""Encodings files of AIMET and QNN: golden entries, no gaps, and what comes back when read."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.encoding_formats import VERSIONS, export_encodings, read_encodings
from qnpu.compiler.encodings import EncodingTable
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.op_traits import float_values
from qnpu.compiler.pass_base import Compilation
from qnpu.compiler.quant_types import Encoding, PerBlock, PerChannel, PerTensor, QuantSpec
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.feeds import ArraySamples
from qnpu.runtime_check.observer import RangeMethod
from tests.conftest import Array, normal, parse


@lru_cache
def linear(channels: int = 2) -> ir.Graph:
    """x (1, 3) times w (3, channels) plus b."""
    weights = ", ".join("1" for _ in range(3 * channels))
    biases = ", ".join("1" for _ in range(channels))
    return parse(
        f"g (float[1, 3] x) => (float[1, {channels}] y)"
        f" <float[3, {channels}] w = {{{weights}}}, float[{channels}] b = {{{biases}}}>"
        " { y = Gemm(x, w, b) }"
    ).graph


def encoding(
    bits: int, signed: bool, scale: Any, zero: Any, *, symmetric: bool, axis: int | None = None
) -> Encoding:
    granularity = PerTensor() if axis is None else PerChannel(axis)
    spec = QuantSpec(bits, signed, symmetric, granularity)
    return Encoding(spec, np.array(scale, np.float32), np.array(zero, np.int32))


def table(**encodings: Encoding) -> EncodingTable:
    result = EncodingTable()
    for name, item in encodings.items():
        result[name] = item
    return result


X = encoding(8, False, 0.5, 100, symmetric=False)
Y = encoding(16, False, 0.25, 32768, symmetric=False)
W = encoding(4, True, [0.5, 2.0], [0, 0], symmetric=True, axis=1)
B = encoding(32, True, [0.25, 1.0], [0, 0], symmetric=True, axis=0)


def exported(version: str) -> dict[str, Any]:
    """Of the linear, as a reader of the file gets it."""
    document = export_encodings(table(x=X, w=W, b=B, y=Y), linear(), version)
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


# ------------------------------------------------------------------------------------------- write


def channel(bits: int, scale: float, offset: int, low: float, high: float) -> dict[str, Any]:
    return {
        "bitwidth": bits,
        "dtype": "int",
        "is_symmetric": str(bits in (4, 32)),
        "max": high,
        "min": low,
        "offset": offset,
        "scale": scale,
    }


def test_version_0_6_1() -> None:
    document = exported("0.6.1")
    assert document["activation_encodings"] == {
        "x": [channel(8, 0.5, -100, -50.0, 77.5)],
        "y": [channel(16, 0.25, -32768, -8192.0, 8191.75)],
    }
    assert document["param_encodings"] == {
        "w": [channel(4, 0.5, -8, -4.0, 3.5), channel(4, 2.0, -8, -16.0, 14.0)],
        "b": [
            channel(32, 0.25, -(2**31), -(2.0**29), 2.0**29 - 0.25),
            channel(32, 1.0, -(2**31), -(2.0**31), 2.0**31 - 1),
        ],
    }


def test_version_1_0_0() -> None:
    document = exported("1.0.0")
    common = {"dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False}
    assert document["activation_encodings"] == [
        {**common, "name": "x", "bw": 8, "scale": [0.5], "offset": [-100]},
        {**common, "name": "y", "bw": 16, "scale": [0.25], "offset": [-32768]},
    ]
    common = {"dtype": "INT", "enc_type": "PER_CHANNEL", "is_sym": True}
    assert document["param_encodings"] == [
        {**common, "name": "w", "bw": 4, "scale": [0.5, 2.0], "offset": [-8, -8]},
        {**common, "name": "b", "bw": 32, "scale": [0.25, 1.0], "offset": [-(2**31)] * 2},
    ]


def test_version_2_0_0() -> None:
    assert exported("2.0.0")["encodings"] == [
        {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 100},
        {"name": "w", "output_dtype": "int4", "y_scale": [0.5, 2.0], "axis": 1},
        {"name": "b", "output_dtype": "int32", "y_scale": [0.25, 1.0], "axis": 0},
        {"name": "y", "output_dtype": "uint16", "y_scale": 0.25, "y_zero_point": 32768},
    ]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_names_its_version_and_maker(version: str) -> None:
    document = exported(version)
    assert document["version"] == version
    assert document["producer"]["package"] == "qnpu"
    sections = {"encodings"} if version == "2.0.0" else {"activation_encodings", "param_encodings"}
    assert set(document) == sections | {"version", "producer"}


def test_signed_codes_off_the_middle() -> None:
    """Where a version calls all signed codes symmetric, the unsigned ones of the same numbers."""
    signed = encoding(8, True, 0.5, -28, symmetric=False)
    graph = parse("g (float[4] x) => (float[4] y) { y = Relu(x) }").graph
    both = table(x=signed, y=signed)
    old = export_encodings(both, graph, "1.0.0")["activation_encodings"]
    assert isinstance(old, list)
    assert (old[0]["is_sym"], old[0]["offset"]) == (False, [-100])
    new = export_encodings(both, graph, "2.0.0")["encodings"]
    assert isinstance(new, list)
    assert (new[0]["output_dtype"], new[0]["y_zero_point"]) == ("int8", -28)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_gap_is_named(version: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        export_encodings(table(x=X, b=B), linear(), version)
    assert caught.value.codes == ["QN303", "QN303"]
    assert [d.location.value for d in caught.value.diagnostics] == ["w", "y"]


def names(document: dict[str, Any]) -> list[str]:
    if document["version"] == "2.0.0":
        return [entry["name"] for entry in document["encodings"]]
    both = (document["activation_encodings"], document["param_encodings"])
    return [item if isinstance(item, str) else item["name"] for part in both for item in part]


@pytest.mark.parametrize("version", VERSIONS)
def test_no_tensor_of_a_calibrated_graph_is_left_out(version: str) -> None:
    """Constants, requantize points and a bias included; nothing that the graph does not have."""
    model = parse("""
        g (float[1, 4] x) => (float[1, 2] y, float[1, 2, 1] t)
        <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8},
         float[4] b = {1, 2, 3, 4},
         float half = {0.5}, float[4, 2] v = {1, 2, 3, 4, 5, 6, 7, 8}, int64[3] shape = {1, 2, 1}>
        {
            h = Gemm(x, w, b)
            s = Mul(h, half)
            y = MatMul(s, v)
            t = Reshape(y, shape)
        }
    """)
    compilation = Compilation(model)
    AssignBitWidths(Scheme.parse("w4a8")).run(compilation)
    samples = ArraySamples({"x": normal(2, 4)})
    CalibrateRanges(samples, RangeMethod.MIN_MAX).run(compilation)
    UnifyEncodings().run(compilation)
    compilation.encodings["of another graph"] = X
    document = json.loads(json.dumps(export_encodings(compilation.encodings, model.graph, version)))
    expected = [name_of(value) for value in float_values(model.graph)]
    assert sorted(names(document)) == sorted(expected)
    assert {"x", "w", "b", "half", "h", "t"} < set(expected)
    again = read_encodings(document, model.graph)
    assert sorted(again) == sorted(expected)
    assert all(same_codes(compilation.encodings[name], again[name], rank=2) for name in expected)


# -------------------------------------------------------------------------------------------- read


def unsigned_codes(item: Encoding, real: Array) -> Array:
    shift = 2 ** (item.spec.bits - 1) if item.spec.signed else 0
    return item.quantize(real).astype(np.int64) + shift


def reals(item: Encoding, rank: int, position: float) -> Array:
    """For each channel, a number within what the codes reach, at a fraction of the way.

    Signed codes about zero are symmetric to a reader, so their lowest code is left out.
    """
    symmetric = item.spec.signed and not item.zero_point.any()
    low = -item.high if symmetric else item.low
    middle = low + position * (item.high - low)
    shape = [1] * rank
    if isinstance(item.spec.granularity, PerChannel):
        shape[item.spec.granularity.axis] = -1
    return middle.reshape(shape).astype(np.float32)


def same_codes(before: Encoding, after: Encoding, rank: int, position: float = 0.3) -> bool:
    rank = max(rank if before.scale.size > 1 else 1, 1)
    if isinstance(before.spec.granularity, PerChannel):
        rank = max(rank, before.spec.granularity.axis + 1)
    real = reals(before, rank, position)
    return np.array_equal(unsigned_codes(before, real), unsigned_codes(after, real))


SCALES = st.floats(2.0**-100, 2.0**90, width=32)


@st.composite
def encodings(draw: st.DrawFn, channels: int | None, axis: int = 0) -> Encoding:
    """Anything that a QuantSpec allows; per tensor where ``channels`` is None."""
    bits, signed = draw(
        st.sampled_from(
            [(4, True), (4, False), (8, True), (8, False), (16, True), (16, False), (32, True)]
        )
    )
    symmetric = bits == 32 or draw(st.booleans())  # of biases, which have no zero point
    count = channels or 1
    if symmetric:
        zeros = [0 if signed else 2 ** (bits - 1)] * count
    else:
        spec = QuantSpec(bits, signed, False)
        zeros = draw(st.lists(st.integers(spec.q_min, spec.q_max), min_size=count, max_size=count))
    scales = draw(st.lists(SCALES, min_size=count, max_size=count))
    if channels is None:
        return encoding(bits, signed, scales[0], zeros[0], symmetric=symmetric)
    return encoding(bits, signed, scales, zeros, symmetric=symmetric, axis=axis)


@given(st.data(), st.sampled_from(VERSIONS), st.integers(1, 4), st.floats(0, 1))
def test_reading_gives_the_same_codes(
    data: st.DataObject, version: str, channels: int, position: float
) -> None:
    before = table(
        x=data.draw(encodings(None)),
        y=data.draw(encodings(None)),
        w=data.draw(encodings(channels, axis=1) | encodings(None)),
        b=data.draw(encodings(channels) | encodings(None)),
    )
    graph = linear(channels)
    document = json.loads(json.dumps(export_encodings(before, graph, version)))
    after = read_encodings(document, graph)
    assert set(after) == set(before)
    for name in before:
        assert np.array_equal(before[name].scale.reshape(-1), after[name].scale.reshape(-1))
        assert same_codes(before[name], after[name], rank=2, position=position), name


@pytest.mark.parametrize("version", VERSIONS)
def test_what_comes_back(version: str) -> None:
    again = read_encodings(exported(version), linear())
    for name, item in {"x": X, "w": W, "b": B, "y": Y}.items():
        assert again[name].same_as(item), name


def test_an_axis_from_the_end_and_whole_floats() -> None:
    """As AIMET writes them."""
    document = exported("2.0.0")
    document["encodings"][1]["axis"] = -1
    assert read_encodings(document, linear())["w"].same_as(W)
    document = exported("1.0.0")
    document["param_encodings"][0]["offset"] = [-8.0, -8.0]
    assert read_encodings(document, linear())["w"].same_as(W)


# Version, path to a place in the file, what stands there instead (None: nothing).
FAULTS: list[tuple[str, tuple[str | int, ...], Any]] = [
    *[(version, ("version",), "3.0.0") for version in VERSIONS],
    *[(version, ("version",), None) for version in VERSIONS],
    ("0.6.1", ("param_encodings",), None),
    ("0.6.1", ("param_encodings", "w"), []),
    ("0.6.1", ("param_encodings", "w", 0, "bitwidth"), 5),
    ("0.6.1", ("param_encodings", "w", 0, "bitwidth"), 8),  # the other channel has 4
    ("0.6.1", ("param_encodings", "w", 0, "bitwidth"), "4"),
    ("0.6.1", ("param_encodings", "w", 0, "dtype"), "float"),
    ("0.6.1", ("param_encodings", "w", 0, "is_symmetric"), True),
    ("0.6.1", ("param_encodings", "w", 0, "scale"), 0.0),
    ("0.6.1", ("param_encodings", "w", 0, "scale"), -1.0),
    ("0.6.1", ("param_encodings", "w", 0, "scale"), 1e39),
    ("0.6.1", ("param_encodings", "w", 0, "scale"), 1e-39),
    ("0.6.1", ("param_encodings", "w", 0, "scale"), float("nan")),
    ("0.6.1", ("param_encodings", "w", 0, "scale"), True),
    ("0.6.1", ("param_encodings", "w", 0, "offset"), -8.5),
    ("0.6.1", ("param_encodings", "w", 0, "offset"), float("inf")),
    ("0.6.1", ("param_encodings", "w", 0, "offset"), True),
    ("0.6.1", ("param_encodings", "w", 0, "offset"), None),
    ("0.6.1", ("param_encodings", "w", 0, "bw"), 4),
    ("0.6.1", ("param_encodings", "x"), [channel(8, 0.5, -100, -50.0, 77.5)]),
    ("0.6.1", ("param_encodings", "absent"), [channel(8, 0.5, -100, -50.0, 77.5)]),
    ("1.0.0", ("param_encodings", 0, "name"), "x"),
    ("1.0.0", ("param_encodings", 0, "name"), ""),
    ("1.0.0", ("param_encodings", 0, "enc_type"), "LPBQ"),
    ("1.0.0", ("param_encodings", 0, "enc_type"), "PER_TENSOR"),
    ("1.0.0", ("param_encodings", 0, "scale"), [0.5]),
    ("1.0.0", ("param_encodings", 0, "scale"), [0.5, 2.0, 2.0]),
    ("1.0.0", ("param_encodings", 0, "scale"), []),
    ("1.0.0", ("param_encodings", 0, "scale"), 0.5),
    ("1.0.0", ("param_encodings", 0, "offset"), [-16, -8]),
    ("1.0.0", ("param_encodings", 0, "is_sym"), "True"),
    ("1.0.0", ("param_encodings", 1, "is_sym"), False),  # unsigned codes of 32 bits
    ("1.0.0", ("activation_encodings", 0, "offset"), [1]),
    ("1.0.0", ("activation_encodings", 0, "offset"), [-256]),
    ("1.0.0", ("activation_encodings", 0, "offset"), [-(10**400)]),
    ("1.0.0", ("activation_encodings", 0, "y_scale"), 0.5),
    ("2.0.0", ("encodings",), {}),
    ("2.0.0", ("encodings", 0), []),
    ("2.0.0", ("encodings", 0, "bw"), 8),
    ("2.0.0", ("encodings", 0, "output_dtype"), "float16"),
    ("2.0.0", ("encodings", 0, "y_scale"), [0.5]),
    ("2.0.0", ("encodings", 0, "y_scale"), [[0.5]]),
    ("2.0.0", ("encodings", 0, "y_zero_point"), 256),
    ("2.0.0", ("encodings", 0, "y_zero_point"), -1),
    ("2.0.0", ("encodings", 0, "y_zero_point"), [100]),
    ("2.0.0", ("encodings", 0, "name"), "w"),
    ("2.0.0", ("encodings", 1, "axis"), None),
    ("2.0.0", ("encodings", 1, "axis"), 0),
    ("2.0.0", ("encodings", 1, "axis"), 2),
    ("2.0.0", ("encodings", 1, "axis"), -3),
    ("2.0.0", ("encodings", 1, "axis"), True),
    ("2.0.0", ("encodings", 1, "block_size"), 16),
    ("2.0.0", ("encodings", 1, "y_zero_point"), [0]),
]


@pytest.mark.parametrize(("version", "path", "instead"), FAULTS, ids=str)
def test_faults_of_a_file(version: str, path: tuple[str | int, ...], instead: Any) -> None:
    document = exported(version)
    *parents, last = path
    place: Any = document
    for key in parents:
        place = place[key]
    if instead is None:
        del place[last]
    else:
        place[last] = instead
    with pytest.raises(DiagnosticError) as caught:
        read_encodings(document, linear())
    assert caught.value.codes == ["QN306"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "x", "w", "int8", "int", "INT", "True", "PER_CHANNEL", *VERSIONS]),
    lambda item: (
        st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=3), item, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data(), st.sampled_from(VERSIONS))
def test_any_other_file_is_a_fault(data: st.DataObject, version: str) -> None:
    """A valid file with one place replaced by any JSON: read, or refused with a code."""
    document = copy.deepcopy(EXPORTED[version])
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    try:
        read_encodings(document, linear())
    except DiagnosticError as error:
        assert error.codes == ["QN306"]


EXPORTED = {version: exported(version) for version in VERSIONS}


@pytest.mark.parametrize("document", [None, [], "2.0.0", 1, {}, {"version": []}])
def test_what_is_no_encodings_file(document: Any) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read_encodings(document, linear())
    assert caught.value.codes == ["QN306"]


def blocks() -> tuple[ir.Graph, EncodingTable]:
    """x (1, 4) times w (4, 2) in blocks of 2."""
    graph = parse(
        "g (float[1, 4] x) => (float[1, 2] y) <float[4, 2] w = {1, 1, 1, 1, 1, 1, 1, 1}>"
        " { y = MatMul(x, w) }"
    ).graph
    weight = Encoding(
        QuantSpec(4, True, True, PerBlock(0, 2)),
        np.array([0.5, 0.25], np.float32),
        np.zeros(2, np.int32),
        np.array([[3, 15], [1, 7]], np.uint8),
    )
    return graph, table(x=X, w=weight, y=Y)


def test_blocks_in_version_1_0_0() -> None:
    """As AIMET writes them: codes of 8 bits, compressed to 4, block scales channel by channel."""
    graph, encodings = blocks()
    document: Any = json.loads(json.dumps(export_encodings(encodings, graph, "1.0.0")))
    assert document["param_encodings"] == [
        {
            "name": "w",
            "dtype": "INT",
            "enc_type": "LPBQ",
            "is_sym": True,
            "bw": 8,
            "compressed_bw": 4,
            "block_size": 2,
            "scale": [0.5, 0.25],
            "offset": [-128, -128],
            "per_block_int_scale": [3, 1, 15, 7],
        }
    ]


def test_blocks_in_version_2_0_0() -> None:
    graph, encodings = blocks()
    document: Any = json.loads(json.dumps(export_encodings(encodings, graph, "2.0.0")))
    assert document["encodings"][1] == {
        "name": "w",
        "output_dtype": "int4",
        "per_channel_float_scale": [[0.5, 0.25]],
        "per_block_int_scale": [[3, 15], [1, 7]],
        "axis": 0,
        "block_size": 2,
    }


def test_blocks_that_a_version_cannot_hold() -> None:
    graph, encodings = blocks()
    with pytest.raises(DiagnosticError) as caught:
        export_encodings(encodings, graph, "0.6.1")
    assert caught.value.codes == ["QN314"]

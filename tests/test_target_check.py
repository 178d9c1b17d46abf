"""Verdicts on nodes: the first row that fits decides."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from qnpu.compiler.operands import operations
from qnpu.compiler.target import Fault, TargetProfile, Verdict, load_target, target_names
from qnpu.compiler.target_check import check_target, judge
from qnpu.runtime_check.htp import HtpCompiler, is_available
from tests.conftest import parse, shared_file
from tests.htp_cases import build_case, sweep
from tests.htp_corners import corner_cases
from tests.htp_random import random_cases
from tests.qdq_cases import Case, matmul_const

CONVERSION = """
    g (float[4] x) => (float[4] y)
    <float s = {0.5}, int8 z = {0}, float t = {0.1}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        vq = QuantizeLinear(xd, t, z)
        y = DequantizeLinear(vq, t, z)
    }
"""
RELU = """
    g (float[2, 4] x) => (float[2, 4] y)
    <float s = {0.5}, uint8 z = {128}, float t = {0.25}>
    {
        xq = QuantizeLinear(x, s, z)
        xd = DequantizeLinear(xq, s, z)
        p = Relu(xd)
        pq = QuantizeLinear(p, s, z)
        y = DequantizeLinear(pq, s, z)
    }
"""
DIFFERENT = RELU.replace("(p, s, z)", "(p, t, z)").replace("(pq, s, z)", "(pq, t, z)")
BARE = RELU.replace("pq = Quant", "r = Relu(p) pq = Quant").replace("Linear(p, ", "Linear(r, ")


def profile(*rules: dict[str, Any], **more: Any) -> TargetProfile:
    rows = [{"verdict": "int", **rule} for rule in rules]
    return TargetProfile.model_validate({"id": "test", "rules": rows, **more})


def verdict(text: str, target: TargetProfile) -> Verdict:
    return check_target(parse(text), target).verdict


@pytest.mark.parametrize(
    ("rule", "same", "different"),
    [
        ({"ops": ["Relu"]}, True, True),
        ({"ops": ["*"]}, True, True),
        ({"ops": ["Sigmoid"]}, False, False),
        ({"ops": ["Relu"], "inputs": [["u8"]]}, True, True),
        ({"ops": ["Relu"], "inputs": [["s8"], ["u8"]]}, True, True),
        ({"ops": ["Relu"], "inputs": [["s8"]]}, False, False),
        ({"ops": ["Relu"], "inputs": [["u8", "*"]]}, False, False),
        ({"ops": ["Relu"], "inputs": [["u8", "-"]]}, True, True),
        ({"ops": ["Relu"], "output": "="}, True, True),
        ({"ops": ["Relu"], "output": "s8"}, False, False),
        ({"ops": ["Relu"], "output_is_not": "="}, False, False),
        ({"ops": ["Relu"], "output_is_not": "s8"}, True, True),
        ({"ops": ["Relu"], "encodings": "same"}, True, False),
        ({"ops": ["Relu"], "encodings": "differ"}, False, True),
        ({"ops": ["Relu"], "all_encodings": "same"}, True, False),
        ({"ops": ["Relu"], "shapes": "same"}, False, False),
        ({"ops": ["Relu"], "broadcast": 0}, False, False),
        ({"ops": ["Relu"], "merged": "scale-differs"}, False, False),
        ({"ops": ["Relu"], "step_above": 0.0}, False, False),
        ({"ops": ["Relu"], "types": "same"}, True, True),
        ({"ops": ["Relu"], "types": "differ"}, False, False),
        ({"ops": ["Relu"], "rank_above": 1}, True, True),
        ({"ops": ["Relu"], "rank_above": 2}, False, False),
        ({"ops": ["Relu"], "rank_below": 3}, True, True),
        ({"ops": ["Relu"], "rank_below": 2}, False, False),
        ({"ops": ["Relu"], "attributes": {"axis": ["absent"]}}, True, True),
        ({"ops": ["Relu"], "attributes": {"axis": [1]}}, False, False),
        ({"ops": ["Relu"], "unless_forced": {"scale": 0.5, "zero_point": 128}}, False, True),
        ({"ops": ["Relu"], "min_arch": 73}, True, True),
        ({"ops": ["Relu"], "min_arch": 79}, False, False),
        ({"ops": ["Relu"], "max_arch": 68}, False, False),
        ({"ops": ["Relu"], "island": True}, False, False),
    ],
)
def test_conditions(rule: dict[str, Any], same: bool, different: bool) -> None:
    target = profile(rule, vendor={"arch": 75}, unlisted="reject")
    found = tuple(verdict(text, target) is Verdict.INT for text in (RELU, DIFFERENT))
    assert found == (same, different)


def test_attributes_of_a_node() -> None:
    softmax = RELU.replace("Relu(xd)", "Softmax<axis: int = 1>(xd)")
    for allowed, fits in (
        ([1], True),
        ([0], False),
        (["last"], True),
        (["not-last"], False),
        (["not-one"], False),
    ):
        target = profile({"ops": ["Softmax"], "attributes": {"axis": allowed}}, unmatched="float")
        assert (verdict(softmax, target) is Verdict.INT) == fits


@pytest.mark.parametrize(("axis", "last"), [(-1, True), (1, False)])
def test_the_last_axis_of_a_tensor_of_unknown_rank(axis: int, last: bool) -> None:
    """Axis 1 may be the last one or not; -1 is."""
    softmax = f"p = Softmax<axis: int = {axis}>(xd)"
    model = parse(RELU.replace("p = Relu(xd)", softmax))
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    target = profile({"ops": ["Softmax"], "attributes": {"axis": ["last"]}}, unmatched="float")
    assert (check_target(model, target).verdict is Verdict.INT) == last


@pytest.mark.parametrize(
    ("other", "same", "broadcast"),
    [("float[2, 4]", True, False), ("float[4]", False, True), ("float[1]", False, False)],
)
def test_shapes_of_two_operands(other: str, same: bool, broadcast: bool) -> None:
    add = RELU.replace("float[2, 4] x)", f"float[2, 4] x, {other} o)").replace(
        "p = Relu(xd)",
        "oq = QuantizeLinear(o, s, z) od = DequantizeLinear(oq, s, z) p = Add(xd, od)",
    )
    for condition, fits in (({"shapes": "same"}, same), ({"broadcast": 1}, broadcast)):
        target = profile({"ops": ["Add"], **condition}, unmatched="float")
        model = parse(add)
        common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
        assert (check_target(model, target).verdict is Verdict.INT) == fits


@pytest.mark.parametrize(("scale", "silent"), [(0.2, True), (0.01, False)])
def test_products_in_steps_of_many_lsb(scale: float, silent: bool) -> None:
    """256 · s_x · s_w / s_y: about 38 and 2."""
    case = matmul_const("u16", "s4", "channel", scale=scale)
    found = check_target(built(case), load_target("qnn-htp-v75")).verdict
    assert found is (Verdict.SILENT if silent else Verdict.INT)


def test_a_permutation_of_channels() -> None:
    target = profile(
        {"ops": ["Transpose"], "attributes": {"perm": ["channels"]}}, unmatched="float"
    )
    for perm, fits in (("0, 2, 1", True), ("0, 3, 1, 2", True), ("0, 2, 3, 1", True),
                       ("1, 0", False), ("0, 1, 2", False), ("0, 2, 1, 3", False)):  # fmt: skip
        text = RELU.replace("Relu(xd)", f"Transpose<perm: ints = [{perm}]>(xd)")
        assert (verdict(text, target) is Verdict.INT) == fits


def test_the_first_row_that_fits_decides() -> None:
    rows: list[dict[str, Any]] = [
        {"ops": ["Relu"], "encodings": "differ", "verdict": "float", "fault": "encodings"},
        {"ops": ["Relu"]},
    ]
    assert verdict(RELU, profile(*rows)) is Verdict.INT
    assert verdict(DIFFERENT, profile(*rows)) is Verdict.FLOAT
    assert verdict(DIFFERENT, profile(*reversed(rows))) is Verdict.INT


def test_what_no_row_speaks_of() -> None:
    listed = {"ops": ["Relu"], "inputs": [["s8"]]}
    assert verdict(RELU, profile(listed)) is Verdict.REJECT
    assert verdict(RELU, profile(listed, unmatched="float")) is Verdict.FLOAT
    assert verdict(RELU, profile()) is Verdict.UNKNOWN
    assert verdict(RELU, profile(unlisted="reject")) is Verdict.REJECT


def test_a_node_without_encodings_is_a_float_island() -> None:
    report = check_target(parse(BARE), profile({"ops": ["Relu"]}))
    assert [node.verdict for node in report.nodes] == [Verdict.FLOAT, Verdict.FLOAT]
    assert {node.fault for node in report.nodes} == {Fault.ISLAND}
    refused = profile({"ops": ["Relu"]}, islands="reject")
    assert check_target(parse(BARE), refused).verdict is Verdict.REJECT
    special = profile({"ops": ["Relu"], "island": True})
    assert check_target(parse(BARE), special).verdict is Verdict.INT


def test_constants_that_steer_a_node_make_no_island() -> None:
    clip = RELU.replace("Relu(xd)", "Clip(xd, s, t)")
    assert verdict(clip, profile({"ops": ["Clip"]})) is Verdict.INT
    add = RELU.replace("Relu(xd)", "Add(xd, s)")
    assert verdict(add, profile({"ops": ["Add"]})) is Verdict.FLOAT


def test_the_worst_node_speaks_for_the_graph() -> None:
    order = [Verdict.INT, Verdict.SILENT, Verdict.UNKNOWN, Verdict.FLOAT, Verdict.REJECT]
    assert sorted(Verdict, key=lambda v: v.badness) == order
    assert (
        check_target(parse("g (int64[1] x) => (int64[1] x) {}"), profile()).verdict is Verdict.INT
    )


@pytest.mark.parametrize("arch", ["v68", "v69", "v73", "v75", "v79", "v81"])
def test_verdicts_recorded_from_the_real_compiler(arch: str) -> None:
    """At least 99 % alike, and nothing called integer that is not."""
    recorded = json.loads(shared_file("design/htp_verdicts.json").read_text("utf-8"))["cases"]
    target = load_target(f"qnn-htp-{arch}")
    wrong: dict[str, tuple[str, str]] = {}
    for name, by_arch in recorded.items():
        model = ir.from_proto(build_case(name))
        common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
        found = check_target(model, target).verdict
        said = "int" if found is Verdict.SILENT else found.value
        if said != by_arch[arch]["verdict"]:
            wrong[name] = said, by_arch[arch]["verdict"]
    assert len(wrong) <= 0.01 * len(recorded), wrong
    assert not [name for name, (said, _) in wrong.items() if said == "int"]


def built(case: Case) -> ir.Model:
    model = ir.from_proto(case.build())
    common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    return model


@pytest.mark.parametrize(
    ("case", "expected"), [pytest.param(c, v, id=c.name) for c, v in corner_cases()]
)
def test_corners(case: Case, expected: str) -> None:
    found = check_target(built(case), load_target("qnn-htp-v75")).verdict
    assert (Verdict.INT if found is Verdict.SILENT else found) == expected


@pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
def test_the_real_compiler_on_corners_and_fresh_cases() -> None:
    """More random ones: bench/oracle_agreement.py."""
    target = load_target("qnn-htp-v75")
    said = [(case, expected) for case, expected in corner_cases()]
    with HtpCompiler() as htp:
        for case, expected in said:
            assert htp.compile(case.build(), "v75").verdict.value == expected, case.name
        alike = 0
        fresh = list(random_cases(2026, 60))
        for case in fresh:
            ours = check_target(built(case), target).verdict
            theirs = htp.compile(case.build(), "v75").verdict.value
            alike += (Verdict.INT if ours is Verdict.SILENT else ours) == theirs
    assert alike >= len(fresh) - 1


def some_graphs() -> Iterator[ir.Model]:
    """Of all kinds, those first that reach most rows."""
    yield parse(CONVERSION)
    yield parse("g (float[4] x) => (float[4] y) { y = Erf(x) }")
    yield from (ir.from_proto(build_case(name)) for name in ("QLinearMatMul", "MatMulInteger"))
    swept = list(sweep())
    random.Random(0).shuffle(swept)  # neighbours are alike
    corners = [case for case, _ in corner_cases()]
    for case in chain(corners, swept, random_cases(1, 1000), random_cases(2, 1000)):
        yield built(case)


def test_every_row_of_a_profile_decides_some_case() -> None:
    """A row that no graph reaches says nothing. One inherited by many need do so for one."""
    names = [n for n in target_names() if "htp" not in n or n in ("qnn-htp-v68", "qnn-htp-v81")]
    profiles = [load_target(name) for name in names]
    texts = {id(rule): str(rule) for profile in profiles for rule in profile.rules}
    missing = {texts[id(rule)] for profile in profiles for rule in profile.rules_for_arch()}
    for graph in some_graphs():
        found = list(operations(graph.graph))
        for profile in profiles:
            rules = [judge(operation, profile).rule for operation in found]
            missing -= {texts[id(rule)] for rule in rules if rule is not None}
        if not missing:
            break
    assert missing == set()

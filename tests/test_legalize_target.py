"""Rewrites for a target: the verdict becomes int, and the numbers stay within a stated bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from qnpu.compiler.config import CompileConfig
from qnpu.compiler.op_traits import is_float
from qnpu.compiler.operands import input_operand, operations
from qnpu.compiler.pass_base import Compilation, Stage, run_passes
from qnpu.compiler.pipeline import default_passes
from qnpu.compiler.printer import model_to_text
from qnpu.compiler.qdq_edit import QdqEditor, encoding_of, finer, same_numbers, spec_of
from qnpu.compiler.quant_types import Encoding
from qnpu.compiler.target import TargetProfile, Verdict, load_target
from qnpu.compiler.target_check import check_target
from qnpu.compiler.target_faults import target_faults
from qnpu.compiler.verify import verify_stage
from qnpu.passes.legalize_rank import Regrouping, regroup, transposed
from qnpu.passes.legalize_target import LegalizeTarget
from qnpu.passes.legalize_weights import to_lpbq
from qnpu.runtime_check.htp import HtpCompiler, HtpVerdict, compare_on_emulator, is_available
from qnpu.runtime_check.oracle import random_feeds
from tests.conftest import Array, apply, normal, parse, relative_error, run_model
from tests.qdq_cases import (
    SHAPE,
    Case,
    Operand,
    Step,
    bias,
    binary,
    const,
    floats,
    gemm,
    ints,
    matmul_const,
    matmul_dynamic,
    single,
    unary,
    x,
    y,
)
from tests.test_passes_contract import DECODER, WINDOWS

needs_htp = pytest.mark.skipif(not is_available(), reason="onnxruntime-qnn is not installed")
V75, V68 = load_target("qnn-htp-v75"), load_target("qnn-htp-v68")


@pytest.fixture(scope="module")
def htp() -> Iterator[HtpCompiler]:
    with HtpCompiler() as compiler:
        yield compiler


def model_of(case: Case) -> ir.Model:
    model = ir.from_proto(case.build())
    common.ShapeInferencePass(strict_mode=False, check_type=False)(model)
    return model


def legalized(model: ir.Model, target: TargetProfile = V75) -> tuple[int, list[str]]:
    """Count, and what the operations then are; a second run must change nothing."""
    compilation = Compilation(model, target, stage=Stage.QDQ)
    count = LegalizeTarget().run(compilation)
    text = model_to_text(model)
    assert LegalizeTarget().run(compilation) == 0
    assert model_to_text(model) == text
    if all(not is_float(v) for n in model.graph for v in n.inputs if v and v.is_initializer()):
        verify_stage(compilation)
    return count, [str(operation) for operation in operations(model.graph)]


def largest_lsb(before: ir.Model, after: ir.Model) -> float:
    """Largest difference of any output, LSB of the encoding it ends with."""
    feeds = random_feeds(before.graph)
    worst = 0.0
    outputs = zip(run_model(before, feeds), run_model(after, feeds), strict=True)
    for value, (old, new) in zip(after.graph.outputs, outputs, strict=True):
        encoding = encoding_of(input_operand(value))
        step = float(encoding.scale) if encoding is not None and is_float(value) else 1.0
        difference = np.abs(old.astype(np.float64) - new.astype(np.float64)).max()
        worst = max(worst, float(difference) / step)
    return worst


@dataclass(frozen=True)
class Example:
    """A graph that a target does not take as written.

    Attributes:
        case: the graph.
        lsb: how far an output may move.
        targets: where it is to become legal.
    """

    case: Case
    lsb: float
    targets: tuple[TargetProfile, ...] = (V75,)

    @property
    def name(self) -> str:
        return self.case.name


SLIGHTLY_MORE = 0.01  # of an LSB: two float32 roundings of a value near its top code


def layout(op: str, dtype: str, out: str, *more: Operand, **attributes: Any) -> Case:
    """An operator that moves codes and changes their encoding."""
    name = f"{op}/{dtype}->{out}"
    result = y(out, scale=0.03 if out[1:] == "8" else 1.7e-4)
    return single(name, op, [x(dtype, *SHAPE), *more], result, **attributes)


def converted(op: str, dtype: str) -> Case:
    """A change of encoding, stated in pairs of one type, beside an operator that moves codes."""
    wide = y(dtype, scale=0.03 if dtype == "u8" else 1.7e-4)
    narrow = y(dtype)
    move = Step(op, ((1, 0), ints(4, 128)), (wide,))
    steps = (
        Step("Abs", (x(dtype, *SHAPE),), (narrow,)),
        Step("Identity", ((0, 0),), (wide,)),
        move,
        Step("Abs", ((2, 0),), (wide,)),
    )
    return Case(f"{op}/{dtype}/converted", steps)


def concat(first: str, second: str, out: str) -> Case:
    parts = [x(first, *SHAPE), x(second, *SHAPE)]
    return single(f"Concat/{first}+{second}->{out}", "Concat", parts, y(out), axis=1)


def rotary(dtype: str, tables: str, **attributes: Any) -> Case:
    """(1, 2, 8, 16), or (1, 8, 32) with ``num_heads``; ``tables`` may be float."""
    flat = "num_heads" in attributes
    width = attributes.get("rotary_embedding_dim", 16) // 2
    table = {"scale": 2.0**-15} if tables == "u16" else {}
    rows = [const(tables, 1, 8, width, **table) for _ in range(2)]
    if tables == "f32":
        values = (normal(8 * width, seed=1).clip(-1, 1), normal(8 * width, seed=2).clip(-1, 1))
        rows = [replace(r, values=tuple(map(float, v))) for r, v in zip(rows, values, strict=True)]
    source = x(dtype, 1, 8, 32) if flat else x(dtype, 1, 2, 8, 16)
    tail = "".join(f"/{key}{value}" for key, value in attributes.items())
    name = f"RotaryEmbedding/{dtype}/{tables}{tail}"
    return single(name, "RotaryEmbedding", [source, *rows], y(dtype), opset=23, **attributes)


def positions() -> Case:
    """Rows of the tables are picked at run time."""
    source, at = x("u16", 1, 2, 8, 16), Operand("i64", (1, 8))
    tables = [const("u16", 8, 8, scale=2.0**-15) for _ in range(2)]
    inputs = [source, *tables, at]
    name = "RotaryEmbedding/u16/positions"
    return single(name, "RotaryEmbedding", inputs, y("u16"), opset=23)


def power(dtype: str, exponent: float, code: int = 0) -> Case:
    """A float exponent, or a quantized one of a given code."""
    value = floats(exponent)
    if code:
        value = const("u8", values=(code,), scale=exponent / code, zero_point=0)
    result = y(dtype, scale=0.06 if dtype[1:] == "8" else 1e-3)
    name = f"Pow{exponent:g}/{dtype}" + ("/quantized" if code else "")
    return single(name, "Pow", [x(dtype, *SHAPE), value], result)


def ranked(op: str, dtype: str, shapes: list[tuple[int, ...]], **attributes: Any) -> Case:
    name = f"{op}/{dtype}/{'+'.join('x'.join(map(str, s)) for s in shapes)}"
    return single(name, op, [x(dtype, *shape) for shape in shapes], y(dtype), **attributes)


def sandwich(op: str, dtype: str) -> Case:
    """Rank 6 only between two reshapes."""
    opened = Step("Reshape", (x(dtype, 4, 6, 4, 8), ints(2, 2, 2, 3, 4, 8)), (y(dtype),))
    middle = Step(op, ((0, 0), x(dtype, 4, 8)), (y(dtype),))
    closed = Step("Reshape", ((1, 0), ints(4, 6, 32)), (y(dtype),))
    return Case(f"{op}/{dtype}/between_reshapes", (opened, middle, closed))


EXAMPLES = [
    # layout
    Example(layout("Reshape", "u16", "u16", ints(4, 128)), 0, (V75, V68)),
    Example(layout("Reshape", "u8", "u8", ints(4, 128)), 0, (V75, V68)),
    Example(layout("Transpose", "s16", "s16", perm=[0, 1, 3, 2]), 0, (V75, V68)),
    Example(layout("Unsqueeze", "u8", "u16", ints(0)), 0),
    Example(layout("Squeeze", "u16", "u8", ints(0)), 0),
    Example(concat("u8", "u16", "u16"), 0, (V75, V68)),
    Example(layout("Gather", "u8", "u8", ints(1, 0, dtype="i32"), axis=1), 0),
    Example(converted("Reshape", "u8"), 0, (V75, V68)),
    Example(converted("Reshape", "u16"), 0),
    # second operand
    Example(matmul_dynamic("u16", "u16"), 1, (V75,)),
    Example(replace(matmul_dynamic("u16", "u16"), name="MatMul_dyn/u16xu16/v68"), 1000, (V68,)),
    Example(replace(matmul_dynamic("u16", "u16", zero_point=20000), name="asymmetric"), 8),
    # forced encodings: the bound is half an LSB of the encoding before, in LSB of the one after
    Example(unary("Sigmoid", "u16", result={"scale": 2e-5, "zero_point": 0}), 1.2, (V75, V68)),
    Example(unary("Tanh", "u16", result={"scale": 4e-5, "zero_point": 32768}), 1.2),
    # types
    Example(binary("Add", "u16", "u8"), 0, (V75, V68)),
    Example(binary("Mul", "u8", "u16", "u16", constant=True), 0),
    Example(binary("Add", "u16", "u16", "u8"), 1),
    Example(binary("Sub", "s8", "u8", "u8"), 0),
    Example(matmul_const("u8", "s8", "channel", out="u16"), 0, (V75, V68)),
    Example(matmul_const("u16", "s4", "channel", out="u8"), 1),
    Example(matmul_dynamic("u8", "u8", "u16"), 0),
    Example(unary("Softmax", "u16", "u8", result={"scale": 1 / 256, "zero_point": 0}), 1),
    Example(unary("Softmax", "u8", "u16", result={"scale": 2.0**-16, "zero_point": 0}), 0),
    Example(unary("Neg", "s8"), 0, (V75, V68)),
    Example(unary("Abs", "s16"), 0),
    Example(matmul_const("s8", "s4", "channel"), 0),
    Example(matmul_const("u16", "u4", "channel", zero_point=3), 0, (V75, V68)),
    Example(matmul_const("u16", "s4", "channel", zero_point=3), 0),
    Example(matmul_const("u16", "s4", "tensor", explicit_zero=False, scale=0.01), 0),
    Example(gemm("u8", "u4", "channel", "s32", transB=1), 0),
    Example(matmul_dynamic("s8", "u8"), 0, (V75, V68)),
    # the bias of a norm, within half of s_x · s_w
    Example(
        single(
            "LayerNormalization/u16",
            "LayerNormalization",
            [x("u16", 1, 8, 32), const("u8", 32), const("u16", 32)],
            y("u16"),
            axis=-1,
        ),
        1,
        (V75, V68),
    ),
    # rotary: one LSB of a product, 2 · max |x| / (2^b - 1) · max |table| / s_y, and one of its own
    Example(rotary("u16", "u16"), 3.1, (V75, V68)),
    Example(rotary("u16", "f32"), 3.1),
    Example(rotary("u8", "f32"), 3.1),
    Example(rotary("u16", "u16", interleaved=1), 3.1),
    Example(rotary("u16", "f32", rotary_embedding_dim=8), 3.1),
    Example(rotary("u16", "u16", num_heads=2), 3.1),
    Example(rotary("u16", "f32", num_heads=2, interleaved=1), 3.1),
    Example(positions(), 3.1),
    # powers
    Example(power("u16", 2.0), 0, (V75, V68)),
    Example(power("u16", 2.0, code=100), 1),
    Example(power("s16", 3.0), 1),
    Example(power("u8", 3.0), 2),
    # rank
    Example(ranked("Neg", "u8", [(2, 3, 2, 4, 8)]), 0),
    Example(
        single(
            "RMSNormalization/u16/rank5",
            "RMSNormalization",
            [x("u16", 2, 3, 2, 4, 8), const("u16", 8)],
            y("u16"),
            opset=23,
            axis=-1,
        ),
        0,
    ),
    Example(ranked("LogSoftmax", "u16", [(2, 3, 2, 4, 8)], axis=-1), 0),
    Example(
        single(
            "MatMul_const/u16xs8/rank5",
            "MatMul",
            [x("u16", 2, 3, 2, 4, 8), const("s8", 8, 16, granularity="channel", axis=1)],
            y("u16"),
        ),
        0,
    ),
    Example(sandwich("Add", "u16"), 0, (V75, V68)),
    Example(sandwich("Mul", "u8"), 0),
]


@pytest.mark.parametrize(
    ("example", "target"),
    [pytest.param(e, t, id=f"{e.name}-{t.id}") for e in EXAMPLES for t in e.targets],
)
def test_the_verdict_becomes_int(example: Example, target: TargetProfile) -> None:
    before, after = model_of(example.case), model_of(example.case)
    assert check_target(before, target).verdict is not Verdict.INT
    count, _ = legalized(after, target)
    assert count > 0
    assert check_target(after, target).verdict is Verdict.INT
    assert largest_lsb(before, after) <= example.lsb + SLIGHTLY_MORE


@needs_htp
@pytest.mark.parametrize(
    ("example", "target"),
    [pytest.param(e, t, id=f"{e.name}-{t.id}") for e in EXAMPLES for t in e.targets],
)
def test_the_real_compiler_agrees(
    htp: HtpCompiler, example: Example, target: TargetProfile
) -> None:
    model = model_of(example.case)
    legalized(model, target)
    graph = htp.compile(model, f"v{target.vendor.arch}")
    assert graph.verdict is HtpVerdict.INT, [op.text for op in graph.ops] or graph.refusal


def attention_product(second: str, zero_point: int) -> Case:
    """As ``matmul_dynamic`` with codes as inputs; the result does not saturate."""
    case = matmul_dynamic("u16", second, zero_point=zero_point)
    (step,) = case.steps
    return replace(case, steps=(replace(step, outputs=(y("u16", scale=2e-3),)),), io="int")


SECOND = [("u16", 32768), ("u16", 20000), ("u8", 100), ("u8", 0), ("s8", 7)]


@pytest.mark.parametrize(("second", "zero_point"), SECOND)
def test_second_operands_become_symmetric(second: str, zero_point: int) -> None:
    """Exactly from eight bits, and from 16 where the zero point was in the middle."""
    case = attention_product(second, zero_point)
    before, after = model_of(case), model_of(case)
    _, form = legalized(after)
    assert form[-1] == "MatMul(u16, s16) -> u16"
    product = list(operations(after.graph))[-1]
    assert not np.asarray(product.present[1].zero_point).any()
    assert largest_lsb(before, after) <= (1 if zero_point == 20000 else 0)


@needs_htp
@pytest.mark.parametrize(("second", "zero_point"), SECOND)
def test_the_emulator_multiplies_by_them(htp: HtpCompiler, second: str, zero_point: int) -> None:
    """Against ONNX Runtime on the graph as written, which is 30 to 60 LSB off in the mean."""
    case = attention_product(second, zero_point)
    before, after = model_of(case), model_of(case)
    legalized(after)
    feeds = random_feeds(before.graph)
    (expected,) = run_model(before, feeds)
    (emulated,) = htp.run(after, "v75", feeds).values()
    assert np.abs(emulated.astype(int) - expected).mean() <= 2


# What the operations are afterwards.
FORMS = {
    "requantize-before": (
        layout("Reshape", "u16", "u16", ints(4, 128)),
        ["Convert(u16) -> s16", "Convert(s16) -> u16", "Reshape(u16, constant int64) -> u16"],
    ),
    "requantize-before: other types": (
        layout("Unsqueeze", "u8", "u16", ints(0)),
        ["Convert(u8) -> u16", "Unsqueeze(u16, constant int64) -> u16"],
    ),
    "requantize-before: a table of other codes": (
        single("Gather", "Gather", [const("u8", 40, 16), ints(3)], y("u8", scale=0.03)),
        ["Gather(constant u8, constant int64) -> u8"],
    ),
    "requantize-before: behind a narrow table": (
        single("Gather", "Gather", [const("u8", 40, 16), ints(3)], y("u16")),
        ["Gather(constant u8, constant int64) -> u8", "Convert(u8) -> u16"],
    ),
    "second-operand": (
        matmul_dynamic("u16", "u16"),
        ["Convert(u16) -> s16", "MatMul(u16, s16) -> u16"],
    ),
    "one-type: operands": (
        binary("Add", "u16", "u8"),
        ["Convert(u8) -> u16", "Add(u16, u16) -> u16"],
    ),
    "one-type: a linear's input": (
        matmul_const("u8", "s8", "channel", out="u16"),
        ["Convert(u8) -> u16", "MatMul(u16, constant s8 per channel) -> u16"],
    ),
    "one-type: the result": (
        unary("Softmax", "u16", "u8"),
        ["Softmax(u16) -> u16", "Convert(u16) -> u8"],
    ),
    "symmetric-weight": (
        matmul_const("u16", "u4", "channel", zero_point=3),
        ["MatMul(u16, constant s8 per channel) -> u16"],
    ),
    "symmetric-weight: a zero point that is not stated": (
        matmul_const("u16", "s4", "tensor", explicit_zero=False, scale=0.01),
        ["MatMul(u16, constant s4) -> u16"],
    ),
    "finer-weight": (
        matmul_const("u16", "s4", "channel", scale=0.1),
        ["MatMul(u16, constant s8 per channel) -> u16"],
    ),
    "finer-weight: not where steps are small": (
        matmul_const("u16", "s4", "channel", scale=0.01),
        ["MatMul(u16, constant s4 per channel) -> u16"],
    ),
    "unsigned": (
        unary("Neg", "s8"),
        ["Convert(s8) -> u8", "Neg(u8) -> u8", "Convert(u8) -> s8"],
    ),
    "pow-to-mul": (power("u16", 2.0), ["Mul(u16, u16) -> u16"]),
    "pow-to-mul: a cube": (power("u8", 3.0), ["Mul(u8, u8) -> u8", "Mul(u8, u8) -> u8"]),
    "reduce-rank": (
        ranked("Neg", "u8", [(2, 3, 2, 4, 8)]),
        [
            "Reshape(u8, constant int64) -> u8",
            "Neg(u8) -> u8",
            "Reshape(u8, constant int64) -> u8",
        ],
    ),
    "reduce-rank: no reshape is left between": (
        sandwich("Add", "u16"),
        [
            "Reshape(u16, constant int64) -> u16",
            "Reshape(u16, constant int64) -> u16",
            "Add(u16, u16) -> u16",
            "Reshape(u16, constant int64) -> u16",
        ],
    ),
    "decompose-rotary": (
        rotary("u16", "u16"),
        [
            "Split(u16, constant int64) -> u16, u16",
            "Reshape(constant u16, constant int64) -> u16",
            "Reshape(constant u16, constant int64) -> u16",
            *["Mul(u16, u16) -> u16"] * 4,
            "Sub(u16, u16) -> u16",
            "Add(u16, u16) -> u16",
            "Concat(u16, u16) -> u16",
        ],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str) -> None:
    case, expected = FORMS[name]
    assert sorted(legalized(model_of(case))[1]) == sorted(expected)


@needs_htp
def test_finer_weights_are_the_same_numbers(htp: HtpCompiler) -> None:
    """On ONNX Runtime bit for bit; the emulator comes as near to it as with eight bits."""
    weights = const("s4", 16, 32, granularity="channel", axis=1, scale=0.1)
    result = y("u16", scale=256 * 1e-4 * 0.1 / 24)
    step = [x("u16", 1, 16, 16, scale=1e-4), weights]
    case = single("MatMul/coarse", "MatMul", step, result, io="int")
    before, after = model_of(case), model_of(case)
    assert legalized(after)[0] == 1
    assert largest_lsb(before, after) == 0
    feeds = random_feeds(before.graph)
    (expected,) = run_model(before, feeds)
    errors = []
    for model in (before, after):
        (emulated,) = htp.run(model, "v75", feeds).values()
        errors.append(float(np.abs(emulated.astype(int) - expected).mean()))
    assert errors[0] > 4
    assert errors[1] < errors[0] / 4


def test_a_forced_encoding_is_stated_and_followed() -> None:
    """Through Reshape; in front of a Concat, which shares with others, the old one comes back."""
    old = y("u16", scale=2e-5, zero_point=0)
    steps = (
        Step("Sigmoid", (x("u16", 2, 8),), (old,)),
        Step("Reshape", ((0, 0), ints(4, 4)), (old,)),
        Step("Relu", ((1, 0),), (y("u16"),)),
        Step("Concat", ((1, 0), x("u16", 4, 4, scale=2e-5, zero_point=0)), (old,), {"axis": 0}),
    )
    model = model_of(Case("forced", steps))
    before = model_of(Case("forced", steps))
    count, _ = legalized(model)
    assert count == 1
    by_type = {o.op_type: o for o in operations(model.graph)}
    for operand in (
        by_type["Sigmoid"].outputs[0],
        by_type["Reshape"].outputs[0],
        by_type["Relu"].present[0],
    ):
        assert operand.scale == np.float32(2.0**-16)
        assert operand.zero_point == 0
    assert all(o.scale == np.float32(2e-5) for o in by_type["Concat"].present)
    assert check_target(model, V75).verdict is Verdict.INT
    assert largest_lsb(before, model) <= 1 + SLIGHTLY_MORE


def test_codes_that_leave_the_graph_keep_their_encoding() -> None:
    case = unary("Sigmoid", "u16", result={"scale": 2e-5, "zero_point": 0}, io="int")
    before, after = model_of(case), model_of(case)
    legalized(after)
    last = list(operations(after.graph))[-1]
    assert last.op_type == "Convert"
    assert last.outputs[0].scale == np.float32(2e-5)
    assert largest_lsb(before, after) <= 1


def test_split_into_other_encodings() -> None:
    """Behind it, for in front there is room for one only."""
    rules = [{"ops": ["Split"], "all_encodings": "differ", "legalize": "requantize-before"}]
    rules += [{"ops": ["Split"]}, {"ops": ["Convert"]}]
    target = profile(rules)
    step = Step("Split", (x("u8", 4, 16), ints(8, 8)), (y("u8"), y("u8", scale=0.01)), {"axis": 1})
    before, after = model_of(Case("split", (step,))), model_of(Case("split", (step,)))
    _, form = legalized(after, target)
    assert form == [
        "Split(u8, constant int64) -> u8, u8",
        "Convert(u8) -> u16",
        "Convert(u16) -> u8",
    ]
    assert largest_lsb(before, after) == 0


def profile(rules: list[dict[str, Any]], **more: Any) -> TargetProfile:
    rows = [{"verdict": "reject" if "legalize" in rule else "int", **rule} for rule in rules]
    return TargetProfile.model_validate({"id": "test", "rules": rows, **more})


def test_bias_at_another_scale() -> None:
    """The codes are added as they are, so the file states what is meant at s_x · s_w."""
    for case in (bias_case("s32", 50.0, "channel"), bias_case("s32", 0.3, "tensor")):
        before, after = model_of(case), model_of(case)
        report = check_target(before, V75)
        assert "QN518" in {fault.code for fault in target_faults(before, report)}
        count, _ = legalized(after)
        assert count == 1
        assert not target_faults(after, check_target(after, V75))
        assert largest_lsb(before, after) <= 1


def bias_case(dtype: str, factor: float, granularity: str) -> Case:
    left = x("u16", 8, 64)
    right = const("s8", 64, 32, granularity=granularity, axis=1)
    return single("Gemm", "Gemm", [left, right, bias(left, right, 32, dtype, factor)], y("u16"))


@pytest.mark.parametrize("dtype", ["u8", "s16"])
def test_bias_of_another_type(dtype: str) -> None:
    case = bias_case(dtype, 1.0, "tensor")
    before, after = model_of(case), model_of(case)
    count, form = legalized(after)
    assert count == 1
    assert form == ["Gemm(u16, constant s8, constant s32) -> u16"]
    assert largest_lsb(before, after) <= 1


def test_a_bias_that_int32_does_not_hold_stays() -> None:
    model = model_of(bias_case("s32", 2.0**20, "tensor"))
    assert legalized(model)[0] == 0


@needs_htp
def test_the_emulator_multiplies_widened_codes_exactly(htp: HtpCompiler) -> None:
    """With the scale of the narrow type it was 90 LSB off in the mean."""
    for case in (
        gemm("u8", "s8", "channel", "s32", out="u16"),
        matmul_const("u8", "s8", "channel", out="u16"),
        matmul_dynamic("u8", "u8", "u16"),
    ):
        (step,) = case.steps
        wide = replace(step, outputs=(replace(step.outputs[0], scale=2e-3),))
        model = model_of(replace(case, steps=(wide,), io="int"))
        legalized(model)
        found = compare_on_emulator(htp, model, "v75", random_feeds(model.graph))
        assert max(int(np.abs(lsb).max()) for lsb in found.values()) <= 1


def test_a_bias_that_is_right_stays() -> None:
    assert legalized(model_of(bias_case("s32", 1.0, "channel")))[0] == 0


@pytest.mark.parametrize("block", [16, 32])
def test_lpbq_states_its_error(block: int) -> None:
    """Signal over error of the weight that ONNX Runtime dequantizes before and after."""
    case = matmul_const("u16", "s4", f"block{block}", mkn=(8, 128, 32))
    before, after = model_of(case), model_of(case)
    compilation = Compilation(after, V75)
    assert LegalizeTarget().run(compilation) == 1
    (note,) = compilation.diagnostics
    assert note.code == "QN526"
    old, new = weights(before).astype(np.float64), weights(after).astype(np.float64)
    sqnr = 10 * np.log10(np.square(old).sum() / np.square(old - new).sum())
    assert f"{sqnr:.1f}" in str(note)
    assert sqnr > 20
    assert LegalizeTarget().run(compilation) == 0
    assert compilation.diagnostics == [note]
    (matmul,) = operations(after.graph)
    assert str(matmul) == "MatMul(u16, constant s4 per lpbq) -> u16"
    assert check_target(after, V75).verdict is Verdict.INT


def weights(model: ir.Model) -> Array:
    """What the only MatMul of a graph multiplies by."""
    model = model.clone()
    (matmul,) = (node for node in model.graph if node.op_type == "MatMul")
    value = matmul.inputs[1]
    assert value is not None
    model.graph.outputs[:] = [value]
    return np.asarray(run_model(model, random_feeds(model.graph))[0])


@needs_htp
@pytest.mark.parametrize("target", [V68, V75], ids=lambda t: t.id)
def test_the_real_compiler_takes_lpbq(htp: HtpCompiler, target: TargetProfile) -> None:
    model = model_of(matmul_const("u16", "s4", "block32", mkn=(8, 128, 32)))
    legalized(model, target)
    assert htp.compile(model, f"v{target.vendor.arch}").verdict is HtpVerdict.INT
    differences = compare_on_emulator(
        htp, model, f"v{target.vendor.arch}", random_feeds(model.graph)
    )
    assert max(int(np.abs(lsb).max()) for lsb in differences.values()) <= 32


def test_lpbq_keeps_blocks_whose_scales_are_multiples() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (64, 5))
    steps = np.random.default_rng(1).integers(1, 16, (4, 5))
    steps[2] = 15  # the largest of each channel
    result = to_lpbq(codes, (steps * np.float32(0.25)).astype(np.float32), -8, 7, 15)
    assert result.sqnr == float("inf")
    assert np.array_equal(result.codes, codes)
    assert np.array_equal(result.block_codes, steps)
    assert np.array_equal(result.scale, np.full(5, 0.25, np.float32))


def test_lpbq_takes_the_better_of_two_block_scales() -> None:
    """No block is further off than with its scale rounded to the nearest."""
    codes = np.random.default_rng(2).integers(-8, 8, (128, 8))
    scales = np.random.default_rng(3).uniform(0.01, 1, (4, 8)).astype(np.float32)
    result = to_lpbq(codes, scales, -8, 7, 15)
    real = codes * np.repeat(scales, 32, axis=0)

    def error(code: Array, step: Array) -> Array:
        made = code * np.repeat(step, 32, axis=0)
        return np.asarray(np.square(made - real).reshape(4, 32, 8).sum(axis=1))

    nearest = np.clip(np.rint(scales / result.scale), 1, 15) * result.scale
    rounded = np.clip(np.rint(real / np.repeat(nearest, 32, axis=0)), -8, 7)
    ours = error(result.codes, result.block_codes * result.scale)
    assert (ours <= error(rounded, nearest) * (1 + 1e-6)).all()
    assert result.block_codes.min() >= 1
    assert result.block_codes.max() == 15


CONV: list[dict[str, Any]] = [
    {"ops": ["MatMul"], "inputs": [["* var", "* const"]], "legalize": "conv-1x1"},
    {"ops": ["Conv", "Reshape", "Transpose"]},
]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(64,), (8, 64), (2, 3, 64)])
@pytest.mark.parametrize("dtype", ["s4", "s8"])
def test_matmul_as_a_convolution(granularity: str, shape: tuple[int, ...], dtype: str) -> None:
    right = const(dtype, 64, 32, granularity=granularity, axis=1)
    case = single("MatMul", "MatMul", [x("s8", *shape), right], y("s8", scale=0.5))
    before, after = model_of(case), model_of(case)
    count, form = legalized(after, profile(CONV))
    assert count == 1
    kind = " per channel" if granularity == "channel" else ""
    assert [line.partition("(")[0] for line in form] == [
        "Reshape", "Transpose", "Conv", "Transpose", "Reshape",
    ]  # fmt: skip
    assert form[2] == f"Conv(s8, constant {dtype}{kind}) -> s8"
    assert check_target(after, profile(CONV)).verdict is Verdict.INT
    assert largest_lsb(before, after) <= 1


def test_rockchip_asks_for_convolutions() -> None:
    target = load_target("rknpu2-rk3588")
    model = model_of(matmul_const("s8", "s8", "channel"))
    count, form = legalized(model, target)
    assert count == 1
    assert not any(line.startswith("MatMul") for line in form)


KEPT = {
    "legal": matmul_const("u16", "s4", "channel", scale=0.01),
    "no row": single("Mish", "Mish", [x("u8", *SHAPE)], y("u8"), opset=22),
    "constant second operand": matmul_const("u16", "u16", "channel"),
    "another power": power("u16", 1.5),
    "square of a broadcast exponent": single(
        "Pow", "Pow", [x("u16", 4, 8), floats(*[2.0] * 8)], y("u16")
    ),
    "u8 by s16 is no better after": matmul_const("u8", "s16", "tensor"),
    "an asymmetric weight that s8 does not hold": matmul_const(
        "u16", "u8", "channel", zero_point=9
    ),
    "an asymmetric weight with scales along the summed axis": matmul_const(
        "u16", "s4", "channel", axis=0, zero_point=3
    ),
    "blocks of 8 bits": matmul_const("u16", "s8", "block32"),
    "asymmetric blocks": matmul_const("u16", "s4", "block32", zero_point=3),
    "blocks of a Gemm": gemm("u16", "s4", "block32", None, transB=1),
    "a norm over other axes": single(
        "LayerNormalization",
        "LayerNormalization",
        [x("u16", 2, 3, 2, 4, 8), const("u16", 4, 8)],
        y("u16"),
        axis=-2,
    ),
    "dimensions that do not merge": ranked("Add", "u8", [(2, 3, 2, 4, 2, 8), (2, 1, 2, 1, 2, 1)]),
    "tables of another width": single(
        "RotaryEmbedding",
        "RotaryEmbedding",
        [x("u16", 1, 2, 8, 16), const("u16", 1, 8, 4), const("u16", 1, 8, 4)],
        y("u16"),
        opset=23,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_must_not_fire(name: str) -> None:
    model = model_of(KEPT[name])
    before = model_to_text(model)
    assert legalized(model)[0] == 0
    assert model_to_text(model) == before


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_without_rules_nothing_changes(example: Example) -> None:
    model = model_of(example.case)
    before = model_to_text(model)
    assert apply(LegalizeTarget(), model) == 0
    assert model_to_text(model) == before


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a8"])
def test_a_compile_ends_in_what_the_target_takes(scheme: str) -> None:
    """W8A8 writes 16-bit results of 8-bit operands; made of one type they are the same numbers."""
    compilation = Compilation(parse(DECODER), V75)
    *passes, last = default_passes(CompileConfig(scheme=scheme, seq_len=4), WINDOWS)
    assert isinstance(last, LegalizeTarget)
    run_passes(passes, compilation, after_pass=lambda done: verify_stage(compilation))
    before = compilation.model.clone()
    fits = check_target(before, V75).verdict is Verdict.INT
    assert (last.run(compilation) == 0) == fits
    verify_stage(compilation)
    assert check_target(compilation.model, V75).verdict is Verdict.INT
    feeds = {"input_ids": np.array([[0, 3, 1, 2]])}
    after = compilation.model
    assert all(map(np.array_equal, run_model(before, feeds), run_model(after, feeds)))


def foreign_file(folder: Path) -> ir.Model:
    """ONNX Runtime's own quantizer at 16-bit activations, on attention with a sigmoid gate."""
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 8, 16] x) => (float[1, 8, 16] y) <float[16, 16] w>
        {
            h = MatMul(x, w)
            turned = Transpose<perm: ints = [0, 2, 1]>(h)
            scores = MatMul(h, turned)
            weights = Softmax<axis: int = -1>(scores)
            mixed = MatMul(weights, h)
            gate = Sigmoid(mixed)
            y = Mul(mixed, gate)
        }
    """
    model = parse(text.replace(" <float[16, 16] w>", " <float[16, 16] w = {" + numbers() + "}>"))
    ir.save(model, folder / "float.onnx")
    reader = ListReader([{"x": normal(1, 8, 16, seed=seed)} for seed in range(4)])
    quantize_static(
        folder / "float.onnx",
        folder / "qdq.onnx",
        reader,
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"WeightSymmetric": True},
    )
    found = ir.load(folder / "qdq.onnx")
    common.ShapeInferencePass(strict_mode=False, check_type=False)(found)
    return found


def numbers() -> str:
    return ", ".join(f"{value:.4f}" for value in normal(256, seed=9, scale=0.3))


class ListReader(CalibrationDataReader):  # type: ignore[misc]
    """Batches in order, as the quantizer asks for them."""

    def __init__(self, batches: list[dict[str, Array]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def test_a_file_of_another_quantizer(tmp_path: Path) -> None:
    before, after = foreign_file(tmp_path), foreign_file(tmp_path)
    verdicts = {node.verdict for node in check_target(before, V75).nodes}
    assert Verdict.SILENT in verdicts
    # On a bare model, so in any sequence of passes.
    assert LegalizeTarget("qnn-htp-v75")(after).modified
    assert not LegalizeTarget("qnn-htp-v75")(after).modified
    assert check_target(after, V75).verdict is Verdict.INT
    feeds = {"x": normal(1, 8, 16, seed=0)}
    (old,), (new,) = run_model(before, feeds), run_model(after, feeds)
    assert relative_error(new, old) < 2e-3
    if is_available():
        with HtpCompiler() as compiler:
            assert compiler.compile(after, "v75").verdict is HtpVerdict.INT


def test_types_hold_the_same_numbers() -> None:
    for before, after in (("u8", "u16"), ("s8", "u16"), ("u8", "s16"), ("s8", "s16"), ("s8", "u8"),
                          ("u16", "s16"), ("s16", "u16")):  # fmt: skip
        encoding = some_encoding(before)
        low, high = encoding.spec.q_min, encoding.spec.q_max
        numbers = encoding.dequantize(np.arange(low, high + 1))
        wide = same_numbers(encoding, spec_of(after))
        assert np.array_equal(wide.dequantize(wide.quantize(numbers)), numbers)


def test_finer_codes_span_the_same_range() -> None:
    for before, after in (("u8", "u16"), ("s8", "u16"), ("u8", "s16"), ("s8", "s16")):
        encoding = some_encoding(before)
        fine = finer(encoding, spec_of(after))
        assert fine.low == pytest.approx(encoding.low, rel=1e-6)
        assert encoding.high <= fine.high < encoding.high + float(encoding.scale)


def some_encoding(dtype: str) -> Encoding:
    spec = spec_of(dtype)
    return Encoding(spec, np.float32(0.37) * np.ones((), np.float32), np.asarray(5, np.int32))


def test_dimensions_merge_from_the_front() -> None:
    assert regroup([(2, 3, 4, 5, 6)], 4) == Regrouping((0, 2, 3, 4), 5)
    assert regroup([(2, 3, 4, 5, 6)], 1) == Regrouping((0,), 5)
    assert regroup([(2, 3, 4, 5, 6), (5, 6)], 2) == Regrouping((0, 3), 5)
    assert regroup([(2, 3, 4), (2, 1, 4)], 2) is None
    assert regroup([(2, 1, 4), (2, 1, 4)], 1) == Regrouping((0,), 3)
    assert regroup([(2, 3, 4)], 2, kept=frozenset({1})) is None
    assert regroup([(2, 3, 4)], 2, kept=frozenset({2})) == Regrouping((0, 2), 3)
    merged = Regrouping((0, 3), 5)
    assert merged.apply((2, 3, 4, 5, 6)) == (24, 30)
    assert merged.apply((5, 6)) == (1, 30)
    assert merged.axis(-2) == 1


@pytest.mark.parametrize(
    ("shape", "order", "expected"),
    [
        ((2, 3, 4, 5, 6), (0, 1, 3, 4, 2), ((6, 4, 30), (0, 2, 1))),
        ((2, 3, 4), (0, 1, 2), ((24,), (0,))),
        ((2, 1, 3, 1, 4), (1, 4, 3, 0, 2), ((6, 4), (1, 0))),
        ((1, 1), (1, 0), ((1,), (0,))),
    ],
)
def test_what_moves_together_is_one_dimension(
    shape: tuple[int, ...], order: tuple[int, ...], expected: tuple[object, object]
) -> None:
    new, moved = transposed(shape, order)
    assert (new, moved) == expected
    data = np.arange(np.prod(shape))
    assert np.array_equal(
        data.reshape(shape).transpose(order).ravel(), data.reshape(new).transpose(moved).ravel()
    )


def test_names_that_are_taken() -> None:
    editor = QdqEditor(parse("g (float[2] a) => (float[2] a_1) { a_1 = Relu(a) }").graph)
    assert editor.free_name("a") == "a_2"
    assert editor.free_name("b") == "b"
    assert editor.free_name("b") == "b_1"

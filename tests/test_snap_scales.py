"""snap-scales: ratios of few bits in every architecture, scales that only grow, what is left."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.bit_plan import Scheme
from qnpu.compiler.config import CompileConfig
from qnpu.compiler.graph_edit import name_of
from qnpu.compiler.integer_io import with_real_io
from qnpu.compiler.integer_model import certify
from qnpu.compiler.op_traits import as_linear, encoding_groups
from qnpu.compiler.pass_base import Compilation, Stage, run_passes
from qnpu.compiler.pipeline import compile_model, default_passes
from qnpu.compiler.quant_types import Encoding
from qnpu.compiler.roles import is_online_rotation
from qnpu.compiler.scale_grid import odd_part
from qnpu.compiler.verify import verify_stage
from qnpu.passes.assign_bit_widths import AssignBitWidths
from qnpu.passes.calibrate_ranges import CalibrateRanges
from qnpu.passes.fold_norm_scale import FoldNormScale
from qnpu.passes.snap_scales import SnapScales
from qnpu.passes.unify_encodings import UnifyEncodings
from qnpu.runtime_check.feeds import ArraySamples
from tests.conftest import Array, normal, parse
from tests.decoders import LENGTH, canonical, exported
from tests.lowered import WINDOWS


def encoded(text: str, scheme: str = "w8a8", **data: Array) -> Compilation:
    compilation = Compilation(parse(text))
    AssignBitWidths(Scheme.parse(scheme)).run(compilation)
    CalibrateRanges(ArraySamples(data)).run(compilation)
    compilation.stage = Stage.ENCODED
    return compilation


def decoder(architecture: str, scheme: str) -> Compilation:
    """A tiny decoder as calibrate-ranges leaves it."""
    compilation = Compilation(canonical(architecture))
    config = CompileConfig(scheme=scheme, seq_len=LENGTH, weights="nearest", integer=True)
    passes = default_passes(config, WINDOWS)
    names = [item.name for item in passes]
    chosen = passes[names.index(FoldNormScale.name) : names.index(CalibrateRanges.name) + 1]
    run_passes(chosen, compilation, after_pass=lambda done: None)
    return compilation


def snapped(compilation: Compilation) -> tuple[dict[str, Encoding], int]:
    """Encodings as they were, and how many the pass changed; checks what always holds."""
    table = compilation.encodings
    before = {name: table[name] for name in table}
    count = SnapScales().run(compilation)
    verify_stage(compilation)
    assert SnapScales().run(compilation) == 0
    assert set(before) == set(table)
    for name, old in before.items():
        new = table[name]
        room = new.scale / 2  # a merged group's zero point was rounded
        assert (new.low <= old.low + room).all()
        assert (new.high >= old.high - room).all()
        assert (new.scale >= old.scale).all()
        assert new.scale.dtype == np.float32
    for group in encoding_groups(compilation.graph):
        known = [table[name_of(v)] for v in group if name_of(v) in table]
        changed = any(not table[n].same_as(before[n]) for n in map(name_of, group) if n in table)
        assert not changed or all(item.same_as(known[0]) for item in known)
    return before, count


def ratios(compilation: Compilation) -> dict[str, list[Fraction]]:
    """M of each channel of every linear, by the name of its result."""
    table, found = compilation.encodings, {}
    shared = {
        name_of(value): name_of(group[0])
        for group in encoding_groups(compilation.graph)
        for value in group
    }
    for node in compilation.graph:
        linear = as_linear(node)
        if linear is None or is_online_rotation(linear):
            continue
        taken = table[shared[name_of(linear.activation)]]
        result = table[shared[name_of(node.outputs[0])]]
        ends = Fraction(taken.scale.item()) / Fraction(result.scale.item())
        scale = table[name_of(linear.weight)].scale.reshape(-1)
        found[name_of(node.outputs[0])] = [ends * Fraction(float(s)) for s in scale]
    return found


def few_bits(ratio: Fraction, bits: int) -> bool:
    denominator = ratio.denominator
    return denominator & (denominator - 1) == 0 and odd_part(float(ratio)) < 1 << bits


def is_quotient(ratio: Fraction) -> bool:
    """1/D, as float32 has it; an even D exactly."""
    divisor = round(1 / ratio)
    error = abs(ratio * divisor - 1)
    return 3 <= divisor < 1 << 14 and (not error or (divisor % 2 == 1 and error < 2**-23))


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [
        ("llama", "w4a8"),
        ("llama", "w8a16"),
        *((a, "w8a8") for a in ("llama", "qwen2", "phi3", "gemma3", "gpt2")),
    ],
)
def test_ratios_have_few_bits(architecture: str, scheme: str) -> None:
    compilation = decoder(architecture, scheme)
    _, count = snapped(compilation)
    assert count > 10
    found = ratios(compilation)
    assert len(found) > 4
    whole = [c for c in found.values() if not all(map(is_quotient, c))]
    assert all(few_bits(ratio, 10) for channel in whole for ratio in channel)
    wide = [name for name in found if compilation.encodings[name].spec.bits == 16]
    divided = [name for name in wide if all(map(is_quotient, found[name]))]
    assert bool(divided) == (scheme == "w8a8" and architecture in ("llama", "qwen2", "phi3"))
    narrow = [name for name in found if compilation.encodings[name].spec.bits == 8]
    assert bool(narrow) == scheme.endswith("a8")
    assert all(few_bits(ratio, 5) for name in narrow for ratio in found[name])


def test_the_residual_stream_has_powers_of_two() -> None:
    compilation = decoder("llama", "w8a8")
    before, _ = snapped(compilation)
    UnifyEncodings().run(compilation)
    table = compilation.encodings
    sums = [
        node
        for node in compilation.graph
        if node.op_type == "Add"
        and table[name_of(node.outputs[0])].spec.bits == 16
        and any(as_linear(p) for v in node.inputs if v and (p := v.producer()))
    ]
    assert len(sums) == 4
    for node in sums:
        scale = table[name_of(node.outputs[0])].scale.item()
        assert odd_part(scale) == 1
        assert scale < 2 * before[name_of(node.outputs[0])].scale.item()
        for value in node.inputs:
            assert value is not None
            assert odd_part(table[name_of(value)].scale.item()) < 16


def test_what_is_added_takes_the_larger_scale_of_the_sum() -> None:
    """Where nothing else reads it, and it is not handed out."""
    text = """
        g (float[3, 8] x, float[3, 8] r) => (float[3, 8] z, float[3, 8] c)
        <float[8, 8] w = {W}, float[8, 8] v = {V}>
        {
            a = MatMul(x, w) b = MatMul(x, v) c = MatMul(b, w)
            s = Add(a, r) t = Add(s, b) o = Add(t, c)
            z = Relu(o)
        }
    """
    for name, weight in (("W", normal(8, 8, seed=2)), ("V", normal(8, 8, seed=3))):
        text = text.replace(f"{{{name}}}", f"{{{', '.join(map(str, weight.reshape(-1)))}}}")
    compilation = encoded(text, x=normal(3, 8), r=normal(3, 8, seed=1, scale=100))
    before, _ = snapped(compilation)
    scales = {name: compilation.encodings[name].scale.item() for name in "abcsto"}
    assert scales["a"] == scales["s"] > 8 * before["a"].scale.item()
    assert scales["b"] < scales["t"] / 8
    assert scales["c"] < scales["o"] / 8


def small_ratio(scheme: str) -> tuple[list[Fraction], int]:
    """Ratios of a linear with a channel of small weights, and the zero point of its result."""
    compilation = encoded(
        """
        g (float[3, 3] x, float[3, 3] r) => (float[3, 3] z)
        <float[3, 3] w = {1, 0, 0, 0, 0.8, 0, 0, 0, 0.001}>
        { a = MatMul(x, w) z = Add(a, r) }
        """,
        scheme,
        x=normal(3, 3),
        r=normal(3, 3, seed=1, scale=4000),
    )
    snapped(compilation)
    return ratios(compilation)["a"], int(compilation.encodings["a"].zero_point)


def test_a_small_ratio_beside_a_large_zero_point() -> None:
    """It has few bits behind the point, so that 32 hold the zero point as well."""
    found, zero = small_ratio("w4a8")
    behind = max(ratio.denominator.bit_length() - 1 for ratio in found)
    assert zero << behind < 1 << 31
    assert all(few_bits(ratio, 10) for ratio in found)


def test_a_small_quotient_beside_a_large_zero_point() -> None:
    """Times its D the zero point is within 32 bits, too."""
    found, zero = small_ratio("w8a8")
    assert all(map(is_quotient, found))
    assert zero > 10000
    assert round(1 / min(found)) == (1 << 14) - 1


def test_a_sum_of_few_steps_is_not_divided() -> None:
    """By 1 or 2 rather than 1.9 or 2.9: weights would lose much of a bit."""
    compilation = encoded(
        """
        g (float[3, 3] x, float[3, 3] r) => (float[3, 3] z)
        <float[3, 3] w = {1, 0, 0, 0, 0.8, 0, 0, 0, 0.9}>
        { a = MatMul(x, w) z = Add(a, r) }
        """,
        x=normal(3, 3),
        r=normal(3, 3, seed=1),
    )
    snapped(compilation)
    found = ratios(compilation)["a"]
    assert not any(map(is_quotient, found))
    assert all(few_bits(ratio, 10) for ratio in found)


def test_a_bias_fits_and_stays_exact() -> None:
    compilation = encoded(
        """
        g (float[3, 2] x) => (float[3, 2] z)
        <float[2, 2] w = {1, -0.3, 0.7, 2}, float[2] b = {0.4, -7}>
        { y = Gemm(x, w, b) z = Relu(y) }
        """,
        x=normal(3, 2),
    )
    assert snapped(compilation)[1] >= 3
    UnifyEncodings().run(compilation)
    table = compilation.encodings
    product = table["x_requantized"].scale.astype(np.float64) * table["w"].scale
    np.testing.assert_array_equal(table["b"].scale, product)


def test_merged_groups_share_one_scale() -> None:
    """Two linears behind one Concat: one ratio can be had, both results stay one encoding."""
    compilation = encoded(
        """
        g (float[3, 2] x) => (float[3, 4] z)
        <float[2, 2] w = {1, -0.3, 0.7, 2}, float[2, 2] v = {0.1, 3, 5, 0.77}>
        { a = MatMul(x, w) b = MatMul(x, v) y = Concat<axis = 1>(a, b) z = Relu(y) }
        """,
        x=normal(3, 2),
    )
    snapped(compilation)
    assert compilation.encodings["a"].same_as(compilation.encodings["b"])
    assert all(few_bits(r, 5) for found in ratios(compilation).values() for r in found)


def test_a_fixed_range_is_kept() -> None:
    compilation = encoded(
        """
        g (float[3, 2] x) => (float[3, 2] z)
        <float[2, 2] w = {1, -0.3, 0.7, 2}>
        { s = Sigmoid(x) y = MatMul(s, w) z = Relu(y) }
        """,
        x=normal(3, 2),
    )
    before, _ = snapped(compilation)
    assert compilation.encodings["s"].same_as(before["s"])


def test_codes_that_were_chosen_are_kept() -> None:
    compilation = decoder("llama", "w4a8")
    table = compilation.encodings
    name = next(
        name_of(linear.weight)
        for node in compilation.graph
        if (linear := as_linear(node)) is not None and table[name_of(linear.weight)].spec.bits == 4
    )
    codes = table.quantize(name, np.asarray(_array(compilation, name)))
    table.choose_codes(name, table[name], codes)
    old = table[name]
    SnapScales().run(compilation)
    assert table[name] is old
    assert table.has_codes(name)


def _array(compilation: Compilation, name: str) -> Array:
    tensor = compilation.graph.initializers[name].const_value
    assert isinstance(tensor, ir.TensorProtocol)
    return tensor.numpy()


def test_only_where_an_integer_graph_is_made() -> None:
    def names(**options: object) -> list[str]:
        config = CompileConfig(**options)  # type: ignore[arg-type]
        return [item.name for item in default_passes(config, WINDOWS)]

    assert SnapScales.name in names(integer=True, scheme="w8a8")
    assert SnapScales.name in names(context=1024, scheme="w8a8")
    assert SnapScales.name not in names(scheme="w8a8")
    assert SnapScales.name not in names(integer=True, scheme="w8a8", learn="blockwise")
    assert SnapScales.name not in names(integer=True, scheme="w8a16")
    order = names(integer=True, scheme="w4a8")
    assert order.index(CalibrateRanges.name) + 1 == order.index(SnapScales.name)


@pytest.mark.parametrize(
    ("architecture", "scheme", "forms"),
    [
        ("llama", "w8a8", {"QLinearMatMul", "IntRequantizeShort", "IntSumBytesShort"}),
        ("gpt2", "w8a8", {"IntRequantizeShort", "IntSumBytesShort"}),  # biases
        ("gemma3", "w4a8", {"QLinearMatMul", "IntRequantizeShort", "IntSumBytesShort"}),
    ],
)
def test_integer_graphs_have_the_short_forms(
    architecture: str, scheme: str, forms: set[str]
) -> None:
    """And still give the codes of the Q/DQ graph, linears and sums every one."""
    config = CompileConfig(scheme=scheme, seq_len=LENGTH, weights="nearest", integer=True)
    result = compile_model(exported(architecture), config, WINDOWS)
    assert result.integer_model is not None
    operators = {node.op_type for node in result.integer_model.graph}
    assert operators >= forms | {"IntAddShort"}
    if architecture != "gpt2":  # whose scores and masks are nodes
        long = {"IntRequantize", "IntRequantizeFine", "IntAdd", "IntAddFine"}
        assert operators.isdisjoint(long)
    feeds = WINDOWS.feeds(result.model.graph.inputs)[0]
    found = certify(with_real_io(result.model), result.integer_model, feeds, [])
    kinds = {item.kind: item for item in found.summary()}
    assert kinds["linear"].equal == kinds["add"].equal == 1
    assert all(item.passed for item in found.accumulators)


def test_what_a_narrow_weight_makes_keeps_its_scale() -> None:
    """Scales of 4-bit weights would have to grow with it."""
    weight = ", ".join(map(str, normal(8, 8, seed=2).reshape(-1)))
    text = f"""
        g (float[3, 8] x, float[3, 8] r) => (float[3, 8] z)
        <float[8, 8] w = {{{weight}}}, float[8, 8] v = {{{weight}}}>
        {{ a = MatMul(x, w) s = Add(a, r) z = MatMul(s, v) }}
    """
    data = {"x": normal(3, 8), "r": normal(3, 8, seed=1, scale=100)}
    for scheme, bits in (("w4a8", 4), ("w8a8", 8)):
        compilation = encoded(text, scheme, **data)
        snapped(compilation)
        table = compilation.encodings
        assert table["w"].spec.bits == bits
        assert (table["a"].scale == table["s"].scale) == (bits == 8)

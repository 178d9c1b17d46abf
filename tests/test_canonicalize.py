"""canonicalize: each rewrite, what it must leave alone, and the numbers of the whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qnpu.compiler.diagnostics import DiagnosticError
from qnpu.compiler.printer import model_to_text
from qnpu.passes.canonicalize import OPSET, Canonicalize
from tests.conftest import (
    apply,
    assert_keeps,
    assert_rewrites,
    normal,
    parse,
    relative_error,
    run_model,
)


def test_shape_arithmetic_folds() -> None:
    assert_rewrites(
        Canonicalize(),
        """
        g (float[2, 6] x) => (float[4, 3] y)
        <int64 zero = {0}, int64 two = {2}, int64[1] axes = {0}, int64[1] rest = {-1}>
        {
            shape = Shape(x)
            rows = Gather(shape, zero)
            twice = Mul(rows, two)
            lead = Unsqueeze(twice, axes)
            target = Concat<axis: int = 0>(lead, rest)
            y = Reshape(x, target)
        }
        """,
        """
        g (float[2, 6] x) => (float[4, 3] y)
        <int64[2] target = {4, -1}>
        { y = Reshape(x, target) }
        """,
        count=5,
    )


def test_functions_are_inlined() -> None:
    model = parse(
        """
        <ir_version: 11, opset_import: ["" : 23, "mine" : 1]>
        g (float[2] x) => (float[2] y) { y = mine.twice(x) }
        <domain: "mine", opset_import: ["" : 23]>
        twice (a) => (b) { b = Add(a, a) }
        """
    )
    assert apply(Canonicalize(), model) == 1
    assert [node.op_type for node in model.graph] == ["Add"]
    assert not model.functions
    assert apply(Canonicalize(), model) == 0


def test_a_weight_is_stored_transposed_without_a_copy() -> None:
    before = parse(
        """
        g (float[1, 2] x) => (float[1, 3] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}>
        { t = Transpose<perm: ints = [1, 0]>(w)  y = MatMul(x, t) }
        """
    )
    assert apply(Canonicalize(), before) == 1
    stored = before.graph.initializers["t"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), [[1, 3, 5], [2, 4, 6]])
    assert stored.numpy().flags.f_contiguous


def test_a_transposed_constant_may_be_an_output() -> None:
    assert_rewrites(
        Canonicalize(),
        """
        g (float[1, 2] x) => (float[1, 2] y, float[2, 1] t)
        <float[1, 2] w = {1, 2}>
        { y = Add(x, w)  t = Transpose(w) }
        """,
        """
        g (float[1, 2] x) => (float[1, 2] y, float[2, 1] t)
        <float[1, 2] w = {1, 2}, float[2, 1] t = {1, 2}>
        { y = Add(x, w) }
        """,
        count=1,
    )


def test_nan_guard_goes() -> None:
    assert_rewrites(
        Canonicalize(),
        """
        g (float[1, 4] x) => (float[1, 4] y)
        <float zero = {0}>
        { p = Softmax(x)  bad = IsNaN(p)  q = Where(bad, zero, p)  y = Neg(q) }
        """,
        "g (float[1, 4] x) => (float[1, 4] y) { p = Softmax(x)  y = Neg(p) }",
        count=2,
    )


@pytest.mark.parametrize(
    "body",
    [
        "p = Sqrt(x)  bad = IsNaN(p)  y = Where(bad, zero, p)",  # no softmax: NaN is possible
        "p = Softmax(x)  bad = IsNaN(x)  y = Where(bad, zero, p)",  # the test of another tensor
        "p = Softmax(x)  bad = IsNaN(p)  y = Where(bad, one, p)",  # not zero
        "p = Softmax(x)  bad = IsNaN(p)  y = Where(bad, x, p)",  # not constant
        "p = Softmax(x)  bad = Less(p, one)  y = Where(bad, zero, p)",  # another test
    ],
)
def test_other_selections_stay(body: str) -> None:
    used = [name for name in ("zero", "one") if name in body]
    constants = ", ".join(f"float {n} = {{{['zero', 'one'].index(n)}}}" for n in used)
    constants = f"<{constants}>" if used else ""
    assert_keeps(Canonicalize(), f"g (float[1, 4] x) => (float[1, 4] y) {constants} {{ {body} }}")


def test_empty_concat_inputs_go() -> None:
    assert_rewrites(
        Canonicalize(),
        """
        g (float[1, 2, 4] k, float[1, 3, 4] l) => (float[1, 2, 4] y, float[1, 5, 4] z)
        <float[1, 0, 4] past = {}>
        {
            a = Concat<axis: int = 1>(past, k)
            y = Neg(a)
            z = Concat<axis: int = 1>(k, past, l)
        }
        """,
        """
        g (float[1, 2, 4] k, float[1, 3, 4] l) => (float[1, 2, 4] y, float[1, 5, 4] z)
        { y = Neg(k)  z = Concat<axis: int = 1>(k, l) }
        """,
        count=2,
    )


@pytest.mark.parametrize(
    "body",
    [
        "a = Identity(x)",
        "a = Dropout(x)",
        "a = Cast<to: int = 1>(x)",
        "a = Add(x, zeros)",
        "a = Add(zeros, x)",
        "a = Mul(x, ones)",
        "a = Mul(one, x)",
    ],
)
def test_no_ops_go(body: str) -> None:
    model = parse(
        f"""
        g (float[1, 2] x) => (float[1, 2] y)
        <float[2] zeros = {{0, 0}}, float[2] ones = {{1, 1}}, float one = {{1}}>
        {{ {body}  y = Relu(a) }}
        """
    )
    assert apply(Canonicalize(), model) > 0
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert [v.name for v in model.graph.inputs] == ["x"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Cast<to: int = 6>(x)  y = Cast<to: int = 1>(a)",
        "y = Add(x, c)",
        "y = Mul(x, c)",
        "y = Sub(c, x)",
        "y = Identity(x)",  # two names that callers know
    ],
)
def test_operators_that_compute_stay(body: str) -> None:
    constant = "<float[2] c = {0, 1}>" if "c)" in body or "(c" in body else ""
    assert_keeps(Canonicalize(), f"g (float[1, 2] x) => (float[1, 2] y) {constant} {{ {body} }}")


def test_a_zero_that_broadcasts_stays() -> None:
    assert_keeps(
        Canonicalize(),
        "g (float[1, 2] x) => (float[3, 2] y) <float[3, 1] c = {0, 0, 0}> { y = Add(x, c) }",
    )


@pytest.mark.parametrize("no_op", ["Dropout", "Cast<to: int = 1>", "Identity"])
def test_inputs_and_outputs_keep_their_names(no_op: str) -> None:
    model = parse(
        f"""
        g (float[2] x) => (float[2] same, float[2] y, float[2] again)
        {{ same = {no_op}(x)  y = Relu(x)  again = {no_op}(y) }}
        """
    )
    apply(Canonicalize(), model)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["same", "y", "again"]
    data = normal(2)
    same, y, again = run_model(model, {"x": data})
    np.testing.assert_array_equal(same, data)
    np.testing.assert_array_equal(again, y)
    assert apply(Canonicalize(), model) == 0


def test_a_bias_joins_its_matmul() -> None:
    assert_rewrites(
        Canonicalize(),
        """
        g (float[1, 2, 2] x) => (float[1, 2, 3] y)
        <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 2, 3}>
        { h = MatMul(x, w)  y = Add(b, h) }
        """,
        """
        g (float[1, 2, 2] x) => (float[1, 2, 3] y)
        <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 2, 3},
         int64[2] y_flat_shape = {2, 2}, int64[3] y_shape = {1, 2, 3}>
        {
            y_flat = Reshape(x, y_flat_shape)
            y_rows = Gemm(y_flat, w, b)
            y = Reshape(y_rows, y_shape)
        }
        """,
        count=1,
    )


def test_a_matrix_needs_no_reshape() -> None:
    assert_rewrites(
        Canonicalize(),
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
        { y = Gemm(x, w, b) }
        """,
        count=1,
    )


@pytest.mark.parametrize(
    "text",
    [
        # the product is needed elsewhere
        """
        g (float[2, 2] x) => (float[2, 2] y, float[2, 2] z)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
        { h = MatMul(x, w)  y = Add(h, b)  z = Relu(h) }
        """,
        # the product is an output
        """
        g (float[2, 2] x) => (float[2, 2] y, float[2, 2] h)
        <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
        # a bias of two dimensions
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] b = {5, 6, 7, 8}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
        # one number for all channels
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float[1] b = {5}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
        # a computed bias
        """
        g (float[2, 2] x, float[2] b) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
        # a computed weight
        """
        g (float[2, 2] x, float[2, 2] w) => (float[2, 2] y)
        <float[2] b = {1, 2}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
        # a batch of weights
        """
        g (float[1, 2, 2] x) => (float[1, 2, 2] y)
        <float[1, 2, 2] w = {1, 2, 3, 4}, float[2] b = {1, 2}>
        { h = MatMul(x, w)  y = Add(h, b) }
        """,
    ],
)
def test_other_sums_stay(text: str) -> None:
    assert_keeps(Canonicalize(), text)


def test_numbers_stay() -> None:
    weights = ", ".join(str(x) for x in normal(20))
    bias = ", ".join(str(x) for x in normal(5, seed=1))
    model = parse(
        f"""
        g (float[1, 3, 4] x) => (float[1, 3, 5] y)
        <float[5, 4] w = {{{weights}}}, float[5] b = {{{bias}}}, float[1, 0, 4] past = {{}},
         float zero = {{0}}, int64[3] shape = {{0, 0, -1}}>
        {{
            t = Transpose<perm: ints = [1, 0]>(w)
            a = Concat<axis: int = 1>(past, x)
            i = Identity(a)
            h = MatMul(i, t)
            s = Add(h, b)
            p = Softmax(s)
            n = IsNaN(p)
            q = Where(n, zero, p)
            y = Reshape(q, shape)
        }}
        """
    )
    x = normal(1, 3, 4, seed=2)
    expected = run_model(model, {"x": x})[0]
    apply(Canonicalize(), model)
    assert {node.op_type for node in model.graph} == {"Reshape", "Gemm", "Softmax"}
    # Gemm starts from the bias where MatMul + Add ends with it: one float32 rounding apart
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 3e-7


def test_the_opset_is_raised() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 13]>
        g (float[2, 3] x) => (float[2, 3] y) { y = Softmax(x) }
        """
    )
    x = normal(2, 3)
    expected = run_model(model, {"x": x})[0]
    assert apply(Canonicalize(), model) == 1
    assert model.graph.opset_imports[""] == OPSET
    assert relative_error(run_model(model, {"x": x})[0], expected) <= 1e-7
    assert apply(Canonicalize(), model) == 0


def test_nameless_nodes_get_names() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    apply(Canonicalize(), model)
    assert [node.name for node in model.graph] == ["Relu_y"]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("QN106", "g (float[2] x) => (float[2] y) { y = Mystery(x) }"),
        ("QN108", "g (float16[2] x) => (float16[2] y) { y = Relu(x) }"),
        ("QN108", "g (double[2] x) => (double[2] y) { y = Relu(x) }"),
        (
            "QN109",
            """
            g (bool c, float[4] x) => (float[4] y) {
                y = If (c) <then_branch = t () => (float[4] a) { a = Relu(x) },
                            else_branch = e () => (float[4] b) { b = Neg(x) }>
            }
            """,
        ),
        (
            "QN112",
            """
            <ir_version: 3, opset_import: ["" : 5]>
            g (float[1, 4] x) => (int32[1, 4] y) { y = Cast<to = "INT32">(x) }
            """,
        ),
    ],
)
def test_faults(code: str, text: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        apply(Canonicalize(), parse(text))
    assert set(caught.value.codes) == {code}


def test_a_branch_that_constants_decide_is_no_control_flow() -> None:
    model = parse(
        """
        g (float[4] x) => (float[4] y) <bool c = {1}> {
            z = If (c) <then_branch = t () => (float[4] a) { a = Relu(x) },
                        else_branch = e () => (float[4] b) { b = Neg(x) }>
            y = Exp(z)
        }
        """
    )
    apply(Canonicalize(), model)
    assert [node.op_type for node in model.graph] == ["Relu", "Exp"]


def test_the_result_is_the_same_each_time() -> None:
    text = """
        g (float[1, 2, 2] x) => (float[1, 2, 3] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[3] b = {1, 2, 3}>
        { t = Transpose(w)  h = MatMul(x, t)  y = Add(b, h) }
    """
    results = []
    for _ in range(2):
        model = parse(text)
        apply(Canonicalize(), model)
        results.append(model_to_text(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("place", [None, 0, 19_999])
def test_large_weights_of_equal_bytes_become_one(place: int | None) -> None:
    model = parse(
        """
        g (float[2, 1] x, float[1, 20000] a, float[1, 20000] b) => (float[2, 20000] y)
        { c = MatMul(x, a)  d = MatMul(x, b)  e = Exp(d)  y = Add(c, e) }
        """
    )
    first = normal(1, 20_000)
    second = first.copy()
    if place is not None:
        second[0, place] += 1
    for value, array in zip(list(model.graph.inputs)[1:], (first, second), strict=True):
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    apply(Canonicalize(), model)
    assert set(model.graph.initializers) == ({"a"} if place is None else {"a", "b"})

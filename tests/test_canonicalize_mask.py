"""canonicalize-mask: constants on the way to a softmax, and only those."""

from __future__ import annotations

import numpy as np
import pytest

from qnpu.compiler.pass_base import Compilation
from qnpu.passes.canonicalize_mask import CanonicalizeMask
from tests.conftest import assert_keeps, assert_rewrites, normal, parse, relative_error, run_model


def test_golden_add() -> None:
    assert_rewrites(
        CanonicalizeMask(),
        """
        m (float[1, 3] x) => (float[1, 3] y)
        <float[1, 3] mask = {0, -1, -3.4028235e38}>
        { s = Add(x, mask)  y = Softmax(s) }
        """,
        """
        m (float[1, 3] x) => (float[1, 3] y)
        <float[1, 3] mask_finite = {0, -1, -50}>
        { s = Add(x, mask_finite)  y = Softmax(s) }
        """,
        count=1,
    )


def test_golden_where() -> None:
    assert_rewrites(
        CanonicalizeMask(-20.0),
        """
        m (float[1, 3] x, bool[1, 3] causal) => (float[1, 3] y)
        <float low = {-inf}>
        { s = Where(causal, x, low)  y = Softmax(s) }
        """,
        """
        m (float[1, 3] x, bool[1, 3] causal) => (float[1, 3] y)
        <float low_finite = {-20}>
        { s = Where(causal, x, low_finite)  y = Softmax(s) }
        """,
        count=1,
    )


def test_a_mask_made_at_run_time_is_followed() -> None:
    model = assert_rewrites(
        CanonicalizeMask(),
        """
        m (float[1, 1, 3] x, float[1, 3] keep) => (float[1, 1, 3] y)
        <float one = {1}, float low = {-65504}, int64[1] axis = {0}>
        {
            drop = Sub(one, keep)
            bias = Mul(drop, low)
            wide = Unsqueeze(bias, axis)
            s = Add(x, wide)
            y = Softmax(s)
        }
        """,
        """
        m (float[1, 1, 3] x, float[1, 3] keep) => (float[1, 1, 3] y)
        <float one = {1}, int64[1] axis = {0}, float low_finite = {-50}>
        {
            drop = Sub(one, keep)
            bias = Mul(drop, low_finite)
            wide = Unsqueeze(bias, axis)
            s = Add(x, wide)
            y = Softmax(s)
        }
        """,
        count=1,
    )
    feeds = {"x": normal(1, 1, 3), "keep": np.array([[1, 1, 0]], np.float32)}
    expected = np.exp(feeds["x"].astype(np.float64)) * [1, 1, 0]
    expected /= expected.sum()
    assert relative_error(run_model(model, feeds)[0], expected) <= 2e-7


def test_a_use_elsewhere_keeps_the_old_constant() -> None:
    assert_rewrites(
        CanonicalizeMask(),
        """
        m (float[1, 2] x) => (float[1, 2] y, float[1, 2] z)
        <float[1, 2] mask = {0, -65504}>
        { s = Add(x, mask)  y = Softmax(s)  z = Max(x, mask) }
        """,
        """
        m (float[1, 2] x) => (float[1, 2] y, float[1, 2] z)
        <float[1, 2] mask = {0, -65504}, float[1, 2] mask_finite = {0, -50}>
        { s = Add(x, mask_finite)  y = Softmax(s)  z = Max(x, mask) }
        """,
        count=1,
    )


def test_one_constant_for_two_softmaxes_is_replaced_once() -> None:
    compilation = Compilation(
        parse(
            """
            m (float[1, 2] x) => (float[1, 2] y, float[1, 2] z)
            <float[1, 2] mask = {0, -65504}>
            { s = Add(x, mask)  y = Softmax(s)  t = Sub(x, mask)  u = Neg(x)
              v = Add(u, mask)  z = Softmax(v) }
            """
        )
    )
    assert CanonicalizeMask().run(compilation) == 2
    assert set(compilation.graph.initializers) == {"mask", "mask_finite"}
    assert [d.code for d in compilation.diagnostics] == ["QN111"]
    assert CanonicalizeMask().run(compilation) == 0


@pytest.mark.parametrize(
    "text",
    [
        # no softmax behind it
        """
        m (float[1, 2] x) => (float[1, 2] y) <float[1, 2] mask = {0, -65504}>
        { y = Add(x, mask) }
        """,
        # a position bias
        """
        m (float[1, 2] x) => (float[1, 2] y) <float[1, 2] bias = {0, -9999}>
        { s = Add(x, bias)  y = Softmax(s) }
        """,
        # behind an operator that is no carrier
        """
        m (float[1, 2] x) => (float[1, 2] y) <float[1, 2] mask = {0, -65504}>
        { s = Add(x, mask)  e = Exp(s)  y = Softmax(e) }
        """,
        # of a softmax of another domain
        """
        <ir_version: 11, opset_import: ["" : 23, "acme" : 1]>
        m (float[1, 2] x) => (float[1, 2] y) <float[1, 2] mask = {0, -65504}>
        { s = Add(x, mask)  y = acme.Softmax(s) }
        """,
        # indices are no mask
        """
        m (float[1, 2] x) => (float[1, 1] y) <int64[1] at = {-65504}, int64[1] end = {1},
        int64[1] axis = {1}>
        { s = Slice(x, at, end, axis)  y = Softmax(s) }
        """,
    ],
)
def test_other_constants_stay(text: str) -> None:
    assert_keeps(CanonicalizeMask(), text)

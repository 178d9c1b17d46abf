"""Hadamard matrices and the random rotations built on them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qnpu.compiler.hadamard import (
    NoHadamardError,
    hadamard_factors,
    hadamard_matrix,
    hadamard_pair,
    has_hadamard,
    is_scaled_hadamard,
    random_hadamard,
    random_orthogonal,
    rotation_matrix,
)

REACHABLE = [n for n in range(1, 401) if has_hadamard(n)]
# Widths and head sizes of published models, with those that need a prime power or Williamson.
MODEL_ORDERS = {
    640: (20, 32),
    768: (12, 64),
    896: (28, 32),
    960: (60, 16),
    1152: (36, 32),
    1536: (12, 128),
    2304: (36, 64),
    2560: (20, 128),
    3584: (28, 128),
    4864: (76, 64),
    5120: (20, 256),
    5632: (44, 128),
    5760: (180, 32),
    6912: (108, 64),
    8192: (8192,),
    8960: (140, 64),
    9216: (36, 256),
    11008: (172, 64),
    13824: (108, 128),
    14336: (28, 512),
    18944: (148, 128),
}


def assert_hadamard(h: NDArray[np.int8], order: int) -> None:
    assert h.shape == (order, order)
    assert h.dtype == np.int8
    assert np.array_equal(np.abs(h), np.ones_like(h))
    # BLAS in float64 is exact here: every partial sum is an integer below 2**53.
    gram = (h.astype(np.float64) @ h.T.astype(np.float64)).astype(np.int64)
    assert np.array_equal(gram, order * np.eye(order, dtype=np.int64))


def orthogonality_error(r: NDArray[np.float64]) -> float:
    return float(np.abs(r @ r.T - np.eye(len(r))).max())


@pytest.mark.parametrize(
    "order",
    [
        *(1, 2, 4, 8, 64, 128, 1024),  # Sylvester
        *(12, 20, 24, 44, 60, 108, 140),  # Paley I, prime
        *(28, 244, 344),  # Paley I over GF(27), GF(243), GF(343)
        *(36, 76, 148),  # Paley II, prime
        *(52, 100, 340, 1252),  # Paley II over GF(25), GF(49), GF(169), GF(625)
        *(92, 116, 172),  # Williamson
        *(40, 144, 576, 640, 768, 896, 960, 1152, 1280, 1536),  # Kronecker products
    ],
)
def test_rows_are_orthogonal_exactly(order: int) -> None:
    assert_hadamard(hadamard_matrix(order), order)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(REACHABLE))
def test_every_reachable_order_is_hadamard(order: int) -> None:
    assert prod(hadamard_factors(order)) == order
    assert_hadamard(hadamard_matrix(order), order)


def test_gaps_up_to_400() -> None:
    gaps = {156, 188, 236, 260, 268, 292, 324, 356, 372, 376}
    assert set(REACHABLE) == {1, 2, *range(4, 401, 4)} - gaps


@pytest.mark.parametrize(("order", "factors"), MODEL_ORDERS.items())
def test_model_orders_take_the_largest_power_of_two(order: int, factors: tuple[int, ...]) -> None:
    assert has_hadamard(order)
    assert hadamard_factors(order) == factors


@pytest.mark.parametrize(
    ("order", "factors"),
    [
        (1, (1,)),
        (2, (2,)),
        (12, (12,)),
        (24, (12, 2)),
        (144, (36, 4)),  # not (12, 12): the larger power of two
        (576, (36, 16)),
        (8800, (20, 220, 2)),  # not (44, 100, 2): the smaller first
    ],
)
def test_factors(order: int, factors: tuple[int, ...]) -> None:
    assert hadamard_factors(order) == factors


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 10, 156, 2 * 577])
def test_unknown_order_raises_and_names_it(order: int) -> None:
    assert not has_hadamard(order)
    for build in (hadamard_matrix, hadamard_factors):
        with pytest.raises(NoHadamardError, match=rf"order {order} ") as caught:
            build(order)
        assert caught.value.order == order
    with pytest.raises(NoHadamardError):
        random_hadamard(order, 0)


def test_matrix_is_the_callers_own() -> None:
    first = hadamard_matrix(12)
    first[:] = 0
    assert_hadamard(hadamard_matrix(12), 12)


@pytest.mark.parametrize("order", [1, 2, 12, 576])
def test_random_hadamard_flips_rows_only(order: int) -> None:
    r = random_hadamard(order, 7)
    assert r.dtype == np.float64
    assert orthogonality_error(r) <= 1e-12
    ratio = r * np.sqrt(order) / hadamard_matrix(order)
    signs = np.sign(ratio[:, :1])
    np.testing.assert_allclose(ratio, np.broadcast_to(signs, ratio.shape), rtol=1e-15)


def test_seeds_spread_one_row_vector_differently() -> None:
    x = np.ones(64)  # a row of the plain matrix, the worst case: all its energy in one channel
    peaks = {float(np.abs(x @ random_hadamard(64, seed)).max()) for seed in range(8)}
    assert np.abs(x @ hadamard_matrix(64)).max() == 64
    assert len(peaks) > 2
    assert max(peaks) < 4


@pytest.mark.parametrize("build", [random_hadamard, random_orthogonal])
def test_the_seed_alone_decides(build: Callable[[int, int], NDArray[np.float64]]) -> None:
    assert np.array_equal(build(64, 3), build(64, 3))
    assert not np.array_equal(build(64, 3), build(64, 4))


@pytest.mark.parametrize("order", [1, 2, 7, 64, 300])
def test_random_orthogonal_is_orthogonal(order: int) -> None:
    r = random_orthogonal(order, 11)
    assert r.shape == (order, order)
    assert r.dtype == np.float64
    assert orthogonality_error(r) <= 1e-12


def test_random_orthogonal_has_the_haar_sign() -> None:
    # Q's own R has a positive diagonal, so that Qᵀ·G does, whatever LAPACK's convention.
    for seed in range(20):
        gaussian = np.random.Generator(np.random.PCG64(seed)).standard_normal((9, 9))
        r = random_orthogonal(9, seed).T @ gaussian
        assert (np.diagonal(r) > 0).all()
        np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-13)


def test_haar_mean_is_zero() -> None:
    # Without the sign fix LAPACK's Q[0, 0] is always negative. Haar: mean 0, variance 1/order.
    corners = [random_orthogonal(4, seed)[0, 0] for seed in range(400)]
    assert abs(np.mean(corners)) < 5 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize("order", [0, -3])
def test_random_orthogonal_rejects_empty(order: int) -> None:
    with pytest.raises(ValueError, match=str(order)):
        random_orthogonal(order, 0)
    with pytest.raises(ValueError, match=str(order)):
        rotation_matrix(order, 0)


def test_rotation_matrix_says_which() -> None:
    known, is_hadamard = rotation_matrix(28, 5)
    assert is_hadamard
    assert np.array_equal(known, random_hadamard(28, 5))
    unknown, is_hadamard = rotation_matrix(30, 5)
    assert not is_hadamard
    assert np.array_equal(unknown, random_orthogonal(30, 5))


# --- online rotations ---


@pytest.mark.parametrize(
    ("order", "pair"),
    [
        (1536, (32, 48)),
        (128, (8, 16)),
        (64, (8, 8)),
        (11008, (64, 172)),
        (8960, (80, 112)),
        (4, (2, 2)),
        (2, None),
        (12, None),  # 3 · 4: no Hadamard matrix of order 3; 2 · 6: none of order 6
        (172, None),
        (7, None),
        (1, None),
    ],
)
def test_the_pair_of_the_least_sum(order: int, pair: tuple[int, int] | None) -> None:
    assert hadamard_pair(order) == pair


@pytest.mark.parametrize("order", REACHABLE)
def test_a_pair_is_the_best_of_all(order: int) -> None:
    sums = [
        a + order // a
        for a in range(2, order // 2 + 1)
        if order % a == 0 and has_hadamard(a) and has_hadamard(order // a)
    ]
    pair = hadamard_pair(order)
    assert (sum(pair) if pair else None) == min(sums, default=None)


@pytest.mark.parametrize("scale", [1.0, 1 / 127, -3.0])
@pytest.mark.parametrize("order", [2, 4, 12, 64])
def test_a_scaled_hadamard_matrix_is_known(order: int, scale: float) -> None:
    matrix = np.asarray(random_hadamard(order, 3) * scale, np.float32)
    assert is_scaled_hadamard(matrix)
    one_sign = matrix.copy()
    one_sign[1, 0] *= -1
    one_size = matrix.copy()
    one_size[-1, -1] *= 1.0001
    for other in (one_sign, one_size, matrix[:-1], matrix * 0, matrix * np.nan):
        assert not is_scaled_hadamard(other)


def test_no_hadamard_matrices() -> None:
    for matrix in (np.ones((2, 2)), np.ones((1, 1)), np.eye(4), np.zeros((0, 0)), np.ones(4)):
        assert not is_scaled_hadamard(matrix)
    for array in (np.asarray(3.0), np.ones((2, 2, 2))):
        assert not is_scaled_hadamard(array)

"""Orthogonal matrices that a rotation starts from: Hadamard where one is known, random otherwise.

A Hadamard matrix of order n is a ±1 matrix with H·Hᵀ = n·I. One can exist for n = 1, 2 and
multiples of 4 only. This module builds those that follow from

- Sylvester (1867): H₂ₙ = [[H, H], [H, −H]];
- Paley (1933), from the quadratic character of a finite field: order q + 1 for a prime power
  q ≡ 3 mod 4 (I), order 2(q + 1) for a prime power q ≡ 1 mod 4 (II);
- Williamson (1944), from four symmetric circulants: orders out of Paley's reach, namely 172 (first
  found by him), 92 (Baumert, Golomb and Hall, 1962) and 116 (Baumert, 1966);
- Kronecker products of these.

Every choice is deterministic, so that an order always gives the same matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache, reduce
from math import isqrt

import numpy as np
from numpy.typing import NDArray

# Odd n → for each of the circulants A, B, C, D of order n: the places k ≤ n/2 at which its first
# row, symmetric, holds −1. They solve A² + B² + C² + D² = 4n·I. Our own search: match the periodic
# autocorrelations of pairs of rows; for 43 only rows constant on the cosets of the sixth roots of
# unity mod 43, which leaves few.
_WILLIAMSON: dict[int, tuple[tuple[int, ...], ...]] = {
    23: (
        (3, 4, 6, 7, 8, 9, 11),
        (2, 7, 8, 9),
        (1, 3, 5, 6, 9),
        (3, 6, 7, 8, 10),
    ),
    29: (
        (5, 6, 7, 9, 11, 14),
        (2, 4, 5, 9, 10, 12, 13, 14),
        (2, 3, 4, 5, 9, 12, 14),
        (1, 2, 4, 8, 12),
    ),
    43: (
        (2, 4, 5, 8, 12, 13, 14, 15, 19),
        (1, 2, 5, 6, 7, 8, 10, 12, 13, 14, 16, 17),
        (1, 2, 6, 7, 9, 11, 12, 14, 20),
        (1, 3, 5, 6, 7, 8, 13, 18, 21),
    ),
}


class NoHadamardError(ValueError):
    """No construction here gives a Hadamard matrix of this order.

    Attributes:
        order: the order asked for.
    """

    def __init__(self, order: int) -> None:
        super().__init__(f"no Hadamard matrix of order {order} is known to this module")
        self.order = order


def hadamard_matrix(order: int) -> NDArray[np.int8]:
    """The ±1 matrix H with H·Hᵀ = order·I, as the Kronecker product of ``hadamard_factors(order)``.

    Sources: Sylvester 1867, Paley 1933, Williamson 1944 (see the module).

    Returns:
        int8 (order, order), a new array at each call.

    Raises:
        NoHadamardError: if no construction reaches the order.
    """
    return reduce(np.kron, [_build(factor) for factor in hadamard_factors(order)])


def has_hadamard(order: int) -> bool:
    """Whether ``hadamard_matrix(order)`` succeeds. Builds no matrix; never raises."""
    return _factors(order) is not None


def hadamard_factors(order: int) -> tuple[int, ...]:
    """The orders whose Kronecker product, left to right, is ``hadamard_matrix(order)``.

    Among all factorisations: the largest power of two, whose transform is the cheapest to apply;
    then the fewest other factors; then the smallest first. The power of two comes last: 576 gives
    (36, 16), 12 gives (12,), 64 gives (64,).

    Raises:
        NoHadamardError: if no construction reaches the order.
    """
    factors = _factors(order)
    if factors is None:
        raise NoHadamardError(order)
    return factors


def hadamard_pair(order: int) -> tuple[int, int] | None:
    """(a, b), a·b = order and 2 ≤ a ≤ b, both with Hadamard matrices, of the least a + b.

    (X·A) then (·B) over a row of a·b numbers takes a + b products each, A⊗B as a whole a·b: 1536
    gives (32, 48). None where no two such factors exist. Builds no matrix.
    """
    smaller = (a for a in range(isqrt(order), 1, -1) if order % a == 0)
    return next(((a, order // a) for a in smaller if _both(a, order // a)), None)


def is_scaled_hadamard(matrix: NDArray[np.floating]) -> bool:
    """Whether a matrix is a Hadamard matrix of order 2 or more times a positive number."""
    size = len(matrix) if matrix.ndim else 0
    if size < 2 or matrix.shape != (size, size):
        return False
    scale = np.abs(matrix[0, 0])
    if not scale > 0 or (np.abs(matrix[0]) != scale).any() or (np.abs(matrix) != scale).any():
        return False
    signs = np.sign(matrix).astype(np.float32)  # products of ±1 add up exactly
    return np.array_equal(signs @ signs.T, size * np.eye(size, dtype=np.float32))


def random_hadamard(order: int, seed: int) -> NDArray[np.float64]:
    """diag(±1)·H/√order, orthogonal, with signs drawn from ``PCG64(seed)``.

    The randomised Hadamard transform of Ailon and Chazelle (2006), used for rotations since QuIP#
    (2024): all entries have one magnitude, so that an outlier spreads evenly over all channels. For
    row vectors, x·R, the signs come before H: behind it they would only flip the results' signs,
    and every seed would do as well as any other.

    Returns:
        float64 (order, order).

    Raises:
        NoHadamardError: if no construction reaches the order.
    """
    hadamard = hadamard_matrix(order)
    signs = np.random.Generator(np.random.PCG64(seed)).choice([-1.0, 1.0], size=order)
    return np.asarray(hadamard * (signs / np.sqrt(order))[:, None], dtype=np.float64)


def random_orthogonal(order: int, seed: int) -> NDArray[np.float64]:
    """An orthogonal matrix drawn from the Haar measure with ``PCG64(seed)``.

    QR of a Gaussian matrix; the columns of Q are multiplied by the signs of R's diagonal, without
    which Q follows the sign convention of the LAPACK in use (Stewart 1980, Mezzadri 2007).

    Returns:
        float64 (order, order).

    Raises:
        ValueError: if the order is below 1.
    """
    if order < 1:
        raise ValueError(f"an orthogonal matrix needs an order of at least 1, got {order}")
    gaussian = np.random.Generator(np.random.PCG64(seed)).standard_normal((order, order))
    q, r = np.linalg.qr(gaussian)
    return np.asarray(q * np.where(np.diagonal(r) < 0, -1.0, 1.0), dtype=np.float64)


def rotation_matrix(order: int, seed: int) -> tuple[NDArray[np.float64], bool]:
    """``random_hadamard`` where the order has a Hadamard matrix, else ``random_orthogonal``.

    Returns:
        float64 (order, order), and whether it is a Hadamard matrix.

    Raises:
        ValueError: if the order is below 1.
    """
    if has_hadamard(order):
        return random_hadamard(order, seed), True
    return random_orthogonal(order, seed), False


# --- which factors ---


def _both(a: int, b: int) -> bool:
    return has_hadamard(a) and has_hadamard(b)


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@lru_cache(maxsize=1024)
def _factors(order: int) -> tuple[int, ...] | None:
    if order < 1:
        return None
    two = order & -order  # the largest power of two that divides it
    while two:
        others = _split(order // two)
        if others is not None:
            return (*others, two) if two > 1 or not others else others
        two >>= 1
    return None


@lru_cache(maxsize=4096)
def _split(n: int) -> tuple[int, ...] | None:
    """n as a product of orders that are no powers of two: the fewest, then the smallest first."""
    if n == 1:
        return ()
    if n % 4 or _is_power_of_two(n):
        return None
    if _is_base(n):
        return (n,)
    splits = [
        (first, *rest)
        for first in range(12, n // 12 + 1, 4)
        if n % first == 0 and _is_base(first) and (rest := _split(n // first)) is not None
    ]
    return min(splits, key=lambda split: (len(split), split), default=None)


def _is_base(n: int) -> bool:
    """Whether Paley or Williamson gives the order n (a multiple of 4) with no product."""
    return _paley_one(n) is not None or _paley_two(n) is not None or n // 4 in _WILLIAMSON


def _paley_one(n: int) -> tuple[int, int] | None:
    """(p, k) with n = pᵏ + 1 and pᵏ ≡ 3 mod 4."""
    return _prime_power(n - 1) if n % 4 == 0 else None


def _paley_two(n: int) -> tuple[int, int] | None:
    """(p, k) with n = 2(pᵏ + 1) and pᵏ ≡ 1 mod 4."""
    return _prime_power(n // 2 - 1) if n % 4 == 0 and n // 2 % 4 == 2 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = pᵏ, p prime; None if there is none."""
    if q < 2:
        return None
    p = next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


# --- the constructions ---


def _build(n: int) -> NDArray[np.int8]:
    if _is_power_of_two(n):
        return _sylvester(n)
    if (field := _paley_one(n)) is not None:
        return _border(*field, sign=-1) + np.eye(n, dtype=np.int8)
    if (field := _paley_two(n)) is not None:
        conference = _border(*field, sign=1)
        identity = np.eye(n // 2, dtype=np.int8)
        plus = np.array([[1, 1], [1, -1]], dtype=np.int8)
        minus = np.array([[1, -1], [-1, -1]], dtype=np.int8)
        return np.kron(conference, plus) + np.kron(identity, minus)
    return _williamson(n // 4)


def _sylvester(n: int) -> NDArray[np.int8]:
    h = np.ones((1, 1), dtype=np.int8)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


def _border(p: int, k: int, sign: int) -> NDArray[np.int8]:
    """Paley's S = [[0, 1ᵀ], [sign·1, Q]] with Q[a, b] = χ(a − b) over GF(q), q = pᵏ: S·Sᵀ = q·I.

    χ(−1) is −1 for q ≡ 3 mod 4, which makes Q skew, and 1 for q ≡ 1, which makes it symmetric; the
    sign of the border must agree.
    """
    character = _quadratic_character(p, k)
    q = p**k
    place = p ** np.arange(k)
    digits = np.arange(q)[:, None] // place % p  # (q, k): each element as a polynomial over GF(p)
    s = np.ones((q + 1, q + 1), dtype=np.int8)
    s[0, 0] = 0
    s[1:, 0] = sign
    for a in range(q):  # by row: the q × q table of differences would take eight times s or more
        s[a + 1, 1:] = character[(digits[a] - digits) % p @ place]
    return s


def _quadratic_character(p: int, k: int) -> NDArray[np.int8]:
    """χ over GF(pᵏ), indexed by Σ dᵢpⁱ for the element Σ dᵢxⁱ: 0 at zero, 1 at squares, −1 else."""
    character = np.zeros(p**k, dtype=np.int8)
    for exponent, element in enumerate(_primitive_powers(p, k)):
        # x generates the nonzero elements, so the squares are its even powers.
        character[sum(d * p**i for i, d in enumerate(element))] = 1 - 2 * (exponent % 2)
    return character


def _primitive_powers(p: int, k: int) -> list[tuple[int, ...]]:
    """x⁰ … x^(q−2) modulo the first monic f of degree k over GF(p) for which x has order q − 1.

    That order already proves that f is irreducible: all nonzero residues are powers of x, hence
    invertible. For k = 1 this is the search for a primitive root.
    """
    return next(
        powers
        for tail in itertools.product(range(p), repeat=k)
        if tail[0] and len(powers := list(_powers_of_x(tail, p))) == p**k - 1
    )


def _powers_of_x(tail: tuple[int, ...], p: int) -> Iterator[tuple[int, ...]]:
    """1, x, x², … modulo xᵏ + Σ tailᵢxⁱ over GF(p), up to the return to 1; tail₀ ≠ 0 ensures it."""
    one = (1, *[0] * (len(tail) - 1))
    element = one
    while True:
        yield element
        shifted = (0, *element[:-1])
        top = element[-1]
        element = tuple((d - top * t) % p for d, t in zip(shifted, tail, strict=True))
        if element == one:
            return


def _williamson(n: int) -> NDArray[np.int8]:
    """Williamson's array of four symmetric circulants of order n: (4n, 4n)."""
    index = np.arange(n)
    shift = (index - index[:, None]) % n
    a, b, c, d = (
        np.where(np.isin(np.minimum(shift, n - shift), places), -1, 1).astype(np.int8)
        for places in _WILLIAMSON[n]
    )
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])

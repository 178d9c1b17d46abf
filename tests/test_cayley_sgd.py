"""Rotations stay orthogonal while they are learned, and get where they should."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from qnpu.compiler.hadamard import random_orthogonal
from qnpu.runtime_check.cayley_sgd import ORTHOGONALITY_LIMIT, CayleySGD, orthogonality_error


def rotation(order: int, seed: int = 0) -> Tensor:
    """In SO(n): descent cannot leave the half of O(n) that it starts in."""
    matrix = torch.from_numpy(random_orthogonal(order, seed)).float()
    if torch.linalg.det(matrix.double()) < 0:
        matrix[0] *= -1
    return matrix


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("order", [2, 16, 64, 96])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [0.1, 100.0])
def test_orthogonal_over_a_thousand_steps(order: int, momentum: float, lr: float) -> None:
    """Gradients of another scale and direction at each step; 100 leaves the bound on α to act."""
    matrix = rotation(order).requires_grad_()
    optimizer = CayleySGD([matrix], lr=lr, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    start = matrix.detach().clone()
    worst = furthest = 0.0
    for step in range(1000):
        matrix.grad = torch.randn(order, order, generator=generator) * 10.0 ** (step % 5 - 2)
        optimizer.step()
        worst = max(worst, orthogonality_error(matrix))
        furthest = max(furthest, float((matrix.detach() - start).abs().max()))
    assert worst <= ORTHOGONALITY_LIMIT
    assert furthest > 0.1
    assert torch.linalg.det(matrix.detach().double()) > 0.9  # QR mirrored nothing


def procrustes(steps: int, momentum: float, seed: int = 0) -> tuple[float, float, Tensor]:
    """Least ‖R·A − B‖² found, its closed form from an SVD, and R."""
    order, columns = 16, 40
    a = noise(order, columns, seed=seed)
    b = rotation(order, seed + 1) @ a + 0.3 * noise(order, columns, seed=seed + 2)
    u, s, v = torch.linalg.svd((b @ a.T).double())
    signs = torch.ones(order, dtype=torch.float64)
    signs[-1] = torch.sign(torch.linalg.det(u @ v))  # the best in SO(n)
    best = (a.square().sum() + b.square().sum()).double() - 2 * (s * signs).sum()
    matrix = rotation(order, seed + 3).requires_grad_()
    rate = 0.5 / float(s[0] + s[1])  # a quarter of what the curvature at the optimum allows
    optimizer = CayleySGD([matrix], lr=rate, momentum=momentum)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (matrix @ a - b).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return loss.item(), best.item(), matrix.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_procrustes(momentum: float, seed: int) -> None:
    found, best, _ = procrustes(600, momentum, seed)
    assert found == pytest.approx(best, rel=1e-4)
    assert procrustes(1, momentum, seed)[0] > 2 * best


def test_same_seed_same_result() -> None:
    assert torch.equal(procrustes(50, 0.9)[2], procrustes(50, 0.9)[2])
    assert not torch.equal(procrustes(50, 0.9)[2], procrustes(50, 0.9, seed=1)[2])


@pytest.mark.parametrize(("lr", "tolerance"), [(1e-3, 1e-7), (1e-2, 1e-6)])
def test_one_step_is_the_cayley_transform(lr: float, tolerance: float) -> None:
    order = 32
    matrix = rotation(order).requires_grad_()
    gradient = noise(order, order, seed=5)
    x, g = matrix.detach().double(), gradient.double()
    w = -(g @ x.T - x @ g.T) / 2
    assert lr < 1 / torch.linalg.matrix_norm(w, 1)
    identity = torch.eye(order, dtype=torch.float64)
    exact = torch.linalg.solve(identity - lr / 2 * w, (identity + lr / 2 * w) @ x)
    matrix.grad = gradient
    CayleySGD([matrix], lr=lr).step()
    assert (matrix.detach().double() - exact).abs().max() <= tolerance
    assert (exact - x).abs().max() > 100 * tolerance


def test_the_step_is_bounded() -> None:
    """α = 1/‖W‖₁ where lr is larger, so any larger one moves as far."""
    gradient = noise(16, 16, seed=5)
    moved = []
    for lr in (1e3, 1e6):
        matrix = rotation(16).requires_grad_()
        matrix.grad = gradient
        CayleySGD([matrix], lr=lr).step()
        moved.append(matrix.detach())
    assert torch.equal(*moved)
    assert not torch.equal(moved[0], rotation(16))


def test_a_gradient_that_would_only_stretch_moves_nothing() -> None:
    matrix = rotation(16).requires_grad_()
    matrix.grad = 3 * matrix.detach().clone()
    CayleySGD([matrix], lr=0.1).step()
    torch.testing.assert_close(matrix.detach(), rotation(16), rtol=0.0, atol=1e-6)
    matrix.grad = torch.zeros(16, 16)
    CayleySGD([matrix], lr=0.1).step()
    assert orthogonality_error(matrix) <= ORTHOGONALITY_LIMIT


def test_a_stack_of_matrices_moves_as_each_alone() -> None:
    each = [rotation(8, seed).requires_grad_() for seed in (0, 1)]
    stack = torch.stack([m.detach() for m in each]).requires_grad_()
    gradient = noise(2, 8, 8, seed=5) * torch.tensor([1.0, 50.0])[:, None, None]
    stack.grad = gradient
    for matrix, slope in zip(each, gradient, strict=True):
        matrix.grad = slope
    CayleySGD([stack], lr=0.2).step()
    CayleySGD(each, lr=0.2).step()
    torch.testing.assert_close(stack.detach(), torch.stack(each).detach(), rtol=0.0, atol=1e-6)


def test_resumed_from_a_state() -> None:
    """Stopped after any step and loaded again, it goes on to the same numbers."""

    def steps(matrix: Tensor, optimizer: CayleySGD, seeds: range) -> None:
        for seed in seeds:
            matrix.grad = noise(16, 16, seed=seed)
            optimizer.step()

    whole = rotation(16).requires_grad_()
    optimizer = CayleySGD([whole], lr=0.1, momentum=0.9)
    steps(whole, optimizer, range(5))
    saved = whole.detach().clone(), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, range(5, 10))
    again = saved[0].requires_grad_()
    resumed = CayleySGD([again], lr=0.1, momentum=0.9)
    resumed.load_state_dict(saved[1])
    steps(again, resumed, range(5, 10))
    assert torch.equal(whole, again)


@pytest.mark.parametrize(
    ("matrix", "options", "word"),
    [
        (torch.ones(2, 3), {}, "square"),
        (torch.ones(3), {}, "square"),
        (torch.eye(3, dtype=torch.float64), {}, "float32"),
        (2 * torch.eye(3), {}, "over"),
        (torch.eye(3), {"lr": 0.0}, "lr"),
        (torch.eye(3), {"lr": float("nan")}, "lr"),
        (torch.eye(3), {"momentum": 1.0}, "momentum"),
    ],
)
def test_what_it_does_not_take(matrix: Tensor, options: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        CayleySGD([matrix.requires_grad_()], **{"lr": 0.1, **options})

"""Gradient descent that keeps rotations orthogonal: Cayley SGD.

Source: Li, Fuxin and Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via the
Cayley Transform" (ICLR 2020), for square matrices; the step's bound is that of SpinQuant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

FIXED_POINT_STEPS = 5
ORTHOGONALITY_LIMIT = 1e-5
_RENEWED_FROM = ORTHOGONALITY_LIMIT / 4


def orthogonality_error(rotation: Tensor) -> float:
    """max |RᵀR − I|, in float64.

    Args:
        rotation: (…, n, n).
    """
    wide = rotation.detach().double()
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return float((wide.mT @ wide - identity).abs().max())


class CayleySGD(torch.optim.Optimizer):
    """SGD with momentum on orthogonal matrices.

    With X the matrix, G its gradient and M the momentum, one step is

        M ← β·M − G
        W = ½·(M·Xᵀ − X·Mᵀ)              skew-symmetric; W·X is M's part along the manifold
        M ← W·X
        α = min(lr, 1/‖W‖₁)              ‖·‖₁ the largest sum of a column's magnitudes
        Y = (I − α/2·W)⁻¹·(I + α/2·W)·X  orthogonal, by five steps of Y ← X + α/2·W·(X + Y)
                                         from Y = X + α·W·X

    (for square X, Ŵ = M·Xᵀ − ½·X·Xᵀ·M·Xᵀ of the paper is ½·M·Xᵀ, and W = Ŵ − Ŵᵀ). What five steps
    and float32 leave over adds up, so a matrix is made anew by QR whenever max |XᵀX − I| has grown
    past a quarter of 1e-5; that error stays below 1e-5 after every step.

    Args:
        params: float32 matrices (…, n, n), orthogonal to 1e-5.
        lr: α at most.
        momentum: β, 0 ≤ β < 1.

    Raises:
        ValueError: a parameter is not square, not float32 or not orthogonal; lr or momentum is out
            of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
    ) -> None:
        if not lr > 0.0:
            raise ValueError(f"lr {lr} is not positive")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum {momentum} is not in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for matrix in group["params"]:
                _check(matrix)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every matrix that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, as for any torch optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, group["lr"], group["momentum"])
        return loss

    def _move(self, matrix: Tensor, lr: float, momentum: float) -> None:
        state = self.state[matrix]
        velocity = -matrix.grad if matrix.grad is not None else torch.zeros_like(matrix)
        if momentum and "velocity" in state:
            velocity = velocity.add(state["velocity"], alpha=momentum)
        outer = velocity @ matrix.mT
        skew = (outer - outer.mT) / 2
        tangent = skew @ matrix
        if momentum:
            state["velocity"] = tangent
        norm = skew.abs().sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
        rate = torch.clamp(norm.reciprocal(), max=lr)  # of a zero gradient 1/0, so lr
        half = skew * (rate / 2)
        moved = matrix + rate * tangent
        for _ in range(FIXED_POINT_STEPS):
            moved = matrix + half @ (matrix + moved)
        if orthogonality_error(moved) > _RENEWED_FROM:
            moved = _renewed(moved)
        matrix.copy_(moved)


def _renewed(matrix: Tensor) -> Tensor:
    """The Q of a QR decomposition in float64 whose R has a positive diagonal: the nearest one."""
    q, r = torch.linalg.qr(matrix.double())
    signs = torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    renewed: Tensor = (q * signs).to(matrix.dtype)
    return renewed


def _check(matrix: Tensor) -> None:
    shape = tuple(matrix.shape)
    if matrix.ndim < 2 or shape[-1] != shape[-2]:
        raise ValueError(f"a matrix of shape {shape} is not square")
    if matrix.dtype is not torch.float32:
        raise ValueError(f"a matrix of {matrix.dtype} is not float32")
    if (error := orthogonality_error(matrix)) > ORTHOGONALITY_LIMIT:
        raise ValueError(f"a matrix is {error:.2e} from orthogonal, over {ORTHOGONALITY_LIMIT:g}")

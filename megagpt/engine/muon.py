"""Muon's rule for one matrix: momentum, orthogonalised by Newton-Schulz, scaled by the matrix's shape.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (the post, and muon.py of
KellerJordan/Muon); Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv:2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of x -> a x + b x^3 + c x^5, applied to each singular value.

Chosen for a steep slope at 0, not for convergence: what was between 0.003 and 1 lies between 0.68 and 1.21 after five
steps, and further steps do not bring it nearer to 1. Source: Jordan et al. 2024, on tuning the coefficients.
"""

NS_EPS = 1e-15
"""Smallest norm that a matrix is divided by: it may be zero.

Not the 1e-7 of Jordan's code and PyTorch's, which is added or compared in bf16: gradients of queries and keys are that
small at the start where they are clipped hard, and their updates would come out shorter.
"""


def orthogonalized(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """U S' V^T for the matrix U S V^T, with S' near 1: about the closest matrix with orthonormal rows or columns.

    Whatever the matrix is multiplied with, the result is the same: a clipped gradient makes no smaller update.

    Args:
        matrix: (A, B), whole: the parts of a matrix that is cut have other singular values.
        steps: Newton-Schulz iterations.
        dtype: of the iteration; Jordan et al. 2024 run it in bf16.

    Returns:
        (A, B) fp32.
    """
    a, b, c = NS_COEFFICIENTS
    x = matrix.float()
    x = (x / x.norm().clamp(min=NS_EPS)).to(dtype)  # no singular value is above 1 now
    is_tall = x.shape[0] > x.shape[1]
    x = x.mT if is_tall else x  # the products are of the shorter side
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).float()


def rms_scale(n_rows: int, n_columns: int) -> float:
    """Gives each update the root mean square that AdamW's usually have, 0.2, so that both can share a learning rate.

    Source: Liu et al. 2025, equation 4: 0.2 sqrt(max(A, B)).
    """
    return 0.2 * math.sqrt(max(n_rows, n_columns))


def spectral_scale(n_rows: int, n_columns: int) -> float:
    """Outputs change alike whatever the shape. Source: Jordan's muon.py, sqrt(max(1, A / B)) for a weight (out, in)."""
    return math.sqrt(max(1.0, n_rows / n_columns))


SCALES: dict[str, Callable[[int, int], float]] = {"rms": rms_scale, "spectral": spectral_scale}
"""`optim.muon.scale` -> factor on the orthogonalised matrix (A, B)."""


def momentum_direction(gradient: Tensor, momentum: Tensor, decay: float, *, nesterov: bool) -> Tensor:
    """Take a gradient into the momentum, in place, and give what is to be orthogonalised.

    The momentum is a moving average, (1 - decay) times the sum in the papers: Newton-Schulz does not see the factor.

    Source: Jordan et al. 2024, algorithm of the optimizer, with Nesterov's momentum as their code has it.
    """
    momentum.lerp_(gradient, 1 - decay)
    return gradient.lerp(momentum, decay) if nesterov else momentum

"""Vectors of one length, for classifiers that see directions only."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-12  # F.normalize's: a zero vector has cosine 0 with everything


def unit(vectors: Tensor, scale: float = 1.0) -> Tensor:
    """Vectors along the last dimension brought to length ``scale``.

    Norms are taken in float32 (float64 for float64): in float16 the sum of squares overflows at 65504 and 1e-12 is 0.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype).clamp_min(_EPS)
    return (vectors * (scale / norm)).to(vectors.dtype)

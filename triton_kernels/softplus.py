"""softplus(x) = log(1 + e^x) inside a kernel, without overflow and without cancellation."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stable_softplus(x):
    """max(x, 0) + log1p(e^-|x|); log1p(e) = log(w) e / (w - 1), w = 1 + e (Higham 2002, section 1.14.1)."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(x, 0.0) + log1p

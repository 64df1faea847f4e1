"""Ternary matrices at two bits a weight, multiplied by one vector: what decoding a token is bound by.

A 32-bit word holds t + 1 of the 16 rows of a group at one column, row j at bit 2 j. ``word >> 2 j`` masked
with 0x00030003 is row j in its low half and row j + 8 in its high half; times an unsigned 8-bit activation
both halves accumulate in one 32-bit register, 128 products before the low half could overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows that share a word."""


@dataclass(frozen=True)
class PackedTernary:
    """A ternary matrix [N, K].

    Attributes:
        words: int32 [ceil(N / 16), K].
        row_sums: int32 [N], sum of every row.
    """

    words: Tensor
    row_sums: Tensor


def pack_ternary(weight: Tensor) -> PackedTernary:
    """Pack a ternary matrix [N, K] of any dtype.

    Raises:
        ValueError: if an entry is none of -1, 0, 1.
    """
    t = weight.to(torch.int64)
    if not bool(((t >= -1) & (t <= 1)).all()) or not bool((t == weight).all()):
        raise ValueError("the matrix is not ternary")
    missing = -len(t) % ROWS
    codes = torch.nn.functional.pad(t + 1, (0, 0, 0, missing)).reshape(-1, ROWS, t.shape[1])
    places = 2 * torch.arange(ROWS, device=t.device)[:, None]
    words = (codes << places).sum(1)
    # From unsigned to the signed word with the same bits.
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return PackedTernary(words.contiguous(), t.sum(1).to(torch.int32))


@triton.jit
def _gemv_kernel(words, row_sums, x, y, N, K, STEPS: tl.constexpr, BLOCK_K: tl.constexpr):
    group = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    j = tl.arange(0, 8)
    words += group.to(tl.int64) * K
    both = tl.zeros((8, BLOCK_K), tl.uint32)
    total = tl.zeros((BLOCK_K,), tl.int32)
    for step in range(STEPS):
        at = step * BLOCK_K + k
        word = tl.load(words + at, mask=at < K, other=0).to(tl.uint32, bitcast=True)
        value = tl.load(x + at, mask=at < K, other=-128).to(tl.int32)
        total += tl.where(at < K, value, 0)
        codes = (word[None, :] >> (2 * j).to(tl.uint32)[:, None]) & 0x00030003
        both += codes * (value + 128).to(tl.uint32)[None, :]
    low = tl.sum((both & 0xFFFF).to(tl.int32), 1)
    high = tl.sum((both >> 16).to(tl.int32), 1)
    # sum (t + 1) (x + 128) = sum t x + sum x + 128 (sum t + K)
    offset = tl.sum(total, 0) + 128 * K
    row = group * 16 + j
    sums = tl.load(row_sums + row, mask=row < N, other=0)
    tl.store(y + row, low - offset - 128 * sums, mask=row < N)
    sums = tl.load(row_sums + row + 8, mask=row + 8 < N, other=0)
    tl.store(y + row + 8, high - offset - 128 * sums, mask=row + 8 < N)


# Columns a step, and warps.
BLOCKS = (512, 4)


def ternary_gemv(weight: PackedTernary, x: Tensor) -> Tensor:
    """W x, exact.

    Args:
        weight: W, [N, K] with K up to 2^16.
        x: int8 [K].

    Returns:
        int32 [N].
    """
    N, K = len(weight.row_sums), weight.words.shape[1]
    if x.shape != (K,) or x.dtype != torch.int8:
        raise ValueError(f"x must be int8 [{K}], not {x.dtype} {list(x.shape)}")
    block, warps = BLOCKS
    if K > 128 * block:
        raise ValueError(f"{K} columns overflow the 16-bit sums")
    y = torch.empty(N, dtype=torch.int32, device=x.device)
    _gemv_kernel[(len(weight.words),)](
        weight.words, weight.row_sums, x, y, N, K, STEPS=triton.cdiv(K, block), BLOCK_K=block, num_warps=warps
    )
    return y

"""Ternary matrices at two bits a weight, multiplied by one vector: what decoding a token is bound by.

A 32-bit word holds t + 1 of 4 rows at 4 consecutive columns: byte b is column 4 i + b, bits 2 j and 2 j + 1
of it row j. ``(word >> 2 j) & 0x03030303`` is then row j as four bytes, and one instruction (dp4a) adds its
product with four 8-bit activations to a 32-bit sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SIDE = 4
"""Rows, and columns, that share a word."""


@dataclass(frozen=True)
class PackedTernary:
    """A ternary matrix [N, K].

    Attributes:
        words: int32 [ceil(N / 4), ceil(K / 4)].
        rows, columns: N and K.
    """

    words: Tensor
    rows: int
    columns: int


def pack_ternary(weight: Tensor) -> PackedTernary:
    """Pack a ternary matrix [N, K] of any dtype.

    Raises:
        ValueError: if an entry is none of -1, 0, 1.
    """
    t = weight.to(torch.int64)
    if not bool(((t >= -1) & (t <= 1)).all()) or not bool((t == weight).all()):
        raise ValueError("the matrix is not ternary")
    N, K = t.shape
    codes = torch.nn.functional.pad(t + 1, (0, -K % SIDE, 0, -N % SIDE))
    codes = codes.reshape(-(-N // SIDE), SIDE, -(-K // SIDE), SIDE).transpose(1, 2)
    row, column = torch.meshgrid(*[torch.arange(SIDE, device=t.device)] * 2, indexing="ij")
    words = (codes << (2 * row + 8 * column)).sum((2, 3))
    # From unsigned to the signed word with the same bits.
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return PackedTernary(words.contiguous(), N, K)


@triton.jit
def _dot4(codes, x, total, DP4A: tl.constexpr):
    """total + sum of the products of four unsigned and four signed bytes."""
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(4):
        # Up to the top and back brings the sign along.
        total += ((codes >> (8 * byte)) & 3) * ((x << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def _gemv_kernel(
    words,
    x,
    y,
    N,
    width,
    DP4A: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    row0 = tl.zeros((GROUPS, BLOCK), tl.int32)
    row1 = tl.zeros((GROUPS, BLOCK), tl.int32)
    row2 = tl.zeros((GROUPS, BLOCK), tl.int32)
    row3 = tl.zeros((GROUPS, BLOCK), tl.int32)
    ones = tl.zeros((GROUPS, BLOCK), tl.int32)
    at = words + group[:, None].to(tl.int64) * width
    present = (group * 4 < N)[:, None]
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        i = step * BLOCK + column[None, :]
        word = tl.load(at + i, mask=present & (i < width), other=0)
        value = tl.load(x + i, mask=i < width, other=0) + tl.zeros((GROUPS, BLOCK), tl.int32)
        row0 = _dot4(word & 0x03030303, value, row0, DP4A)
        row1 = _dot4((word >> 2) & 0x03030303, value, row1, DP4A)
        row2 = _dot4((word >> 4) & 0x03030303, value, row2, DP4A)
        row3 = _dot4((word >> 6) & 0x03030303, value, row3, DP4A)
        ones = _dot4(tl.full((GROUPS, BLOCK), 0x01010101, tl.int32), value, ones, DP4A)
    # sum (t + 1) x = sum t x + sum x
    offset = tl.sum(ones, 1)
    row = group * 4
    tl.store(y + row, tl.sum(row0, 1) - offset, mask=row < N)
    tl.store(y + row + 1, tl.sum(row1, 1) - offset, mask=row + 1 < N)
    tl.store(y + row + 2, tl.sum(row2, 1) - offset, mask=row + 2 < N)
    tl.store(y + row + 3, tl.sum(row3, 1) - offset, mask=row + 3 < N)


# Groups of rows a program, words a step, steps whose loads overlap, and warps.
BLOCKS = (1, 128, 8, 1)


def ternary_gemv(weight: PackedTernary, x: Tensor) -> Tensor:
    """W x, exact.

    Args:
        weight: W, [N, K].
        x: int8 [K], K times 255 below 2^31.

    Returns:
        int32 [N].
    """
    K, width = weight.columns, weight.words.shape[1]
    if x.shape != (K,) or x.dtype != torch.int8:
        raise ValueError(f"x must be int8 [{K}], not {x.dtype} {list(x.shape)}")
    if K % SIDE:
        x = torch.nn.functional.pad(x, (0, -K % SIDE))
    groups, block, unroll, warps = BLOCKS
    y = torch.empty(weight.rows, dtype=torch.int32, device=x.device)
    _gemv_kernel[(triton.cdiv(len(weight.words), groups),)](
        weight.words, x.contiguous().view(torch.int32), y, weight.rows, width,
        DP4A=x.is_cuda, STEPS=triton.cdiv(width, block), UNROLL=unroll, GROUPS=groups, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return y

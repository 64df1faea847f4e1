"""Rotations of space, as unit quaternions and as matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels.quaternion import quaternion_conjugate, quaternion_norm, quaternion_product


def quaternion_rotate(q: Tensor, v: Tensor) -> Tensor:
    """The vectors v turned by unit quaternions: q v q*, broadcast over the axes before the last.

    Args:
        q: [..., 4], of length one. v: [..., 3], of the same dtype.

    Returns:
        [..., 3] of that dtype, with gradients to both.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if v.ndim < 1 or v.shape[-1] != 3:
        raise ValueError(f"the vectors have shape {tuple(v.shape)}; give them as [..., 3]")
    turned = quaternion_product(quaternion_product(q, F.pad(v, (1, 0))), quaternion_conjugate(q))
    return turned[..., 1:]


def quaternion_to_matrix(q: Tensor) -> Tensor:
    """The rotation matrices [..., 3, 3] of quaternions [..., 4] other than zero: R v = q v q^-1.

    The length of q does not matter; q and -q are one rotation.

    Raises:
        ValueError: the last axis is not 4.
    """
    a, b, c, d = (q / quaternion_norm(q)[..., None]).unbind(-1)
    rows = (
        (1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)),
        (2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)),
        (2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """The unit quaternions [..., 4] of rotation matrices [..., 3, 3], with real parts of at least zero.

    From the largest of the four components, so that nothing is divided by a small number, not even at half
    turns (Shepperd 1978, J. Guidance and Control 1, 223).

    Raises:
        ValueError: the last axes are not 3 and 3.
    """
    if matrix.shape[-2:] != (3, 3):
        raise ValueError(f"the matrices have shape {tuple(matrix.shape)}; give them as [..., 3, 3]")
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in matrix.unbind(-2))
    # 4 q_i q_j, all of them
    products = (
        (1 + xx + yy + zz, zy - yz, xz - zx, yx - xy),
        (zy - yz, 1 + xx - yy - zz, yx + xy, xz + zx),
        (xz - zx, yx + xy, 1 - xx + yy - zz, zy + yz),
        (yx - xy, xz + zx, zy + yz, 1 - xx - yy + zz),
    )
    table = torch.stack([torch.stack(row, -1) for row in products], -2)
    largest = table.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = torch.take_along_dim(table, largest[..., None, None], -2).squeeze(-2)
    q = F.normalize(row, dim=-1)
    return torch.where(q[..., :1] < 0, -q, q)

"""Algebra of quaternions, [..., 4] as (1, i, j, k): product, conjugate, norm, inverse, Cayley transform.

With p = (a, b, c, d), the left product with q is Hamilton's (1843):

    (p q)_0 = p0 q0 - p1 q1 - p2 q2 - p3 q3        (p q)_1 = p0 q1 + p1 q0 + p2 q3 - p3 q2
    (p q)_2 = p0 q2 - p1 q3 + p2 q0 + p3 q1        (p q)_3 = p0 q3 + p1 q2 - p2 q1 + p3 q0

It is associative and does not commute. For the scalar product of four real numbers <p q, r> = <p, r q*> =
<q, p* r>, which is all its backward needs: the same kernel with one factor conjugated.

Kernels read any strides, so that factors are broadcast without being copied. They are bound by bytes: a
product reads 8 numbers and writes 4 for 28 operations. Memory with the four components in planes, [..., 4, N]
under the shape [..., N, 4], is read in whole lines; components side by side cost four passes through the
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.dispatch import device_of, runs_on_triton

BLOCK = 512
"""Quaternions of one program."""
AXES = 4
"""Most axes with strides of their own that a kernel counts through."""
Unary = Literal["conjugate", "norm", "inverse", "cayley"]


@triton.jit
def hamilton(p0, p1, p2, p3, q0, q1, q2, q3):
    """The product p q, component by component."""
    return (
        p0 * q0 - p1 * q1 - p2 * q2 - p3 * q3,
        p0 * q1 + p1 * q0 + p2 * q3 - p3 * q2,
        p0 * q2 - p1 * q3 + p2 * q0 + p3 * q1,
        p0 * q3 + p1 * q2 - p2 * q1 + p3 * q0,
    )


@triton.jit
def load_quaternion(ptr, offset, component_stride, mask):
    """Four components as float32; zeros outside of the mask."""
    return (
        tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + offset + component_stride, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + offset + 2 * component_stride, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + offset + 3 * component_stride, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def store_quaternion(ptr, offset, component_stride, q0, q1, q2, q3, mask):
    """Four components in the dtype of the memory."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + offset, q0.to(dtype), mask=mask)
    tl.store(ptr + offset + component_stride, q1.to(dtype), mask=mask)
    tl.store(ptr + offset + 2 * component_stride, q2.to(dtype), mask=mask)
    tl.store(ptr + offset + 3 * component_stride, q3.to(dtype), mask=mask)


@triton.jit
def _offset(i, n1, n2, n3, s0, s1, s2, s3):
    """Place of number ``i`` of a tensor with four axes, the last fastest."""
    i2 = i // n3
    i1 = i2 // n2
    i0 = i1 // n1
    low = (i % n3).to(tl.int64) * s3 + (i2 % n2).to(tl.int64) * s2
    return low + (i1 % n1).to(tl.int64) * s1 + i0.to(tl.int64) * s0


@triton.jit
def _product_kernel(
    p_ptr,
    q_ptr,
    out_ptr,
    count,
    n1,
    n2,
    n3,
    p0_stride,
    p1_stride,
    p2_stride,
    p3_stride,
    p_component,
    q0_stride,
    q1_stride,
    q2_stride,
    q3_stride,
    q_component,
    out0_stride,
    out1_stride,
    out2_stride,
    out3_stride,
    out_component,
    BLOCK: tl.constexpr,
    CONJUGATE_P: tl.constexpr,
    CONJUGATE_Q: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    p_place = _offset(i, n1, n2, n3, p0_stride, p1_stride, p2_stride, p3_stride)
    q_place = _offset(i, n1, n2, n3, q0_stride, q1_stride, q2_stride, q3_stride)
    p0, p1, p2, p3 = load_quaternion(p_ptr, p_place, p_component, mask)
    q0, q1, q2, q3 = load_quaternion(q_ptr, q_place, q_component, mask)
    if CONJUGATE_P:
        p1, p2, p3 = -p1, -p2, -p3
    if CONJUGATE_Q:
        q1, q2, q3 = -q1, -q2, -q3
    r0, r1, r2, r3 = hamilton(p0, p1, p2, p3, q0, q1, q2, q3)
    place = _offset(i, n1, n2, n3, out0_stride, out1_stride, out2_stride, out3_stride)
    store_quaternion(out_ptr, place, out_component, r0, r1, r2, r3, mask)


@triton.jit
def _unary_kernel(
    x_ptr,
    g_ptr,
    out_ptr,
    count,
    n1,
    n2,
    n3,
    x0_stride,
    x1_stride,
    x2_stride,
    x3_stride,
    x_component,
    g0_stride,
    g1_stride,
    g2_stride,
    g3_stride,
    g_component,
    out0_stride,
    out1_stride,
    out2_stride,
    out3_stride,
    out_component,
    BLOCK: tl.constexpr,
    OPERATION: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """The operation on x, or, BACKWARD, the gradient of x from that of the result, ``g``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    x_place = _offset(i, n1, n2, n3, x0_stride, x1_stride, x2_stride, x3_stride)
    place = _offset(i, n1, n2, n3, out0_stride, out1_stride, out2_stride, out3_stride)
    x0, x1, x2, x3 = load_quaternion(x_ptr, x_place, x_component, mask)
    square = x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
    g_place = _offset(i, n1, n2, n3, g0_stride, g1_stride, g2_stride, g3_stride)
    if OPERATION == "norm":
        norm = tl.sqrt(square)
        if BACKWARD:
            g = tl.load(g_ptr + g_place, mask=mask, other=0.0).to(tl.float32)
            slope = tl.where(square > 0.0, g / tl.where(square > 0.0, norm, 1.0), 0.0)
            store_quaternion(
                out_ptr, place, out_component, x0 * slope, x1 * slope, x2 * slope, x3 * slope, mask
            )
        else:
            tl.store(out_ptr + place, norm.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        if BACKWARD:
            g0, g1, g2, g3 = load_quaternion(g_ptr, g_place, g_component, mask)
        if OPERATION == "conjugate":
            if BACKWARD:
                r0, r1, r2, r3 = g0, -g1, -g2, -g3
            else:
                r0, r1, r2, r3 = x0, -x1, -x2, -x3
        elif OPERATION == "inverse":
            scale = 1.0 / tl.where(mask, square, 1.0)
            r0, r1, r2, r3 = x0 * scale, -x1 * scale, -x2 * scale, -x3 * scale
            if BACKWARD:
                # d(1/x) = -(1/x) dx (1/x)
                h0, h1, h2, h3 = hamilton(-r0, r1, r2, r3, g0, g1, g2, g3)
                r0, r1, r2, r3 = hamilton(h0, h1, h2, h3, r0, -r1, -r2, -r3)
        else:
            scale = 1.0 / (1.0 - x0 + 0.25 * square)
            r0, r1, r2, r3 = (1.0 - 0.25 * square) * scale, x1 * scale, x2 * scale, x3 * scale
            if BACKWARD:
                ddenominator = -(g0 * r0 + g1 * r1 + g2 * r2 + g3 * r3) * scale
                dsquare = 0.25 * (ddenominator - g0 * scale)
                r0 = 2.0 * x0 * dsquare - ddenominator
                r1 = 2.0 * x1 * dsquare + g1 * scale
                r2 = 2.0 * x2 * dsquare + g2 * scale
                r3 = 2.0 * x3 * dsquare + g3 * scale
        store_quaternion(out_ptr, place, out_component, r0, r1, r2, r3, mask)


def _axes(shape: Sequence[int], strides: list[list[int]]) -> tuple[list[int], list[list[int]]] | None:
    """A shape and strides of several tensors in it as four axes, neighbours merged; None if they are more."""
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for axis in range(len(shape) - 1, -1, -1):
        if shape[axis] == 1:
            continue
        if sizes and all(s[axis] == m[-1] * sizes[-1] for s, m in zip(strides, merged, strict=True)):
            sizes[-1] *= shape[axis]
            continue
        sizes.append(shape[axis])
        for s, m in zip(strides, merged, strict=True):
            m.append(s[axis])
    if len(sizes) > AXES:
        return None
    # a merged axis keeps the stride of its fastest part, the first that was met
    padding = AXES - len(sizes)
    return [1] * padding + sizes[::-1], [[0] * padding + m[::-1] for m in merged]


def _launch(kernel: Any, operands: list[Tensor], scalars: Sequence[int], **constants: Any) -> None:
    """Run a kernel over quaternions of one shape; operands numbered in ``scalars`` have no components."""

    def strides(x: Tensor, scalar: bool) -> tuple[list[int], int]:
        return (list(x.stride()), 0) if scalar else (list(x.stride()[:-1]), x.stride(-1))

    shape = operands[0].shape[:-1]
    found = _axes(shape, [strides(x, i in scalars)[0] for i, x in enumerate(operands)])
    if found is None:
        dense = [x.contiguous() for x in operands[:-1]]
        target = torch.empty(operands[-1].shape, dtype=operands[-1].dtype, device=operands[-1].device)
        _launch(kernel, [*dense, target], scalars, **constants)
        operands[-1].copy_(target)
        return
    sizes, places = found
    count = shape.numel()
    arguments: list[int] = []
    for i, (x, place) in enumerate(zip(operands, places, strict=True)):
        arguments += [*place, strides(x, i in scalars)[1]]
    with device_of(operands[0]):
        kernel[(triton.cdiv(count, BLOCK),)](
            *operands, count, *sizes[1:], *arguments, BLOCK=BLOCK, **constants
        )


def _empty(p: Tensor, q: Tensor) -> Tensor:
    """A result in the memory order of the factor that is not broadcast: planes stay planes."""
    for factor in (p, q):
        if 0 not in factor.stride():
            return torch.empty_like(factor)
    return torch.empty(p.shape, dtype=p.dtype, device=p.device)


def _multiply(p: Tensor, q: Tensor, conjugate_p: bool = False, conjugate_q: bool = False) -> Tensor:
    p, q = torch.broadcast_tensors(p, q)
    out = _empty(p, q)
    _launch(_product_kernel, [p, q, out], (), CONJUGATE_P=conjugate_p, CONJUGATE_Q=conjugate_q)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(p, q)
        return _multiply(p, q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        p, q = ctx.saved_tensors
        dp = dq = None
        if ctx.needs_input_grad[0]:
            dp = _multiply(gradients[0], q, conjugate_q=True).sum_to_size(p.shape)
        if ctx.needs_input_grad[1]:
            dq = _multiply(p, gradients[0], conjugate_p=True).sum_to_size(q.shape)
        return dp, dq


class _UnaryFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Unary) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operation = operation
        scalar = operation == "norm"
        out = torch.empty(x.shape[:-1], dtype=x.dtype, device=x.device) if scalar else torch.empty_like(x)
        scalars = (1, 2) if scalar else ()
        # ``g`` is not read forward
        _launch(_unary_kernel, [x, out, out], scalars, OPERATION=operation, BACKWARD=False)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        scalars = (1,) if ctx.operation == "norm" else ()
        _launch(_unary_kernel, [x, gradients[0], dx], scalars, OPERATION=ctx.operation, BACKWARD=True)
        return dx, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quaternion_product_reference(p: Tensor, q: Tensor) -> Tensor:
    """The definition of ``quaternion_product``; float64 stays float64."""
    p0, p1, p2, p3 = _wide(p).unbind(-1)
    q0, q1, q2, q3 = _wide(q).unbind(-1)
    components = (
        p0 * q0 - p1 * q1 - p2 * q2 - p3 * q3,
        p0 * q1 + p1 * q0 + p2 * q3 - p3 * q2,
        p0 * q2 - p1 * q3 + p2 * q0 + p3 * q1,
        p0 * q3 + p1 * q2 - p2 * q1 + p3 * q0,
    )
    return torch.stack(components, -1).to(p.dtype)


def quaternion_left_matrix(p: Tensor) -> Tensor:
    """The real matrix of q -> p q, [..., 4, 4] of [..., 4]."""
    p0, p1, p2, p3 = p.unbind(-1)
    rows = ((p0, -p1, -p2, -p3), (p1, p0, -p3, p2), (p2, p3, p0, -p1), (p3, -p2, p1, p0))
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def quaternion_product(p: Tensor, q: Tensor) -> Tensor:
    """Hamilton's product p q, broadcast over the axes before the last.

    Kernels compute in float32; float64 inputs and CPU tensors use ``quaternion_product_reference``.

    Args:
        p, q: [..., 4], of one dtype: bfloat16, float16, float32 or float64.

    Returns:
        [..., 4] of that dtype, with gradients to both.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check(p)
    _check(q)
    if p.dtype != q.dtype:
        raise ValueError(f"the factors have dtypes {p.dtype} and {q.dtype}; convert them to one")
    if p.device != q.device:
        raise ValueError(f"the factors are on {p.device} and {q.device}; move them to one device")
    try:
        torch.broadcast_shapes(p.shape, q.shape)
    except RuntimeError as error:
        raise ValueError(
            f"the factors have shapes {tuple(p.shape)} and {tuple(q.shape)}; give shapes that broadcast"
        ) from error
    if not runs_on_triton(p):
        return quaternion_product_reference(p, q)
    product: Tensor = _Product.apply(p, q)
    return product


def quaternion_conjugate_reference(q: Tensor) -> Tensor:
    """The definition of ``quaternion_conjugate``."""
    real, imaginary = q.split([1, 3], -1)
    return torch.cat([real, -imaginary], -1)


def quaternion_conjugate(q: Tensor) -> Tensor:
    """q* = (q0, -q1, -q2, -q3), [..., 4]; the inverse of a unit quaternion. See ``quaternion_product``."""
    return _unary(q, "conjugate")


def quaternion_norm_reference(q: Tensor) -> Tensor:
    """The definition of ``quaternion_norm``."""
    norm: Tensor = torch.linalg.vector_norm(_wide(q), dim=-1).to(q.dtype)
    return norm


def quaternion_norm(q: Tensor) -> Tensor:
    """|q| = sqrt(q0^2 + q1^2 + q2^2 + q3^2), [...] of [..., 4]; at zero its gradient is zero."""
    return _unary(q, "norm")


def quaternion_inverse_reference(q: Tensor) -> Tensor:
    """The definition of ``quaternion_inverse``."""
    wide = _wide(q)
    return (quaternion_conjugate_reference(wide) / wide.square().sum(-1, keepdim=True)).to(q.dtype)


def quaternion_inverse(q: Tensor) -> Tensor:
    """1/q = q* / |q|^2, [..., 4]; not finite at zero."""
    return _unary(q, "inverse")


def cayley_reference(z: Tensor) -> Tensor:
    """The definition of ``cayley`` as a quotient, (1 + z/2) (1 - z/2)^-1; float64 stays float64."""
    wide = _wide(z)
    one = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=wide.dtype, device=z.device)
    half = 0.5 * wide
    return quaternion_product_reference(one + half, quaternion_inverse_reference(one - half)).to(z.dtype)


def cayley(z: Tensor) -> Tensor:
    """The Cayley transform q = (1 + z/2) (1 - z/2)^-1 of quaternions, the trapezoidal rule for h' = z h.

    In closed form q = (1 - |z|^2/4 + Im z) / (1 - Re z + |z|^2/4), one division. |q|^2 = 1 + 2 Re z / |1 -
    z/2|^2, so |q| < 1 exactly where Re z < 0, and |q| = 1 where Re z = 0: a rotation about Im z by 4
    atan(|z|/2) of vectors (q v q*), by half of that of quaternions (q h).

    Args:
        z: [..., 4], of a float dtype; not 2.

    Returns:
        q like ``z``, with its gradient. Kernels compute in float32; float64 and CPU tensors use
        ``cayley_reference``.

    Raises:
        ValueError: the last axis is not 4.
    """
    return _unary(z, "cayley")


_REFERENCES = {
    "conjugate": quaternion_conjugate_reference,
    "norm": quaternion_norm_reference,
    "inverse": quaternion_inverse_reference,
    "cayley": cayley_reference,
}


def _unary(x: Tensor, operation: Unary) -> Tensor:
    _check(x)
    if not runs_on_triton(x):
        reference: Tensor = _REFERENCES[operation](x)
        return reference
    result: Tensor = _UnaryFunction.apply(x, operation)
    return result


def _check(x: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] != 4 or 0 in x.shape:
        raise ValueError(
            f"a quaternion tensor has shape {tuple(x.shape)}; give it as [..., 4], none of them 0"
        )

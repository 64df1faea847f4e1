"""Layer-wise reconstruction: the integers of a matrix that change its outputs on calibration data least.

The rows w of a matrix are independent. With the covariance C of its inputs, integers q of unit u leave the
square error (w - u q) C (w - u q)^T in the mean; what the mean of the inputs makes of w - u q is a constant,
which the bias takes (bias correction: Nagel et al. 2019, arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

import numpy as np
import torch

from mamba_int.graph import IntArray
from quantize.scales import FloatArray
from quantize.ternary import nearest_ternary

DAMPING = 0.01
"""Share of the mean variance that is added to every variance (GPTQ, section 3.3, step 3)."""
BLOCK = 128
"""Columns after which the columns beyond are made up to date, by one product (GPTQ, section 3.3, step 2)."""
REFITS = 6
"""How often signs and scale of ternary rows are chosen in turn."""


def output_error(weight: FloatArray, rows: FloatArray, covariance: FloatArray) -> FloatArray:
    """Mean square error of every output but for its mean [outputs], of ``rows`` in place of ``weight``."""
    difference = weight - rows
    error: FloatArray = ((difference @ covariance) * difference).sum(1)
    return error


def reconstruct(weight: FloatArray, units: FloatArray, limit: int, covariance: FloatArray) -> IntArray:
    """Integers of every row whose outputs are nearest, as GPTQ finds them (arXiv 2210.17323, algorithm 1).

    Column after column is rounded, and what that changes in the outputs is made up for by the columns that
    are left: delta = -(w_i - u q_i) / [C^-1]_ii (C^-1)_i, with the inverse for what is left (equation 2). Its
    rows are those of the upper Cholesky factor of C^-1, up to their length (section 3.3, step 3). Inputs of
    large variance come first.

    Args:
        weight: [outputs, inputs].
        units: what an integer of each row stands for [outputs].
        limit: largest magnitude of the integers.
        covariance: of the inputs [inputs, inputs]; it may be singular.

    Returns:
        int64 [outputs, inputs]. A row that plain rounding serves better is the rounded one.
    """
    unit = units[:, None]
    plain = _rounded(weight, unit, limit)
    variances = np.diag(covariance)
    if not variances.any():
        return plain
    order = np.argsort(-variances, kind="stable")
    damped = covariance[np.ix_(order, order)] + DAMPING * variances.mean() * np.eye(len(order))
    factor = _inverse_factor(damped)
    left = weight[:, order].copy()
    chosen = np.empty_like(plain)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        errors = np.empty((len(left), stop - start))
        for i in range(start, stop):
            integers = _rounded(left[:, i : i + 1], unit, limit)
            chosen[:, order[i]] = integers[:, 0]
            error = (left[:, i : i + 1] - unit * integers) / factor[i, i]
            left[:, i + 1 : stop] -= error * factor[i, i + 1 : stop]
            errors[:, i - start] = error[:, 0]
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    better = output_error(weight, unit * chosen, covariance) < output_error(weight, unit * plain, covariance)
    plain[better] = chosen[better]
    return plain


def reconstruct_ternary(weight: FloatArray, covariance: FloatArray) -> tuple[IntArray, FloatArray]:
    """Signs int64 [outputs, inputs] and scales [outputs] of every row whose outputs are nearest.

    Signs by :func:`reconstruct`, and in turn the scale that fits them best, s = w C t^T / t C t^T. A row
    that :func:`quantize.ternary.nearest_ternary` serves better is as that has it; so is one that is ternary
    already.
    """
    signs, scale = nearest_ternary(torch.from_numpy(weight))
    best, units = signs.numpy().astype(np.int64), scale[:, 0].numpy()
    candidate = units
    for _ in range(REFITS):
        chosen = reconstruct(weight, np.where(candidate > 0, candidate, 1.0), 1, covariance)
        image = chosen @ covariance
        explained, norm = (image * weight).sum(1), (image * chosen).sum(1)
        candidate = np.where((norm > 0) & (explained > 0), explained / np.where(norm > 0, norm, 1.0), units)
        better = output_error(weight, candidate[:, None] * chosen, covariance) < output_error(
            weight, units[:, None] * best, covariance
        )
        best[better], units = chosen[better], np.where(better, candidate, units)
    return best, units


def _rounded(weight: FloatArray, unit: FloatArray, limit: int) -> IntArray:
    integers: IntArray = np.clip(np.floor(weight / unit + 0.5), -limit, limit).astype(np.int64)
    return integers


def _inverse_factor(matrix: FloatArray) -> FloatArray:
    """The upper triangular U with U^T U = matrix^-1."""
    # With the Cholesky factor of the matrix turned about, matrix = R R^T and R is upper triangular: U = R^-1.
    upper = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    factor: FloatArray = np.triu(np.linalg.inv(upper))
    return factor

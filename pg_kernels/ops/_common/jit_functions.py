"""Scalar functions that kernels of several ops share, in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_start(row, strides):
    """Return the rows' offsets in int64, for the strides (inner, outer_stride, inner_stride) of `rows.Rows`.

    Row numbers are int32: an int64 division is a call of a hundred instructions.
    """
    outer, inner = row // strides[0], row % strides[0]
    return tl.cast(outer, tl.int64) * strides[1] + tl.cast(inner, tl.int64) * strides[2]


@triton.jit
def sincos(angle):
    """Return sine and cosine to about 1e-7 for |angle| up to 1e5.

    The CUDA library's functions are as exact, but keep a table in local memory for larger angles. Here the angle is reduced to
    a quarter turn in three steps whose products are exact. Polynomials do the rest, as in Moshier's Cephes library.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    x = angle - quarters * 1.5703125
    x = x - quarters * 4.837512969970703125e-4
    x = x - quarters * 7.54978995489188216e-8
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = quarters.to(tl.int32) & 3
    swapped = (quadrant & 1) == 1
    sin, cos = tl.where(swapped, cosine, sine), tl.where(swapped, sine, cosine)
    sin = tl.where(quadrant >= 2, -sin, sin)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    return sin, cos


@triton.jit
def gelu(x):
    """Return GELU in its tanh form: x · (1 + tanh u) / 2 with u = √(2/π) · (x + 0.044715 x³), which is x · sigmoid(2u)."""
    return x * tl.sigmoid(x * (1.5957691216057308 + 0.07135481282635151 * x * x))


@triton.jit
def gelu_and_slope(x):
    """Return gelu(x) and its derivative."""
    sigmoid = tl.sigmoid(x * (1.5957691216057308 + 0.07135481282635151 * x * x))
    # Bound x: where the sigmoid is 0 or 1, x² may overflow, and 0 · inf is NaN.
    bounded = tl.minimum(tl.maximum(x, -16.0), 16.0)
    slope = sigmoid + bounded * sigmoid * (1.0 - sigmoid) * (
        1.5957691216057308 + 0.21406443847905453 * bounded * bounded
    )
    return x * sigmoid, slope


@triton.jit
def tanh(x):
    """Return tanh(x) from the exponential. Near 0, where that difference cancels, return it from its series."""
    squared = x * x
    series = x * (1.0 + squared * (-0.3333333333 + squared * (0.1333333333 - squared * 0.05396825397)))
    return tl.where(squared < 0.01, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)

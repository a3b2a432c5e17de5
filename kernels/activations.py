"""The activations and max of an expression for use inside Triton kernels: value beside gradient, on fp32 tiles.

The one idea: everything is written with exp(-|x|), which never overflows, and one exponential and one reciprocal serve
a value and its gradient alike, so the compiler keeps one of each. `NAME(x)` is the value, `NAME_grad(x, g)` the
gradient of x where g is that of the value; both mean what PyTorch means, at 0 and for NaN too
(`effbert.kernels.eager`). Only triton.language is used, no libdevice, so that the interpreter runs them as well.
"""

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)
# gelu(x) = x · sigmoid(2u), 2u = x · (GELU_1 + GELU_3 · x²): twice sqrt(2/π), and that times 0.044715
GELU_1 = tl.constexpr(1.5957691216057308)
GELU_3 = tl.constexpr(0.07135481282962426)
GELU_FLAT = tl.constexpr(1e4)  # x² from which gelu' is 0 or 1 in fp32, far below where x² overflows


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x >= 0, r, e * r)


@triton.jit
def sigmoid_grad(x, g):
    """g · s (1 - s), s = sigmoid(x)."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return g * (e * r * r)


@triton.jit
def swish(x):
    """x · sigmoid(x), PyTorch's silu."""
    return x * sigmoid(x)


@triton.jit
def swish_grad(x, g):
    """g · (s + x s (1 - s)), s = sigmoid(x)."""
    return g * (sigmoid(x) + sigmoid_grad(x, x))


@triton.jit
def gelu(x):
    """The tanh form: 0.5 x (1 + tanh(u)) = x · sigmoid(2u)."""
    return x * sigmoid(x * (GELU_1 + GELU_3 * x * x))


@triton.jit
def gelu_grad(x, g):
    """g times the derivative of the tanh form; beyond |x| = 100 that is exactly 0 or 1."""
    twice_u = x * (GELU_1 + GELU_3 * x * x)
    slope = GELU_1 + 3.0 * GELU_3 * tl.minimum(x * x, GELU_FLAT)
    return g * (sigmoid(twice_u) + slope * sigmoid_grad(twice_u, x))


@triton.jit
def tanh(x):
    """(1 - exp(-2|x|)) / (1 + exp(-2|x|)) with the sign of x; accurate near 0 too."""
    y = 2.0 * tl.abs(x)
    t = -_expm1_of_minus(y) * (1.0 / (1.0 + tl.exp(-y)))
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_grad(x, g):
    """g · (1 - tanh(x)²), as 4 e / (1 + e)² with e = exp(-2|x|)."""
    e = tl.exp(-(2.0 * tl.abs(x)))
    r = 1.0 / (1.0 + e)
    return g * (4.0 * e * r * r)


@triton.jit
def elu(x):
    """x above 0, exp(x) - 1 below (alpha 1)."""
    return tl.where(x > 0, x, _expm1_of_minus(tl.abs(x)))


@triton.jit
def elu_grad(x, g):
    """g above 0, g · exp(x) at 0 and below."""
    return tl.where(x > 0, g, g * tl.exp(-tl.abs(x)))


@triton.jit
def relu(x):
    """x above 0, else 0; NaN stays NaN."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def relu_grad(x, g):
    """g above 0, else 0."""
    return tl.where(x <= 0, 0.0, g)


@triton.jit
def leaky_relu(x):
    """x above 0, else 0.01 x."""
    return tl.where(x > 0, x, LEAKY_SLOPE * x)


@triton.jit
def leaky_relu_grad(x, g):
    """g above 0, else 0.01 g."""
    return tl.where(x > 0, g, LEAKY_SLOPE * g)


@triton.jit
def maximum(a, b):
    """The larger; NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum_grad(a, b, g):
    """The gradient of a, of the result's g: half of it where a equals b; all of it where either is NaN."""
    return tl.where(a == b, 0.5 * g, tl.where(a < b, 0.0, g))


@triton.jit
def _expm1_of_minus(x):
    """exp(-x) - 1 for x >= 0. Up to 0.7 by a minimax polynomial (relative error 1.1e-8), as the difference cancels."""
    p = -0.00103571 * x + 0.00807325
    p = p * -x + 0.04157696
    p = p * -x + 0.16665294
    p = p * -x + 0.49999931
    p = p * -x + 1.0
    return tl.where(x < 0.7, -x * p, tl.exp(-x) - 1.0)

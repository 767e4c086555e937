"""outer * tanh(z / cap) and its derivative, from exp2 alone: the same code on every vendor and in the interpreter.

With u = z / cap, a = exp(-2|u|) and r = 1 / (1 + a): |tanh u| = (1 - a) r and dtanh/du = 4 a r^2. One exp2 and one
reciprocal serve both, and neither formula cancels, except 1 - a for small |u|. There float32 takes u + u^3 P(u^2),
below |u| = 0.625 (P fitted to a relative error of 4e-9; 8e-8 was seen in float32 arithmetic). float64 keeps the
quotient, whose absolute error there is 1e-16.

A constant that is rounded to float32 would scale all logits alike: the errors of a response's tokens would have one
sign and add up. So float32 multiplies by a float32 number just below the constant, and adds the product with the rest
of the constant. The rest is positive, never 0, so that an infinite logit stays infinite and does not become NaN.
"""

# Arguments of kernels are typed by Triton at launch.
# mypy: allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

TWO_LOG2_E = tl.constexpr(2.8853900817779268)


@triton.constexpr_function
def _just_below(constant):
    """Return a float32 number below a positive ``constant``, by Veltkamp's split of a double at 24 bits."""
    constant = constant * (1.0 - 2.0**-23)
    scaled = constant * (2.0**29 + 1.0)
    return scaled - (scaled - constant)


@triton.constexpr_function
def _rest(constant):
    """Return what ``_just_below`` takes from ``constant``."""
    return constant - _just_below(constant)


@triton.jit
def _times(z, CONSTANT: tl.constexpr):
    """z times a positive constant; in float32 a product and a fused multiply-add."""
    product = z * CONSTANT
    if z.dtype == tl.float32:
        product = z * _just_below(CONSTANT) + z * _rest(CONSTANT)
    return product


@triton.jit
def softcap(z, CAP: tl.constexpr, OUTER: tl.constexpr):
    """(outer * tanh(z / cap), 1 - tanh(z / cap)^2); outer is cap / temperature."""
    u = _times(z, 1.0 / CAP)
    a = tl.exp2(-_times(tl.abs(u), TWO_LOG2_E))
    r = 1.0 / (1.0 + a)
    tanh = tl.where(u < 0, a - 1.0, 1.0 - a) * r
    if z.dtype == tl.float32:
        s = u * u
        p = -0.00570502 * s + 0.02063912
        p = p * s - 0.05373973
        p = p * s + 0.13331442
        p = p * s - 0.33333282
        tanh = tl.where(s < 0.390625, u + u * s * p, tanh)
    return OUTER * tanh, 4.0 * a * r * r


@dataclass(frozen=True)
class Transform:
    """Hold the constants that turn raw logits into z' = outer * tanh(scale * (raw + bias) / softcap)."""

    scale: float
    softcap: float | None
    outer: float
    has_bias: bool


@dataclass(frozen=True)
class Wanted:
    """Say whether a pass over logits stores E, and which statistics it sums up: ``tops`` are "before" and "after"."""

    store: bool
    moment: bool
    squares: bool
    logits: bool
    tops: bool

    @classmethod
    def of(cls, e: Tensor | None, parts: frozenset[str]) -> Wanted:
        """Return what is wanted of a pass that writes E to ``e`` and sums up ``parts`` of ``row_pass.PARTS``."""
        return cls(e is not None, "moment" in parts, "squares" in parts, "logits" in parts, "before" in parts)


@triton.jit
def transformed(z, p_bias, words, mask, TRANSFORM: tl.constexpr):
    """Return z' and the soft-cap's derivative D from raw logits ``z`` of ``words``. D is 1 without a soft-cap."""
    if TRANSFORM.has_bias:
        z += tl.load(p_bias + words, mask=mask, other=0.0).to(z.dtype)
    derivative = tl.cast(1.0, z.dtype)
    if TRANSFORM.scale != 1.0:
        z = z * TRANSFORM.scale
    if TRANSFORM.softcap is not None:
        z, derivative = softcap(z, TRANSFORM.softcap, TRANSFORM.outer)
    return z, derivative

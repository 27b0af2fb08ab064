"""What native/fused.h does to an entry, for a GPU. Imported only where it is asked for.

A program takes BLOCK entries of one parameter, which `tasks` names by its number and the number of
the block. All else is read from tables, so that one launch serves parameters of all shapes.

    table       int64 (parameters, 8): addresses of the weight and of three buffers, number of
                entries, entries in a row, addresses of the factors of rows and of columns. Where an
                address is 0 there is nothing: factors are one.
    gradients   int64 (parameters,): addresses; 0 for a parameter that makes no step.
    rates_of    int64 (parameters,): which rates a parameter takes.
    rates       float64 (rates, 12): `Rates`, in the order of its fields.

Divisions and roots are rounded as in C++, so that factors that are powers of two stay exact; of a
product and a sum the compiler may make one operation, as there. ALIGN: 16 if all addresses and
sizes are multiples of it, else 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from enorm_fx.step.fused.optimizers import ADAM, AMSGRAD, MOMENTUM, PLAIN

ERROR = triton.errors.TritonError
INTERPRETED = bool(triton.knobs.runtime.interpret)  # as it was when the kernels were made
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
BLOCK = 1024
FIELDS, WIDTH = 8, 5

_PLAIN, _MOMENTUM = tl.constexpr(PLAIN), tl.constexpr(MOMENTUM)
_ADAM, _AMSGRAD = tl.constexpr(ADAM), tl.constexpr(AMSGRAD)
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _ratio(x, y):
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def update_(
    tasks,
    table,
    gradients,
    rates_of,
    rates,
    W: tl.constexpr,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w, buffers and g take their factors; then the optimizer's step, where there is a gradient."""
    number = tl.load(tasks + 2 * tl.program_id(0))
    k = tl.load(tasks + 2 * tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    fields = table + number * _FIELDS
    weight = tl.multiple_of(tl.load(fields).to(tl.pointer_type(W)), ALIGN)
    size, width = tl.multiple_of(tl.load(fields + 4).to(tl.int32), ALIGN), tl.load(fields + 5)
    rows, cols = tl.load(fields + 6), tl.load(fields + 7)
    address = tl.load(gradients + number)
    gradient = tl.multiple_of(address.to(tl.pointer_type(W)), ALIGN)
    steps = address != 0
    inside = (k < size) & (steps | ((rows | cols) != 0))

    row = k // width.to(tl.int32)
    at = k - row * width.to(tl.int32)
    of_row = tl.load(rows.to(tl.pointer_type(W)) + row, mask=inside & (rows != 0), other=1.0)
    of_col = tl.load(cols.to(tl.pointer_type(W)) + at, mask=inside & (cols != 0), other=1.0)
    up = of_row * of_col
    down = _ratio(1.0, up)

    r = rates + tl.load(rates_of + number) * 12
    sign, decay = tl.load(r).to(W), tl.load(r + 1).to(W)
    shrink, rate = tl.load(r + 2).to(W), tl.load(r + 3).to(W)
    x = tl.load(weight + k, mask=inside, other=0.0) * up
    y = sign * (tl.load(gradient + k, mask=inside & steps, other=0.0) * down) + decay * x

    if KIND == _PLAIN:
        x = tl.where(steps, x - rate * y, x)
    else:
        first = tl.multiple_of(tl.load(fields + 1).to(tl.pointer_type(W)), ALIGN)
        take = tl.load(r + 5).to(W)
        m = tl.load(first + k, mask=inside, other=0.0) * down
        if KIND == _MOMENTUM:
            keep = tl.load(r + 4).to(W)
            direct, through = tl.load(r + 6).to(W), tl.load(r + 7).to(W)
            m = tl.where(steps, keep * m + take * y, m)
            x = tl.where(steps, x - rate * (direct * y + through * m), x)
        else:
            second = tl.multiple_of(tl.load(fields + 2).to(tl.pointer_type(W)), ALIGN)
            keep2, take2 = tl.load(r + 8).to(W), tl.load(r + 9).to(W)
            root, eps = tl.load(r + 10).to(W), tl.load(r + 11).to(W)
            v = tl.load(second + k, mask=inside, other=0.0) * (down * down)
            m = tl.where(steps, m + take * (y - m), m)
            v = tl.where(steps, keep2 * v + take2 * y * y, v)
            most = v
            if KIND == _AMSGRAD:
                third = tl.multiple_of(tl.load(fields + 3).to(tl.pointer_type(W)), ALIGN)
                most = tl.load(third + k, mask=inside, other=0.0) * (down * down)
                most = tl.where(steps & (v > most), v, most)
                tl.store(third + k, most, mask=inside)
            step = _ratio(rate * m, _root(most) * root + eps)
            x = tl.where(steps, x * shrink - step, x)
            tl.store(second + k, v, mask=inside)
        tl.store(first + k, m, mask=inside)
    tl.store(weight + k, x, mask=inside)


@triton.jit
def largest_(
    tasks,
    table,
    gradients,
    out,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[task] <- the largest |g| of a task, float64; inf where one is NaN."""
    number = tl.load(tasks + 2 * tl.program_id(0))
    k = tl.load(tasks + 2 * tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    size = tl.multiple_of(tl.load(table + number * _FIELDS + 4).to(tl.int32), ALIGN)
    address = tl.load(gradients + number)
    gradient = tl.multiple_of(address.to(tl.pointer_type(W)), ALIGN)
    found = tl.abs(tl.load(gradient + k, mask=(k < size) & (address != 0), other=0.0))
    found = tl.where(found < float("inf"), found, float("inf"))
    tl.store(out + tl.program_id(0), tl.max(found, axis=0).to(tl.float64))

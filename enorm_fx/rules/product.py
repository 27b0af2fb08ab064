"""Products of tensors of any kind: matmul, einsum and what is made of them."""

from __future__ import annotations

from typing import Any

import torch

from enorm_fx.rules.join import equalized
from enorm_fx.rules.linear import contract, moving
from enorm_fx.rules.registry import Context, rule
from enorm_fx.symmetry.labels import Label, LabelTerm, add

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule("matmul", "mm", "bmm", "mv", "dot", weights=("other",))
def matmul(ctx: Context, input: Label, other: Label) -> Label:
    """y[..., m, n] = sum_k x[..., m, k] w[..., k, n].

    Symmetry: what varies along k cancels; y takes the rest of both. A parameter w that is met
    first here takes r[n] - x[k].
    """
    if ctx.is_new(other) and len(other.shape) == 2:
        inner = [LabelTerm(-t.coefficient, t.ids.reshape(-1, 1)) for t in moving(input, -1)]
        fresh = LabelTerm(1, ctx.system.fresh(1, other.shape[1]))
        other = ctx.define(other, [fresh, *inner])
    elif ctx.is_new(other):
        other = ctx.known(other)
    x, y = input, other
    vector_x, vector_y = len(x.shape) == 1, len(y.shape) == 1
    if vector_x:
        x = x.map((1, *x.shape), lambda ids: ids.unsqueeze(0))
    if vector_y:
        y = y.map((*y.shape, 1), lambda ids: ids.unsqueeze(1))
    left = x.map((*x.shape, 1), lambda ids: ids.unsqueeze(-1))
    right = y.map((*y.shape[:-2], 1, *y.shape[-2:]), lambda ids: ids.unsqueeze(-3))
    product = add(tuple(torch.broadcast_shapes(left.shape, right.shape)), left, right)
    result = contract(ctx, product, len(product.shape) - 2)
    if vector_y:
        result = result.map(result.shape[:-1], lambda ids: ids.squeeze(-1))
    if vector_x:
        axis = len(result.shape) - (1 if vector_y else 2)
        shape = (*result.shape[:axis], *result.shape[axis + 1 :])
        result = result.map(shape, lambda ids: ids.squeeze(axis))
    return result


@rule("addmm", "addmv", "baddbmm", "addbmm")
def add_matmul(
    ctx: Context, input: Label, mat1: Label, mat2: Label, *, beta: Any = 1, alpha: Any = 1,
    batch1: Any = None, batch2: Any = None,
) -> Any:  # fmt: skip
    """input + mat1 @ mat2: both summands scale alike."""
    if ctx.node is not None and ctx.node.op == "addbmm":
        return NotImplemented  # sums over the batch as well
    return equalized(ctx, [input, matmul(ctx, mat1, mat2)])


@rule("grouped_mm", weights=("mat2",))
def grouped_matmul(
    ctx: Context, input: Label, mat2: Label, offs: Any = None, bias: Any = None,
    out_dtype: Any = None,
) -> Any:  # fmt: skip
    """y[t, n] = sum_k x[t, k] w[e(t), k, n]: each row meets one of several matrices.

    Shapes:   x (S, K), w (E, K, N), offs (E,): where the rows of each matrix end, y (S, N).
    Symmetry: which rows meet which matrix is not known, so all matrices scale alike; what varies
              along k cancels; y takes the rest of both. A parameter w takes r[n] - x[k].
    """
    if (len(input.shape), len(mat2.shape)) != (2, 3) or bias is not None:
        return NotImplemented  # sums over parts of an axis, or batches
    if ctx.is_new(mat2):
        inner = [LabelTerm(-t.coefficient, t.ids.reshape(1, -1, 1)) for t in moving(input, -1)]
        fresh = LabelTerm(1, ctx.system.fresh(1, 1, mat2.shape[2]))
        mat2 = ctx.define(mat2, [fresh, *inner])
    ctx.because("which rows meet which of its matrices is not known")
    alike = ctx.system.uniform(mat2, [0])
    return matmul(ctx, input, alike.map(mat2.shape[1:], lambda ids: ids[0]))


@rule("einsum")
def einsum(ctx: Context, equation: Any, *operands: Any) -> Any:
    """Products of entries, summed over every letter that the result does not have.

    Symmetry: labels add up; what varies along a summed letter must cancel.
    """
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation:
        return NotImplemented
    left, result = _without_ellipsis(equation.replace(" ", ""), operands).split("->")
    names = left.split(",")
    if any(len(set(name)) != len(name) for name in names):
        return NotImplemented  # a diagonal
    letters = result + "".join(sorted(set(left) - set(result) - {","}))
    sizes: dict[str, int] = {}
    for name, operand in zip(names, operands, strict=True):
        for letter, size in zip(name, operand.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    shape = tuple(sizes[letter] for letter in letters)
    spread = [_spread(x, name, letters) for x, name in zip(operands, names, strict=True)]
    label = ctx.system.uniform(add(shape, *spread), range(len(result), len(letters)))
    return label.map(ctx.shape, lambda ids: ids.reshape(ids.shape[: len(result)]))


def _without_ellipsis(equation: str, operands: tuple[Label, ...]) -> str:
    """Letters of their own for the axes that "..." stands for, aligned on the right."""
    names = equation.split("->")[0].split(",")
    spare = [letter for letter in _LETTERS if letter not in equation]
    most = 0
    for name, operand in zip(names, operands, strict=True):
        if "..." in name:
            most = max(most, len(operand.shape) - len(name) + 3)
    extra = spare[:most]
    for i, (name, operand) in enumerate(zip(names, operands, strict=True)):
        count = len(operand.shape) - len(name) + 3
        names[i] = name.replace("...", "".join(extra[most - count :]))
    return ",".join(names) + "->" + equation.split("->")[1].replace("...", "".join(extra))


def _spread(label: Label, name: str, letters: str) -> Label:
    """An operand with an axis for every letter, of size 1 for those that it does not have."""
    order = [name.index(letter) for letter in letters if letter in name]
    places = [letters.index(letter) for letter in letters if letter in name]

    def move(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.permute(order)
        shape = [1] * len(letters)
        for place, size in zip(places, ids.shape, strict=True):
            shape[place] = size
        return ids.reshape(shape)

    shape = [1] * len(letters)
    for place, axis in zip(places, order, strict=True):
        shape[place] = label.shape[axis]
    return label.map(shape, move)

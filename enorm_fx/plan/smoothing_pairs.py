"""The plan's groups as pairs of modules, in the terms of SmoothQuant and AWQ implementations.

Those take one module whose output channels are divided (a normalization layer, or a linear one) and
the linear layers that read them, and know neither channels nor parameters: entry j of the one
goes with column j of the others. So a group is told as a pair only if that is all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from enorm_fx.errors import ArgumentError
from enorm_fx.plan.activations import Reader, check_keeps_function, readers_of
from enorm_fx.plan.data import PlanData
from enorm_fx.plan.records import Group, ScaledParameter
from enorm_fx.symmetry.solution import ScaleTerm
from enorm_fx.tracing.op_traits import GIVES_ITS_ENTRIES

METHODS = ("smoothquant", "awq")


class SmoothingPair(NamedTuple):
    """A module whose output may be divided by a scale per channel, and those that multiply by it.

    smooth_layer:   path of the module.
    balance_layers: paths of all linear layers that read its channels, in execution order.
    """

    smooth_layer: str
    balance_layers: list[str]


def smoothing_pairs(plan: PlanData, method: str = "awq") -> tuple[SmoothingPair, ...]:
    """The groups that can be told as pairs of modules, in execution order; see `Plan`."""
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {METHODS}, not {method!r}")
    check_keeps_function(plan)
    readers: list[list[Reader]] = [[] for _ in plan.groups]
    for reader in readers_of(plan):
        readers[reader.group].append(reader)
    pairs = []
    for group, reading, moved in zip(plan.groups, readers, _moved(plan), strict=True):
        names = {reader.parameter.name for reader in reading}
        producers = [scaled for scaled in moved if scaled.name not in names]
        balance = _balance_layers(group, reading)
        smooth = _smooth_layer(plan.model, group, producers, whole=method == "smoothquant")
        unchanged = method == "awq" or GIVES_ITS_ENTRIES.issuperset(group.via)
        if balance and smooth and unchanged:
            pairs.append(SmoothingPair(smooth, balance))
    return tuple(pairs)


def _moved(plan: PlanData) -> list[list[ScaledParameter]]:
    """For each group every parameter that it scales."""
    sizes = torch.tensor([group.channels for group in plan.groups], dtype=torch.int64)
    owner = torch.cat([torch.repeat_interleave(sizes), torch.tensor([-1])])  # the last: no scale
    moved: list[list[ScaledParameter]] = [[] for _ in plan.groups]
    for scaled in plan.parameters:
        numbers = {g for term in scaled.terms for g in owner[term.index].unique().tolist()}
        for number in sorted(numbers - {-1}):
            moved[number].append(scaled)
    return moved


def _balance_layers(group: Group, reading: Sequence[Reader]) -> list[str]:
    """The modules whose weights' column j takes the group's scale j back; empty unless all do."""
    layers = []
    for reader in reading:
        path, _, name = reader.parameter.name.rpartition(".")
        terms = _of_group(reader.parameter, group)
        if not (
            name == "weight"
            and [t.coefficient for t in terms] == [-1]
            and terms[0].index.shape == (1, group.channels)
            and _counts_up(terms[0].index, group)
        ):
            return []
        layers.append(path)
    return layers


def _smooth_layer(
    model: nn.Module, group: Group, producers: Sequence[ScaledParameter], whole: bool
) -> str:
    """The one module whose output j takes the group's scale j; empty if there is no such.

    whole: the group has all of its outputs; otherwise it may have the last ones alone, if there is
           no bias (AWQ's way with a packed projection).
    """
    paths = {scaled.name.rpartition(".")[0] for scaled in producers}
    if len(paths) != 1:
        return ""
    [path] = paths
    own = {scaled.name.rpartition(".")[2]: scaled for scaled in producers}
    has_bias = getattr(model.get_submodule(path), "bias", None) is not None
    if own.keys() != ({"weight", "bias"} if has_bias else {"weight"}):
        return ""
    for scaled in producers:
        terms = _of_group(scaled, group)
        rows = terms[0].index.flatten()
        if not (
            len(scaled.shape) <= 2
            and [t.coefficient for t in terms] == [1]
            and len(terms[0].index) == len(rows)
            and _counts_up(rows[-group.channels :], group)
            and not bool(_within(rows[: -group.channels], group).any())
            and (len(rows) == group.channels or not (whole or has_bias))
        ):
            return ""
    return path


def _of_group(scaled: ScaledParameter, group: Group) -> list[ScaleTerm]:
    return [term for term in scaled.terms if bool(_within(term.index, group).any())]


def _within(index: Tensor, group: Group) -> Tensor:
    return (index >= group.start) & (index < group.start + group.channels)


def _counts_up(index: Tensor, group: Group) -> bool:
    """Whether the indices are the group's scales in order."""
    return torch.equal(index.reshape(-1), torch.arange(group.channels) + group.start)

"""What a plan is made of: scaled parameters, groups, pairs, blocked sides."""

from __future__ import annotations

from dataclasses import dataclass

from enorm_fx.rules import Origin
from enorm_fx.symmetry.solution import ScaleTerm


@dataclass(frozen=True, slots=True, eq=False)
class ScaledParameter:
    """A parameter and its row block of A: log scale of an entry = sum of its terms.

    name:    its first name in `model.named_parameters()`; further names are in `aliases`.
    counted: it is part of the objective J (weights of two or more axes, and what multiplies
             channels, as the gamma of normalization layers does; with biases="balance" all).
    depth:   number of weights on the longest path that ends in it (the first one has 1).
    last:    no other weight comes after it.
    terms:   empty for a parameter that nothing may rescale.
    """

    name: str
    shape: tuple[int, ...]
    terms: tuple[ScaleTerm, ...]
    counted: bool
    depth: int
    last: bool
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Scales that move the same weights in the same way, one per channel.

    channels:  how many scales; they are u[start : start + channels].
    producers: names of the parameters that the scale multiplies, consumers: divides.
    via:       op names on the paths between them, in execution order.
    """

    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    via: tuple[str, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A producer, a consumer that reads what it produces, and the ops that lie between."""

    producer: str
    consumer: str
    channels: int
    via: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Blocked:
    """A side ("output" or "input") of a weight that stays pinned, and why.

    reason: what pinned it.
    node:   module path and op of the call that did, or the name of a frozen parameter.
    source: "file.py:line" of the user's code that called it.
    chain:  the equalities that led from there to the weight, nearest to the reason first.
    call:   the call's node in `plan.graph`; -1 where no call pinned it.
    """

    weight: str
    side: str
    reason: str
    node: str
    source: str
    chain: tuple[Origin, ...] = ()
    call: int = -1

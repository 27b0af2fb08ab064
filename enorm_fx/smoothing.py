"""`smooth`: scale activations into the weights that read them, so that both quantize well."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from enorm_fx.analysis import analyze
from enorm_fx.calibration.choice import SmoothableGroup, choose
from enorm_fx.calibration.closed_form import closed_form
from enorm_fx.calibration.observe import QuantizationErrors, Statistics
from enorm_fx.calibration.run import run_batches
from enorm_fx.calibration.search import RATIOS, best_ratios, make_candidates
from enorm_fx.errors import ArgumentError, NonFiniteError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.activations import Reader, check_keeps_function
from enorm_fx.plan.records import Group
from enorm_fx.step.checks import check_count, check_finite, find_parameter

METHODS = ("smoothquant", "awq")
_MOST_BITS = 16


@dataclass(frozen=True, slots=True)
class SmoothedGroup:
    """A group of the plan whose activations were scaled.

    largest_scale: the largest of s and 1 / s, the activations of a channel being divided by s.
    dead:          channels that were left alone: nothing but zeros was read, or read by zeros.
    ratio:         the exponent that the search chose ("awq"); None otherwise.
    error:         squared error of the consumers' outputs with quantized weights over that without
                   smoothing ("awq"); groups with a consumer in common have one. None otherwise.
    """

    group: Group
    largest_scale: float
    dead: int
    ratio: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What `smooth` did.

    batches:  how many it calibrated with.
    groups:   what was smoothed, in execution order.
    left_out: the plan's other groups, each with the reason.
    gap:      the largest distance of a log scale from its closed form; more than 1e-12 only where
              1000 rounds did not settle scales that depend on each other. 0 for "awq".
    """

    method: str
    batches: int
    groups: tuple[SmoothedGroup, ...]
    left_out: tuple[tuple[Group, str], ...]
    gap: float

    @property
    def channels(self) -> int:
        """How many channels were scaled, dead ones left out."""
        return sum(done.group.channels - done.dead for done in self.groups)

    @property
    def largest_scale(self) -> float:
        """The largest of all the groups'; 1.0 if there is none."""
        return max((done.largest_scale for done in self.groups), default=1.0)


def smooth(
    model_or_plan: nn.Module | Plan,
    batches: Iterable[Any],
    *,
    alpha: float = 0.5,
    method: str = "smoothquant",
    bits: int = 4,
    group_size: int | None = 128,
) -> Smoothing:
    """Divide activations by scales and multiply the weights that read them, in place.

    The function stays. Activations with a few large channels, which quantize badly, become even at
    the cost of the weights. No list of layers is needed: every group of the plan is smoothed in
    which a weight reads activations (norm and q, k, v; v and o; up and down; fc1 and fc2; conv and
    conv). Groups that only balance weights against each other, as queries against keys, are left
    alone. Everything is written at the end, or nothing.

    "smoothquant": s = max |X|^alpha / max |W|^(1 - alpha) for every channel, X what its consumers
    read, W what they read it with. It holds for all groups at once: where one group's scales move
    the weights of another, they are solved together. So all rescalings of a network are smoothed
    to the same weights, but for channels that no batch has made active and groups that are left
    alone: their scales stay, and W depends on them. `balance` before settles these.

    "awq": s = mean |X|^r, normalized so that the largest is the inverse of the smallest in each
    group; of 21 values of r from 0 to 1 the one is taken with the smallest squared error of the
    consumers' outputs when their weights are quantized. r = 0, no smoothing, is among them.

    Args:
        model_or_plan: a model, analyzed with batchnorm="affine" and frozen="rescale", or an exact
            plan of one.
        batches: calibration data; each as example inputs of `analyze`. "awq" runs through it
            twice, so it must not be an iterator. The model runs in evaluation mode.
        alpha: 0 < alpha <= 1, how much of the spread of activations goes into the weights.
        method: "smoothquant" or "awq".
        bits, group_size: the quantization that "awq" is to prepare for: 1 to 16 bits, asymmetric,
            for each run of group_size consecutive inputs of an output (None: all of them).

    Raises:
        ArgumentError: an argument has no such value, the plan is not exact, the model does not
            accept a batch.
        NonFiniteError: activations or weights are not finite; the error names the first.
        PlanError: the model is no longer the one that was analyzed.

    Source: Xiao et al., SmoothQuant (arXiv:2211.10438); Lin et al., AWQ (arXiv:2306.00978).
    """
    _check(batches, alpha, method, bits, group_size)
    plan, batches = _plan_and_batches(model_or_plan, batches)
    check_finite(plan)
    chosen, left_out = choose(plan)
    statistics = Statistics(plan, _readers(chosen), math.inf if method == "smoothquant" else 1)
    count = run_batches(plan.model, batches, statistics, "reading activations")
    _check_activations(statistics)
    sizes = statistics.result()
    for group in [g for g in chosen if bool(g.of(sizes).isnan().all())]:
        chosen.remove(group)
        left_out[group.number] = "no call that reads its activations was seen"
    if method == "smoothquant":
        limit = _largest_log(plan)
        u, alive, gap = closed_form(plan, chosen, sizes, float(alpha), limit)
        groups = [_report(group, u, alive) for group in chosen]
    else:
        u, groups = _searched(plan, chosen, sizes, batches, bits, group_size)
        gap = 0.0
    plan.rescale_(u)
    rest = tuple((plan.groups[number], why) for number, why in sorted(left_out.items()))
    return Smoothing(method, count, tuple(groups), rest, gap)


def _searched(
    plan: Plan,
    chosen: Sequence[SmoothableGroup],
    means: Tensor,
    batches: Iterable[Any],
    bits: int,
    group_size: int | None,
) -> tuple[Tensor, list[SmoothedGroup]]:
    """AWQ's log scales, and what is to be reported of each group."""
    candidates = make_candidates(plan.num_scales, chosen, means, _largest_log(plan))
    search = QuantizationErrors(
        plan, _readers(chosen), candidates.logs, candidates.weights, bits, group_size
    )
    run_batches(plan.model, batches, search, "searching scales")
    errors = search.result()
    u = torch.zeros(plan.num_scales, dtype=torch.float64)
    groups = []
    best = best_ratios(candidates, errors)
    for group, part, number in zip(chosen, candidates.groups, best, strict=True):
        group.of(u).copy_(group.of(candidates.logs[number]))
        without, error = float(errors[part, 0]), float(errors[part, number])
        relative = error / without if without else 1.0
        groups.append(_report(group, u, means > 0, RATIOS[number], relative))
    return u, groups


def _report(
    group: SmoothableGroup,
    u: Tensor,
    alive: Tensor,
    ratio: float | None = None,
    error: float | None = None,
) -> SmoothedGroup:
    largest = math.exp(float(group.power * group.of(u).abs().max()))
    return SmoothedGroup(group.group, largest, int((~group.of(alive)).sum()), ratio, error)


def _check(batches: object, alpha: object, method: object, bits: int, group_size: object) -> None:
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {METHODS}, not {method!r}")
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and 0 < alpha <= 1):
        raise ArgumentError(f"alpha must be above 0 and at most 1, not {alpha!r}")
    check_count("bits", bits, least=1)
    if bits > _MOST_BITS:
        raise ArgumentError(f"bits must be at most {_MOST_BITS}, not {bits}")
    if group_size is not None:
        check_count("group_size", group_size, least=1)
    if isinstance(batches, Tensor | dict | str) or not isinstance(batches, Iterable):
        raise ArgumentError(
            "batches must be an iterable of inputs, such as a list or a DataLoader, not "
            f"{type(batches).__name__}"
        )
    if method == "awq" and iter(batches) is batches:
        raise ArgumentError(
            "method='awq' runs through the batches twice: give a list or a DataLoader, not "
            "an iterator"
        )


def _plan_and_batches(
    model_or_plan: nn.Module | Plan, batches: Iterable[Any]
) -> tuple[Plan, Iterable[Any]]:
    """The plan, of the first batch where a model is given; an iterator is not robbed of it."""
    if isinstance(model_or_plan, Plan):
        check_keeps_function(model_or_plan)
        return model_or_plan, batches
    iterator = iter(batches)
    first = list(itertools.islice(iterator, 1))
    if not first:
        raise ArgumentError("batches is empty: nothing to calibrate with")
    if iterator is batches:
        batches = itertools.chain(first, iterator)
    return analyze(model_or_plan, first[0], batchnorm="affine", frozen="rescale"), batches


def _readers(chosen: Iterable[SmoothableGroup]) -> list[Reader]:
    return [reader for smoothed in chosen for reader in smoothed.readers]


def _check_activations(statistics: Statistics) -> None:
    for name, finite in statistics.finite.items():
        if not bool(finite):
            raise NonFiniteError(
                f"'{name}' read activations that are not finite; nothing was written"
            )


def _largest_log(plan: Plan) -> float:
    """The largest |log s| for which s and 1 / s are ordinary numbers of every dtype."""
    kinds = {find_parameter(plan.model, s.name).dtype for s in plan.parameters if s.terms}
    limits = [(torch.finfo(k).max, 1 / torch.finfo(k).tiny) for k in kinds]
    return math.log(min((x for pair in limits for x in pair), default=math.inf)) - math.log(2)

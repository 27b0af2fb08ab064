"""`analyze`: trace a model, run the rules, solve, and say what was found."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from enorm_fx.errors import ArgumentError
from enorm_fx.model_plan import Plan
from enorm_fx.plan.build import describe
from enorm_fx.rules import Rule, propagate
from enorm_fx.symmetry.solution import solve
from enorm_fx.tracing import trace
from enorm_fx.tracing.op_keys import module_key
from enorm_fx.tracing.trace import Trace

_CHOICES = {
    "batchnorm": ("skip", "affine"),
    "biases": ("rescale", "skip", "balance"),
    "frozen": ("pin", "rescale"),
    "tracer": ("auto", "symbolic", "export"),
}


def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    batchnorm: str = "skip",
    biases: str = "rescale",
    frozen: str = "pin",
    rules: Mapping[type[nn.Module], Rule] | None = None,
    tracer: str = "auto",
) -> Plan:
    """Find every rescaling of the model's weights that keeps its function.

    The model is traced in the mode (training or evaluation) that it is in, and in the other one too
    if its code asks for the mode, so that the plan holds in both. It is left as it was; no
    activation is computed, so it may live on the meta device.

    Args:
        model: any module that can be traced.
        example_inputs: None (shapes are inferred from the first layers), a tensor, a tuple of
            positional inputs or a dict of keyword inputs. Only shapes and types matter.
        batchnorm: "skip" looks through BatchNorm, whose own parameters and statistics stay (the
            function is then not kept across it: `plan.exact` is False); "affine" pins its input
            and rescales gamma and beta, which is exact.
        biases: "rescale" (they follow their layer and do not count in the norm), "skip" (they
            stay, as in the original program: not exact), "balance" (they count too).
        frozen: "pin" keeps parameters with requires_grad=False as they are; "rescale" does not
            treat them differently.
        rules: {MyModule: rule} for modules of your own that torch's calls do not describe (a
            custom kernel). Modules of exactly that class are not looked into; the rule gets
            the context, the labels of the inputs and, by name, of the module's parameters, and
            returns the label of the output: see `enorm_fx.rules`.
        tracer: "symbolic" (record the torch calls of one run on fake tensors), "export"
            (torch.export), or "auto": the first of them that can trace the model.

    Raises:
        ArgumentError: an argument has no such value.
        TraceError: the model cannot be traced with these inputs.

    Source: Stock et al., Equi-normalization of Neural Networks, ICLR 2019 (arXiv:1902.10416).
    """
    choices = {"batchnorm": batchnorm, "biases": biases, "frozen": frozen, "tracer": tracer}
    return analyze_traced(model, example_inputs, rules, **choices)[0]


def analyze_traced(
    model: nn.Module,
    example_inputs: Any,
    rules: Mapping[type[nn.Module], Rule] | None = None,
    *,
    batchnorm: str,
    frozen: str,
    biases: str = "rescale",
    tracer: str = "auto",
) -> tuple[Plan, Trace]:
    """What `analyze` gives, and the calls that it is about."""
    _check(model, batchnorm=batchnorm, biases=biases, frozen=frozen, tracer=tracer)
    custom = {module_key(kind): rule for kind, rule in (rules or {}).items()}
    opaque = tuple(rules or ())
    pinned = frozenset(
        name for name, p in model.named_parameters() if frozen == "pin" and not p.requires_grad
    )
    with _no_collection():
        traced = trace(model, example_inputs, tracer, opaque)
        with _on_the_cpu():
            labels = propagate(
                traced, batchnorm=batchnorm, biases=biases, frozen=pinned, custom=custom
            )
            solution = solve(labels.system)
            found = describe(model, traced, labels, solution, batchnorm=batchnorm, biases=biases)
    return Plan.of(found), traced


def _on_the_cpu() -> AbstractContextManager[Any]:
    """Labels and equations are numbers of ours, wherever the user wants new tensors to lie."""
    elsewhere = torch.get_default_device().type != "cpu"
    return torch.device("cpu") if elsewhere else nullcontext()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Nearly all that an analysis makes stays alive until its end: to look for garbage meanwhile,
    again and again through all of it, takes a quarter of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _check(model: nn.Module, **choices: str) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            allowed = ", ".join(repr(v) for v in _CHOICES[name])
            raise ArgumentError(f"{name} must be one of {allowed}, not {value!r}")


def as_plan(
    plan_or_model: Plan | nn.Module, example_inputs: Any = None, batchnorm: str | None = None
) -> Plan:
    """A plan as it is, or the plan of a model."""
    if isinstance(plan_or_model, Plan):
        if example_inputs is not None:
            raise ArgumentError("example_inputs go with a model; a plan was given")
        return plan_or_model
    if not isinstance(plan_or_model, nn.Module):
        raise ArgumentError(f"expected a Plan or an nn.Module, not {type(plan_or_model).__name__}")
    if batchnorm is None:
        return analyze(plan_or_model, example_inputs)
    return analyze(plan_or_model, example_inputs, batchnorm=batchnorm)

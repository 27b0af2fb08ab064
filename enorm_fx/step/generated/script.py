"""A program written call by call over tensors that exist: an fx graph, and text for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

_WIDTH = 100  # of the text
_ASSIGNMENT = re.compile(r"    (\w+) = (.*?)(?:;  .*)?$")


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a call returned, as an argument of later calls."""

    call: int


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """target: a function, or the name of a method of the first argument."""

    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    section: str


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """module(*arguments) runs the program. sections: the comment over each call, by node name."""

    module: GraphModule
    arguments: tuple[Tensor, ...]
    sections: dict[str, str]


class Script:
    """Straight-line code. Whatever tensor a call names becomes an argument of the program.

    Workspaces and their views are made while the script is written, so that none is when it runs.
    Two views of the same memory with the same shape are one argument.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._names: dict[tuple[object, ...], tuple[str, Tensor]] = {}
        self._constants: dict[tuple[object, ...], Tensor] = {}
        self._section = ""

    def section(self, title: str) -> None:
        """The calls that follow belong under this comment."""
        self._section = title

    def named(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor, which the code calls so; its first name stays."""
        self._names.setdefault(_identity(tensor), (name, tensor))
        return tensor

    def name_of(self, tensor: Tensor) -> str:
        return self._names[_identity(tensor)][0]

    def call(
        self, target: Callable[..., Any] | str, *args: Any, name: str | None = None, **kwargs: Any
    ) -> Result:
        """Append a call of a function, or of a method by its name. Tensors must be named."""
        self._calls.append(_Call(target, args, kwargs, name, self._section))
        return Result(len(self._calls) - 1)

    def number(self, name: str, value: float, like: Tensor) -> Tensor:
        """A constant, 0-dim: a Python number costs most operators some microseconds."""
        key = value, like.dtype, like.device
        return self._constant(key, name, lambda: like.new_full((), value))

    def ones(self, size: int, like: Tensor) -> Tensor:
        """A vector of ones."""
        key = "ones", size, like.dtype, like.device
        return self._constant(key, f"ones_{size}", lambda: like.new_ones(size))

    def scratch(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for results that are used up at once: the same for the same name and shape."""
        key = name, tuple(shape), like.dtype, like.device
        label = "_".join([name, *map(str, shape)])
        return self._constant(key, label, lambda: like.new_empty(tuple(shape)))

    def _constant(self, key: tuple[object, ...], name: str, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._constants:
            self._constants[key] = self.named(make(), name)
        return self._constants[key]

    def build(self, output: Result) -> Built:
        """output: what the program returns."""
        graph, used = Graph(), self._used()
        names = _unlike(_identifier(self._names[key][0]) for key in used)
        inputs = {key: graph.placeholder(name) for key, name in zip(used, names, strict=True)}
        done: list[Node] = []

        def node(value: Any) -> Any:
            if isinstance(value, Tensor):
                return inputs[_identity(value)]
            if isinstance(value, Result):
                return done[value.call]
            if isinstance(value, list | tuple):
                return type(value)(node(item) for item in value)
            return value

        sections = {}
        for call in self._calls:
            kind = "call_method" if isinstance(call.target, str) else "call_function"
            kwargs = {key: node(value) for key, value in call.kwargs.items()}
            done.append(graph.create_node(kind, call.target, node(call.args), kwargs, call.name))
            sections[done[-1].name] = call.section
        graph.output(node(output))
        return Built(GraphModule(torch.nn.Module(), graph, "Step"), tuple(used.values()), sections)

    def _used(self) -> dict[tuple[object, ...], Tensor]:
        """Tensors in the order of their first use, each once."""
        used: dict[tuple[object, ...], Tensor] = {}

        def visit(value: Any) -> None:
            if isinstance(value, Tensor):
                used.setdefault(_identity(value), value)
            elif isinstance(value, list | tuple):
                for item in value:
                    visit(item)

        for call in self._calls:
            visit(call.args)
            visit(list(call.kwargs.values()))
        return used


def text(built: Built) -> str:
    """The module's code under its comments, without what fx adds to free memory early."""
    unused = {node.name for node in built.module.graph.nodes if not node.users}
    lines: list[str] = []
    current = ""
    for line in filter(str.strip, built.module.code.splitlines()):
        found = _ASSIGNMENT.match(line)
        if found is None:
            lines += _wrapped(line)
            continue
        name, value = found[1], found[2].replace(" = ", "=")
        if built.sections[name] != current:
            current = built.sections[name]
            lines += ["", f"    # {current}"]
        lines += _wrapped(f"    {value}" if name in unused else f"    {name} = {value}")
    return "\n".join(lines) + "\n"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        line, _WIDTH, subsequent_indent="        ", break_long_words=False, break_on_hyphens=False
    )


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return (
        tensor.data_ptr(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )


def _unlike(names: Iterable[str]) -> list[str]:
    """The names with numbers behind those that have been there before."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        while name in seen:
            seen[name] += 1
            name = f"{name}_{seen[name]}"
        seen[name] = 0
        out.append(name)
    return out


def _identifier(name: str) -> str:
    """`layer1.0.weight` -> `layer1_0_weight`; a digit may not come first."""
    name = re.sub(r"\W", "_", name)
    return f"w{name}" if name[0].isdigit() else name

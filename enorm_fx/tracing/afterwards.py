"""What may still run after a call that cannot be traced: read from the source of what is running.

Where the shape of a result depends on values (detection models pick their boxes), tracing ends. All
tensors that are alive there may be used in any way. Of the parameters, only those that the rest of
the running functions can reach may be read again. Both keep their values; everything before stays
exact. Where the source does not tell, the answer is "cannot be traced".
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType, FunctionType, TracebackType
from typing import Any

from torch import nn

from enorm_fx.tracing.trace import is_internal

_CALL_MACHINERY = ("_wrapped_call_impl", "_call_impl", "inner")  # of nn.Module.__call__


class UnreadableError(Exception):
    """The source does not tell what runs next."""


def running(traceback: TracebackType | None) -> list[FrameType]:
    """The frames of a traceback, the outermost first."""
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def reachable(frames: list[FrameType]) -> set[int]:
    """Identities of the parameters that the rest of the running functions may read.

    Raises UnreadableError where that cannot be told.
    """
    found: set[int] = set()
    for frame in frames:
        name = frame.f_code.co_filename
        if is_internal(name) and not _is_layer(frame):
            continue
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (owner._forward_hooks or owner._forward_pre_hooks):
            raise UnreadableError(f"{type(owner).__name__} has forward hooks, which run later")
        names = {**frame.f_globals, **frame.f_locals}
        reader = _Reader(names, found, set())
        for part in _rest(frame):
            reader.visit(part)
    return found


def _is_layer(frame: FrameType) -> bool:
    """A frame of one of torch's own layers (nn.Sequential), not of the call machinery."""
    owner = frame.f_locals.get("self")
    return isinstance(owner, nn.Module) and frame.f_code.co_name not in _CALL_MACHINERY


def _rest(frame: FrameType) -> Iterator[ast.AST]:
    """The parts of a function's body that may run after the call in progress."""
    body, first = _parse(frame.f_code)
    line = frame.f_lineno - first + 1
    for statement in body:
        yield from _after(statement, line, _call_in_progress(frame, first))


def _after(statement: ast.stmt, line: int, call: tuple[int, int] | None) -> Iterator[ast.AST]:
    end = statement.end_lineno or statement.lineno
    if end < line:
        return
    if statement.lineno > line or isinstance(statement, (ast.For, ast.While, ast.AsyncFor)):
        yield statement  # not begun, or a loop, which may come round again
    elif isinstance(statement, (ast.If, ast.With, ast.Try)):
        for child in ast.iter_child_nodes(statement):
            if isinstance(child, ast.stmt):
                yield from _after(child, line, call)
            elif isinstance(child, ast.ExceptHandler):
                yield child
            elif (getattr(child, "end_lineno", line) or line) >= line:
                yield from _expressions(child, call)
    else:
        yield from _expressions(statement, call)


def _expressions(part: ast.AST, call: tuple[int, int] | None) -> Iterator[ast.AST]:
    """A statement in progress, without the function that is being called right now."""
    for node in ast.walk(part):
        if isinstance(node, ast.Call) and call == (node.lineno, node.col_offset):
            node.func = ast.Constant(None)
            break
    yield part


def _call_in_progress(frame: FrameType, first: int) -> tuple[int, int] | None:
    """(line, column) where the running call begins in the parsed source; None if not known."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:  # Python 3.10: the whole statement is read again
        return None
    line, _, column, _ = list(positions())[frame.f_lasti // 2]
    if line is None or column is None:
        return None
    source = inspect.getsourcelines(frame.f_code)[0]
    indent = len(source[0]) - len(source[0].lstrip())
    return line - first + 1, column - indent


def _parse(code: CodeType | FunctionType) -> tuple[list[ast.stmt], int]:
    """The statements of a function, and the number of its first line."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError) as error:
        raise UnreadableError(f"the source of {code!r} is not to be had") from error
    definition = tree.body[0]
    if not isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise UnreadableError(f"{code!r} is no plain function")
    return definition.body, max(first, 1)


class _Reader(ast.NodeVisitor):
    """Collect the parameters that expressions can reach from names that are bound to modules."""

    def __init__(
        self,
        names: dict[str, Any],
        found: set[int],
        seen: set[tuple[int, str]],
    ) -> None:
        self._names = names
        self._found = found
        self._seen = seen

    def visit_Name(self, node: ast.Name) -> None:
        self._take(self._names.get("self" if node.id == "super" else node.id))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = self._resolve(node.value)
        if value is None:
            self.visit(node.value)
            return
        self._member(value, node.attr)

    def _resolve(self, node: ast.expr) -> nn.Module | None:
        """The module that a chain of attributes names; None for anything else."""
        if isinstance(node, ast.Name):
            value = self._names.get(node.id)
            return value if isinstance(value, nn.Module) else None
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            return None if owner is None else owner._modules.get(node.attr)
        return None

    def _member(self, module: nn.Module, name: str) -> None:
        """An attribute of a module: a child, a parameter, a method to read as well, or a value."""
        if name in module._modules or name in module._parameters or name in module.__dict__:
            self._take(getattr(module, name))
            return
        if (id(module), name) in self._seen:
            return
        self._seen.add((id(module), name))
        member = inspect.getattr_static(type(module), name, None)
        member = member.fget if isinstance(member, property) else member
        member = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if not isinstance(member, FunctionType):
            return  # a plain value of the class, or a buffer
        if name in nn.Module.__dict__ and name not in _HARMLESS:
            self._take(module)
            return
        body, _ = _parse(member)
        names = {**member.__globals__, "self": module}
        reader = _Reader(names, self._found, self._seen)
        for statement in body:
            reader.visit(statement)

    def _take(self, value: Any, depth: int = 0) -> None:
        """A value that is used as a whole: every parameter in it may be read."""
        if isinstance(value, nn.Module):
            self._found.update(id(p) for p in value.parameters())
        elif isinstance(value, nn.Parameter):
            self._found.add(id(value))
        elif isinstance(value, (list, tuple, set)) and depth < 4:
            for item in value:
                self._take(item, depth + 1)
        elif isinstance(value, dict) and depth < 4 and value is not self._names:
            for item in value.values():
                self._take(item, depth + 1)
        elif depth < 4 and type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
            self._take(getattr(value, "__dict__", None) if _is_plain(value) else None, depth + 1)


_HARMLESS = ("extra_repr", "_get_name")


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (type, FunctionType)) and not inspect.ismodule(value)

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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    MethodType,
    ModuleType,
    TracebackType,
)
from typing import Any

from torch import Tensor, nn

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
    seen: set[tuple[int, int]] = set()
    for frame in frames:
        name = frame.f_code.co_filename
        if _is_ours(name) and not _is_layer(frame):
            continue
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and (owner._forward_hooks or owner._forward_pre_hooks):
            raise UnreadableError(f"{type(owner).__name__} has forward hooks, which run later")
        names = {**frame.f_globals, **frame.f_locals}
        reader = _Reader(names, owner, found, seen)
        for part in _rest(frame):
            reader.visit(part)
    return found


def _is_ours(file: str) -> bool:
    """Torch's or this library's; what was typed in or generated ("<stdin>") is the user's."""
    return is_internal(file) and not file.startswith("<")


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
    """Collect the parameters that expressions can reach from the names that are bound in them.

    names: what the names stand for; owner: the module whose method is read, if it is one.
    """

    def __init__(
        self,
        names: Mapping[str, Any],
        owner: Any,
        found: set[int],
        seen: set[tuple[int, int]],
    ) -> None:
        self._names = names
        self._owner = owner
        self._found = found
        self._seen = seen

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == "super":
            self._take(self._owner)
        elif node.id in self._names:
            self._take(self._names[node.id])
        elif node.id in _DYNAMIC:
            raise UnreadableError(f"'{node.id}' may name anything")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = self._resolve(node.value)
        if isinstance(value, nn.Module):
            self._member(value, node.attr)
        elif isinstance(value, ModuleType):
            self._take(getattr(value, node.attr, None))
        else:
            self.visit(node.value)

    def _resolve(self, node: ast.expr) -> Any:
        """The module (of torch or of Python) that a chain of attributes names; else None."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            if isinstance(owner, nn.Module):
                return owner._modules.get(node.attr)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None

    def _member(self, module: nn.Module, name: str) -> None:
        """An attribute of a module: a child, a parameter, a method to read as well, or a value."""
        for place in (module._modules, module._parameters, module.__dict__):
            if name in place:
                self._take(place[name])
                return
        member = inspect.getattr_static(type(module), name, None)
        if isinstance(member, property):
            member = member.fget
        elif isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if isinstance(member, FunctionType):
            if name in nn.Module.__dict__ and name not in _HARMLESS:
                self._take(module)
            else:
                self._function(member, module)
        elif name not in module._buffers:  # a descriptor, or made by __getattr__
            self._take(module)
            self._take(member)

    def _function(self, function: FunctionType, first: Any = None) -> None:
        """What a function can reach: its globals, what it closes over, and its first argument."""
        code = function.__code__
        if _is_ours(code.co_filename):  # a method of one of torch's layers
            self._take(first)
            return
        if (id(code), id(first)) in self._seen:
            return
        self._seen.add((id(code), id(first)))
        cells = function.__closure__ or ()
        names = {**function.__globals__, **_contents(code.co_freevars, cells)}
        if first is not None and code.co_argcount:
            names[code.co_varnames[0]] = first
        reader = _Reader(names, first, self._found, self._seen)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._take(default)
        try:
            body, _ = _parse(function)
        except UnreadableError:  # a lambda, or source that is not there: all that it may name
            for name in _all_names(code):
                if name in names:
                    reader._take(names[name])
            reader._take(first)
            return
        for statement in body:
            reader.visit(statement)

    def _take(self, value: Any, depth: int = 0) -> None:
        """A value that is used as a whole: every parameter in it may be read."""
        if isinstance(value, nn.Parameter):
            self._found.add(id(value))
        elif isinstance(value, _HARMLESS_TYPES):
            return
        elif isinstance(value, nn.Module):
            self._whole(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._function(value.__func__, value.__self__)  # type: ignore[arg-type]
            self._take(None if isinstance(value.__self__, nn.Module) else value.__self__)
        elif isinstance(value, partial):
            self._take([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, BuiltinFunctionType):
            self._take(None if inspect.ismodule(value.__self__) else value.__self__)
        elif depth > _DEEPEST or (id(value), 0) in self._seen:
            return
        elif isinstance(value, Iterator):
            raise UnreadableError(f"a {type(value).__name__} may give anything")
        elif isinstance(value, (list, tuple, set, frozenset, Mapping)):
            for item in value.values() if isinstance(value, Mapping) else value:
                self._take(item, depth + 1)
        elif type(value).__module__.partition(".")[0] not in ("builtins", "torch"):
            self._seen.add((id(value), 0))
            for item in _attributes(value):
                self._take(item, depth + 1)

    def _whole(self, module: nn.Module) -> None:
        """All parameters of a module, and what the code of its parts reaches besides."""
        self._found.update(id(p) for p in module.parameters())
        for part in module.modules():
            if part._forward_hooks or part._forward_pre_hooks:
                raise UnreadableError(f"{type(part).__name__} has forward hooks")
            if (id(part), 0) not in self._seen:
                self._seen.add((id(part), 0))
                for name, value in part.__dict__.items():
                    if name not in _OF_EVERY_MODULE:
                        self._take(value, 1)
                self._take(type(part).forward if "forward" not in part.__dict__ else None)


_HARMLESS = ("extra_repr", "_get_name")
_HARMLESS_TYPES = (type(None), bool, int, float, complex, str, bytes, Tensor, type, ModuleType)
_DYNAMIC = ("globals", "locals", "vars", "eval", "exec", "__import__")
_DEEPEST = 4  # levels of containers and objects that are looked into
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _contents(names: tuple[str, ...], cells: tuple[CellType, ...]) -> dict[str, Any]:
    """The variables that a function closes over, where they have a value."""
    result = {}
    for name, cell in zip(names, cells, strict=True):
        with suppress(ValueError):  # empty
            result[name] = cell.cell_contents
    return result


def _all_names(code: CodeType) -> set[str]:
    """Every name in a function and in the functions that it defines."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return {*code.co_names, *code.co_freevars}.union(*map(_all_names, inner))


def _attributes(value: Any) -> Iterator[Any]:
    """The values that an object holds, in its dictionary or in slots."""
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            yield getattr(value, name, None)

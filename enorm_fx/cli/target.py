"""The model that a command is about: TARGET, --arg and --input, from their text to a model.

A target is a name in a module, or `hf:FOLDER` (`enorm_fx/cli/hf_folder.py`). Loading a model runs
code that is not ours. Whatever that code raises becomes one TargetError.
torch is imported when a model is loaded, not before.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import importlib.util
import logging
import math
import operator
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from enorm_fx.cli import hf_folder
from enorm_fx.cli.weights import map_into_
from enorm_fx.errors import ArgumentError, EnormError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PACKAGE = str(Path(__file__).parents[1])


class TargetError(EnormError):
    """What the command line names as its target cannot be loaded, built or run."""


@dataclass(frozen=True, slots=True)
class Target:
    """A name in a module, which is given as an importable name or as a file."""

    module: str
    name: str

    @property
    def file(self) -> Path | None:
        """The file, None for the name of a module."""
        path = Path(self.module)
        separated = "/" in self.module or os.sep in self.module
        return path if separated or path.suffix == ".py" or path.is_file() else None


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare TARGET, --arg, --input and --traceback: what `opened` reads."""
    add = parser.add_argument
    add("target", metavar="TARGET", help="package.module:name or path/to/file.py:name; the name "
        "is a class, a function that returns a module, or a module. Or hf:FOLDER, a model of "
        "transformers with its config.json and weights")  # fmt: skip
    add("--arg", action="append", default=[], metavar="NAME=VALUE", dest="arguments",
        help="an argument for the class or function, a Python literal or else text; "
        "repeatable")  # fmt: skip
    add("--input", action="append", default=[], metavar="SHAPE[:DTYPE]", dest="inputs",
        help="an example input, such as 1,3,224,224 or 2,16:int64; repeatable (default: a shape "
        "that the first layers admit; tokens or images for hf:FOLDER)")  # fmt: skip
    add("--traceback", action="store_true", help="show the traceback of an error too")


@contextlib.contextmanager
def opened(
    arguments: argparse.Namespace, doing: str, *, train: bool = False, empty: bool = False
) -> Iterator[tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]]:
    """The target's model in evaluation or training mode, and the inputs that --input describes (by
    name those that a model of transformers reads; empty: there are none).

    Until the block ends, modules beside the target can be imported, torch logs nothing, and
    whatever the model's code raises is a TargetError.

    Args:
        arguments: of a parser that went through `add_target_arguments`.
        doing: what the block does, for its errors: "analyzing the model".
        train: training mode; every module gets its own mode back in the end.
        empty: the model is made without memory for its parameters. Else one of transformers has
            the weights of its folder.

    Raises:
        ArgumentError: --arg or --input is written wrongly.
        TargetError: the model cannot be loaded or built, or its code fails in the block.
    """
    with _made(arguments, empty) as (model, inputs):
        if arguments.inputs:
            inputs = tuple(_example(text, model) for text in arguments.inputs)
        with _muted_logs(), in_mode(model, train), foreign_code(doing):
            yield model, inputs


@contextlib.contextmanager
def _made(
    arguments: argparse.Namespace, empty: bool
) -> Iterator[tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]]:
    """The target's model, and inputs where the target describes them."""
    folder, keywords = hf_folder.folder_of(arguments.target), _keywords(arguments.arguments)
    if folder is not None:
        if keywords:
            raise ArgumentError("--arg is for functions and classes: hf:FOLDER takes none")
        with _muted_logs(), foreign_code(f"making the model of {folder}"):
            made = hf_folder.make(folder)
            given = () if arguments.inputs else hf_folder.example(made)
        if not empty:
            from enorm_fx.checkpoints.checkpoint import open_checkpoint

            map_into_(made, open_checkpoint(folder))
        yield made, given
        return
    target = parse(arguments.target)
    with importable(target):
        with _without_memory() if empty else contextlib.nullcontext():
            made = load(target, keywords)
        yield made, ()


def add_checkpoint_arguments(parser: argparse.ArgumentParser, wanted: str) -> None:
    """Declare --checkpoint and --output; `weights_of` reads the former.

    wanted: what the output's weights are, such as "smoothed".
    """
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="IN",
        help="the weights: a file, an index of shards or a folder; never written to (default: the "
        "folder of hf:FOLDER)")  # fmt: skip
    add("--output", type=Path, required=True, metavar="OUT",
        help=f"where the {wanted} weights go, complete or not at all, in the form of IN; a file "
        "that is there is replaced, a folder must be new or empty")  # fmt: skip


def weights_of(arguments: argparse.Namespace) -> Path:
    """Where the weights are: --checkpoint, or the target's folder."""
    path: Path | None = arguments.checkpoint or hf_folder.folder_of(arguments.target)
    if path is None:
        raise ArgumentError("--checkpoint is needed: where are the weights?")
    return path


def _without_memory() -> contextlib.AbstractContextManager[None]:
    from enorm_fx.checkpoints.skeleton import parameters_on_meta

    return parameters_on_meta()


def parse(text: str) -> Target:
    """Read MODULE:NAME. Raises TargetError where the text is not of that form."""
    module, _, name = text.rpartition(":")
    # The colon of C:\net.py separates no name.
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(
            f"target '{text}' must be package.module:name or path/to/file.py:name, "
            "such as torchvision.models:resnet18"
        )
    return Target(module, name)


@contextlib.contextmanager
def importable(target: Target) -> Iterator[None]:
    """Modules beside the target's file, or in the working directory, can be imported meanwhile.

    As when Python runs a script, the folder of a file comes first. sys.path is put back.
    """
    before = list(sys.path)
    if target.file is not None:
        sys.path.insert(0, str(target.file.resolve().parent))
    else:
        sys.path.append(str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def load(target: Target, keywords: dict[str, Any]) -> nn.Module:
    """Import the target's module and build the model, from the same random weights every time.

    Raises TargetError where the module or the name does not exist, the code fails, or no
    torch.nn.Module comes out.
    """
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = found(target)
        if isinstance(made, nn.Module):
            if keywords:
                raise TargetError(f"{target.name} is a module already: it takes no --arg")
            return made
        if not callable(made):
            raise TargetError(
                f"{target.name} in {target.module} is of type {type(made).__name__}: it must be a "
                "torch.nn.Module, its class or a function that returns one"
            )
        with foreign_code(f"calling {target.name}"):
            model = made(**keywords)
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{target.name} returned an object of type {type(model).__name__}, "
            "not a torch.nn.Module"
        )
    return model


def found(target: Target) -> Any:
    """Import the target's module and look the name up.

    Raises TargetError where the module or the name does not exist, or the code fails.
    """
    with foreign_code(f"importing {target.module}"):
        module = _import(target)
    with foreign_code(f"looking up {target.name}"):
        return _look_up(module, target)


@contextlib.contextmanager
def in_mode(model: nn.Module, train: bool) -> Iterator[None]:
    """The model in training or evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(train)
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def foreign_code(doing: str) -> Iterator[None]:
    """Turn what the user's code raises in this block into a TargetError that says where."""
    try:
        yield
    except (EnormError, BrokenPipeError):
        raise
    # Any class at all: the code is not ours and may raise its own, or call sys.exit().
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise TargetError(f"{doing} failed: {what}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """The last line of the user's own code that ran; a SyntaxError's message has it already."""
    if isinstance(error, SyntaxError):
        return ""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen")
    ]
    own = [f for f in frames if "site-packages" not in f.filename and _PACKAGE not in f.filename]
    return "".join(f" (at {frame.filename}:{frame.lineno})" for frame in (own or frames)[-1:])


def _import(target: Target) -> ModuleType:
    """The target's module, from its file or by its name."""
    if target.file is None:
        try:
            return importlib.import_module(target.module)
        except ModuleNotFoundError as error:
            if not f"{target.module}.".startswith(f"{error.name}."):
                raise  # the module is there; what it imports is not
            raise TargetError(
                f"there is no module {error.name}: install it, or run this in the folder that it "
                "lies in"
            ) from error
    if not target.file.is_file():
        raise TargetError(f"there is no file {target.module}")
    # A name of its own, so that a file called json.py replaces no module.
    name = f"enorm_fx_target_{target.file.stem}"
    spec = importlib.util.spec_from_file_location(name, target.file.resolve())
    if spec is None or spec.loader is None:
        raise TargetError(f"{target.module} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_up(module: ModuleType, target: Target) -> Any:
    """The object that the target names, which may be an attribute of a class."""
    try:
        return operator.attrgetter(target.name)(module)
    except AttributeError as error:
        named = _close_to(target.name, dir(module))
        raise TargetError(f"{target.module} has no {target.name} ({error}){named}") from error


def _close_to(name: str, known: Sequence[str]) -> str:
    """What may have been meant, for the end of a message."""
    found = difflib.get_close_matches(name, [other for other in known if other[0] != "_"])
    return f"; close to it: {', '.join(found)}" if found else ""


def _keywords(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of --arg NAME=VALUE: Python literals, anything else as text."""
    result: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ArgumentError(f"--arg must be NAME=VALUE, not '{argument}'")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            result[name] = value
    return result


def _example(text: str, model: nn.Module) -> Tensor:
    """The tensor of --input SHAPE[:DTYPE]; the type is by default that of the model's weights."""
    import torch

    sizes, colon, name = text.partition(":")
    weights = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = getattr(torch, name, None) if colon else next(weights, torch.get_default_dtype())
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"--input {text}: '{name}' is no torch dtype, such as int64")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [0]
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        raise ArgumentError(f"--input must be a shape such as 1,3,224,224, not '{text}'")
    try:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.zeros(1, dtype=dtype).expand(shape)  # no memory, only a shape
        # 0 and 1 in turn: valid as classes or tokens wherever there are two of them.
        return (torch.arange(shape[-1]) % 2).to(dtype).expand(shape)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"--input {text}: {error}") from error


@contextlib.contextmanager
def _muted_logs() -> Iterator[None]:
    """torch logs a traceback for every call that does not fit; the error says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)

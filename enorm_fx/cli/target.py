"""From `package.module:name` or `path/to/file.py:name` to a model, for the command line.

Loading a model runs code that is not ours. Whatever that code raises becomes one TargetError.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import operator
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from enorm_fx.errors import EnormError


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


def parse(text: str) -> Target:
    """Raises TargetError where the text is not MODULE:NAME."""
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        with foreign_code(f"importing {target.module}"):
            module = _import(target)
        with foreign_code(f"looking up {target.name}"):
            made = _look_up(module, target)
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
    package = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen")
    ]
    own = [f for f in frames if "site-packages" not in f.filename and package not in f.filename]
    return "".join(f" (at {frame.filename}:{frame.lineno})" for frame in (own or frames)[-1:])


def _import(target: Target) -> ModuleType:
    if target.file is None:
        return importlib.import_module(target.module)
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
    try:
        return operator.attrgetter(target.name)(module)
    except AttributeError as error:
        raise TargetError(f"{target.module} has no {target.name} ({error})") from error

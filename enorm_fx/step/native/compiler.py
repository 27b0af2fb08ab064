"""step.cpp compiled for this machine, once, and loaded.

No part of torch is linked: the functions take addresses. The OpenMP runtime is the one that torch
has loaded already, so both share one pool of threads.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from enorm_fx.step.native import tables

SOURCE = Path(__file__).with_name("step.cpp")
# Without errno and traps, square roots and divisions become vector instructions; results stay
# the same. (-ffast-math would not do: NaN must be seen.)
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")


class CompilerError(RuntimeError):
    """There is no compiler, or it failed. Never reaches the user: another backend is taken."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled if this machine has not done so before. Raises CompilerError."""
    compiler = find_compiler()
    if compiler is None:
        raise CompilerError("no C++ compiler was found (g++, clang++, c++, or $CXX)")
    reasons = []
    for flags, link in _attempts():
        try:
            library = ctypes.CDLL(str(_build(compiler, (*_FLAGS, *flags), link)))
        except (CompilerError, OSError) as error:
            reasons.append(str(error))
        else:
            library.enorm_run.argtypes = [ctypes.POINTER(tables.Recipe), ctypes.c_int]
            library.enorm_run.restype = ctypes.c_int
            library.enorm_fused.argtypes = [
                ctypes.POINTER(tables.Recipe), ctypes.POINTER(tables.Fused), ctypes.c_int
            ]  # fmt: skip
            library.enorm_fused.restype = ctypes.c_int
            library.enorm_largest.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int]
            library.enorm_largest.restype = ctypes.c_double
            library.enorm_count.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
            library.enorm_count.restype = None
            library.enorm_has_half.argtypes = []
            library.enorm_has_half.restype = ctypes.c_int
            return library
    raise CompilerError("\n".join(reasons))


def _attempts() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Flags for the compiler and for linking, the fastest first."""
    tuned = ("-march=native",)
    found: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((*tuned, "-fopenmp"), ())]
    if sys.platform != "darwin":  # there a second OpenMP runtime may end the process
        found.append(((*tuned, "-fopenmp"), ("-fopenmp",)))
    return [*found, (tuned, ()), ((), ())]


def find_compiler() -> tuple[str, ...] | None:
    """$CXX, which may be several words ("ccache g++"), or the first usual name on the path."""
    wanted = os.environ.get("CXX")
    for words in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]:
        found = shutil.which(words[0]) if words else None
        if found:
            return (found, *words[1:])
    return None


def _build(compiler: tuple[str, ...], flags: tuple[str, ...], link: tuple[str, ...]) -> Path:
    """The compiled library, in the cache under a name that says what it was made from."""
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    flags = (*flags, *(f"-D{name}={value}" for name, value in tables.CONSTANTS.items()))
    checked = f'#include "{SOURCE.as_posix()}"\n{tables.layout_checks()}'
    what = [*texts, checked, *compiler, *flags, "link", *link, _processor()]
    name = f"step-{hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:16]}.so"
    folder = cache_folder()
    if (folder / name).exists() and not _is_private(folder / name):
        folder = _temporary_folder()  # somebody else may have written it
    if (folder / name).is_file():
        return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as work:
        library, source = Path(work, name), Path(work, "step.cpp")
        source.write_text(checked, encoding="utf-8")
        for command in (
            [*compiler, *flags, "-c", str(source), "-o", f"{library}.o"],
            [*compiler, "-shared", *link, f"{library}.o", "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompilerError(f"{compiler[0]} failed:\n{done.stderr.strip()[:2000]}")
        library.chmod(0o700)
        library.replace(folder / name)  # at once: others may be building the same
    return folder / name


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/enorm_fx or ~/.cache/enorm_fx, where nobody else may write into it; else a
    temporary folder of this process.

    What lies there is loaded as code, so it is as much to be trusted as who may put it there.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "enorm_fx"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = folder.resolve(strict=True)
        if (
            os.access(folder, os.W_OK)
            and _is_private(folder)
            and all(map(_is_safe, folder.parents))
        ):
            return folder
    except (OSError, RuntimeError):  # no home, or none that may be written
        pass
    return _temporary_folder()


def _is_private(path: Path) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write it."""
    if not hasattr(os, "getuid"):  # Windows keeps others out of a user's folders by itself
        return True
    found = path.lstat()
    kind = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return kind and found.st_uid == os.getuid() and not found.st_mode & _WRITABLE_BY_OTHERS


def _is_safe(parent: Path) -> bool:
    """Whether nobody but this user and root can put another folder in the place of one in it."""
    if not hasattr(os, "getuid"):
        return True
    found = parent.stat()
    kept = not found.st_mode & _WRITABLE_BY_OTHERS or bool(found.st_mode & stat.S_ISVTX)
    return kept and found.st_uid in (0, os.getuid())


_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@functools.cache
def _temporary_folder() -> Path:
    """For this process alone; removed when it ends."""
    folder = tempfile.mkdtemp(prefix="enorm_fx-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> str:
    """What -march=native depends on: a home may be shared between machines."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return "\n".join(sorted(told))
    return f"{platform.machine()} {platform.processor()}"

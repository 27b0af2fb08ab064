"""step.cpp compiled for this machine, once, and loaded.

No part of torch is linked: the functions take addresses. The OpenMP runtime is the one that torch
has loaded already, so both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

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
    # First tuned for this processor, with OpenMP from torch; then with its own; then without.
    for flags, link in (
        (("-march=native", "-fopenmp"), ()),
        (("-march=native", "-fopenmp"), ("-fopenmp",)),
        ((), ()),
    ):
        try:
            return ctypes.CDLL(str(_build(compiler, (*_FLAGS, *flags), link)), mode=os.RTLD_NOW)
        except (CompilerError, OSError) as error:
            reasons.append(str(error))
    raise CompilerError("\n".join(reasons))


def find_compiler() -> str | None:
    """$CXX, or the first usual name on the path."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return found
    return None


def _build(compiler: str, flags: tuple[str, ...], link: tuple[str, ...]) -> Path:
    """The compiled library, in the cache under a name that says what it was made from."""
    sources = [SOURCE, *sorted(SOURCE.parent.glob("*.h"))]
    texts = [source.read_text(encoding="utf-8") for source in sources]
    what = [*texts, compiler, *flags, "link", *link, _processor()]
    name = f"step-{hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    if (folder / name).is_file():
        return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as work:
        library = Path(work, name)
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", f"{library}.o"],
            [compiler, "-shared", *link, f"{library}.o", "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompilerError(f"{compiler} failed:\n{done.stderr.strip()[:2000]}")
        library.replace(folder / name)  # at once: others may be building the same
    return folder / name


def _cache_folder() -> Path:
    """$XDG_CACHE_HOME/enorm_fx or ~/.cache/enorm_fx; a private temporary folder if need be."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "enorm_fx"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or none that may be written
        pass
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="enorm_fx-"))


def _processor() -> str:
    """What -march=native depends on: a home may be shared between machines."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return "\n".join(sorted(told))
    return f"{platform.machine()} {platform.processor()}"

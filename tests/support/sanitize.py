"""Run the native backend's tests under a sanitizer: `python -m tests.support.sanitize address`.

"address" finds reads and writes outside of memory, "thread" finds races. step.cpp is compiled with
the sanitizer into a cache of its own, and the tests that compare backends run with its runtime
loaded first. Needs g++, whose sanitizer runtimes come with it; "thread" needs LLVM's OpenMP as well
(Debian: libomp-dev), because gcc's does not tell the sanitizer of its barriers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = tuple(
    f"tests/step/test_{name}.py" for name in ("backends", "fused", "guard", "generate", "golden")
)
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python and torch keep memory until the process ends; only step.cpp is of interest.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:verify_asan_link_order=0",
    # Python and torch are not instrumented: what they do to memory is no race of step.cpp.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def command(kind: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("g++ is needed, whose sanitizers these are")
    # With the C++ runtime beside it, whose exceptions (torch throws some) it wants to see.
    loaded = [_found(compiler, name) for name in (RUNTIME[kind], "libstdc++.so.6")]
    openmp = {}
    if kind == "thread":
        archers = sorted(Path("/usr/lib").glob("llvm-*/lib/libarcher.so"))
        if not archers:
            raise SystemExit("LLVM's OpenMP is needed (Debian: libomp-dev)")
        archer = archers[-1]
        loaded.append(str(archer.with_name("libomp.so.5")))
        openmp["OMP_TOOL_LIBRARIES"] = str(archer)
    environment = {
        **openmp,
        **os.environ,
        **OPTIONS,
        "CXX": f"{compiler} -fsanitize={kind} -g -O1",
        "XDG_CACHE_HOME": str(folder),
        "LD_PRELOAD": " ".join(loaded),
        "OMP_NUM_THREADS": "2",
    }
    flags = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-W", "ignore"]
    return [sys.executable, "-m", "pytest", *flags, *TESTS], environment


def _found(compiler: str, library: str) -> str:
    """Where the compiler has a library of its own."""
    ask = [compiler, f"-print-file-name={library}"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def main(argv: list[str]) -> int:
    """Run the tests; the status is theirs."""
    if len(argv) != 1 or argv[0] not in RUNTIME:
        print(f"usage: python -m tests.support.sanitize {'|'.join(RUNTIME)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        run, environment = command(argv[0], Path(folder))
        return subprocess.run(run, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

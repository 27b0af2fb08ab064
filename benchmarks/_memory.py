"""The memory that this process takes (Linux)."""

from __future__ import annotations

import re
from pathlib import Path


def peak() -> int:
    """The most that has been resident so far, in bytes.

    From /proc, since the figure of getrusage begins at that of the process which started this one.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("/proc/self/status does not tell the peak of memory")
    return int(found[1]) * 1024

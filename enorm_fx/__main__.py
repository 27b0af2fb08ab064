"""`python -m enorm_fx`: the same as the command `enorm-fx`."""

from __future__ import annotations

import sys

from enorm_fx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

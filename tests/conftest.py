"""One thread and one seed for every test."""

from __future__ import annotations

import os
import sys

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Kernels for a GPU are then interpreted. Triton asks when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    # Tests compare folders in which they import modules: nothing of Python's may come into them.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

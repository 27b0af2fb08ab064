"""Every case of every op."""

from __future__ import annotations

from tests.support import (
    op_cases_elementwise,
    op_cases_join,
    op_cases_linear,
    op_cases_normalization,
    op_cases_pooling,
    op_cases_shape,
    op_cases_writes,
)

CASES = [
    case
    for module in (
        op_cases_elementwise, op_cases_join, op_cases_linear, op_cases_normalization,
        op_cases_pooling, op_cases_shape, op_cases_writes,
    )
    for case in module.CASES
]  # fmt: skip

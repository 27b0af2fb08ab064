import importlib, os
import pytest, torch
from laws import *
CASES=[c for m in os.environ["MODS"].split(",") for c in importlib.import_module("op_cases_"+m).CASES]
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_law(case):
    r = record(case.run, case.inputs)
    assert law_deviation(r) < 1e-9
    if not case.slack:
        assert found_scales(r) == admitted_scales(r)
    elif case.scales is not None:
        assert found_scales(r) == case.scales

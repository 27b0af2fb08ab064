"""How a plan runs: measure the weights, solve for the scales, apply them.

order.py layout.py forms.py              what is known before the weights
measure.py solve.py coarse.py            the mathematics, with care: float64, log space
factors.py program.py apply.py           all of it together, all or nothing
job.py bound.py backends.py compiled.py  the same, compiled for the memory as it is now:
generated/                               as torch operations (an fx.GraphModule)
native/                                  as tables for a program in C++
checks.py precision.py                   what is refused; what no setting reaches
"""

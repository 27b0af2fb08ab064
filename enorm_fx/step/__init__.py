"""How a plan runs: measure the weights, solve for the scales, apply them.

What is known before the weights are: optimizer_state.py (which buffer takes which power), order.py
(whose turn it is), layout.py (the one description of a step), matrix_view.py (weights as matrices).

The mathematics, with care, in float64 and log space: measure.py, descent.py, coarse.py,
converge.py, factors.py; careful.py and apply.py put it together, all or nothing.

The same compiled, for the memory as it is now: recipe.py says what there is to run, backends.py by
what (generated/ as torch operations, native/ as tables for a program in C++), runner.py runs it,
guard.py notices what has changed meanwhile.

What is refused: checks.py, memory.py. What no setting reaches: precision.py.
"""

"""What each op does to labels. One file per family; importing this package registers all.

A rule for a module of your own, for `analyze(model, rules={MyModule: rule})`, is a function

    def rule(ctx, *inputs, **parameters) -> Label

of the labels of the module's inputs and, by name, of its parameters. It returns the label of the
output, usually by calling the rules here with the meaning that the module has:

    def fused_linear_relu(ctx, x, weight, bias):
        return rules.elementwise.homogeneous(ctx, rules.linear.linear(ctx, x, weight, bias))

`ctx.pin(label, reason)` keeps a tensor as it is, `ctx.system.equal(a, b)` makes two scale alike,
`ctx.pinned(ctx.shape, reason)` is the label of an output that keeps its values. Return
NotImplemented to have all that the call touches pinned. Parameters that a rule gives no label
keep their values.
"""

from enorm_fx.rules import (
    attention,
    elementwise,
    join,
    linear,
    normalization,
    pooling,
    product,
    reduction,
    shape,
    writes,
)
from enorm_fx.rules.propagate import Labels, propagate
from enorm_fx.rules.registry import Context, Origin, Rule, find, rule, table

__all__ = [
    "Context", "Labels", "Origin", "Rule", "attention", "elementwise", "find", "join", "linear",
    "normalization", "pooling", "product", "propagate", "reduction", "rule", "shape", "table",
    "writes",
]  # fmt: skip

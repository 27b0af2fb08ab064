"""Which power of the weight's factor each optimizer buffer takes: the public face of the table."""

from enorm_fx.step.optimizer_state import EXPONENTS, exponents, register_optimizer_state

__all__ = ["EXPONENTS", "exponents", "register_optimizer_state"]

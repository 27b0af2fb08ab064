"""Rescaling inside the optimizer's step: factors wait until the optimizer touches the weights."""

"""How a plan runs: measure the weights, solve for the scales, apply them. See `program`."""

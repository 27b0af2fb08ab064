"""Run a model on calibration data and look at what its weights read."""

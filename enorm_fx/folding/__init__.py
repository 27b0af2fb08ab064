"""Changes of a model before it is equalized: BatchNorm folded, ReLU6 replaced."""

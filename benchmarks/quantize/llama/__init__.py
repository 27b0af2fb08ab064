"""How well a small Llama of real text quantizes, as trained, with outliers, and smoothed."""

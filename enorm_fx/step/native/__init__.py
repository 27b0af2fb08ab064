"""A step in C++: compiled once for a machine, fed with tables for each model."""

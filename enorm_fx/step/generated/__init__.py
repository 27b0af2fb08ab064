"""A step as straight-line torch operations over fixed memory: `generate.py` says how."""

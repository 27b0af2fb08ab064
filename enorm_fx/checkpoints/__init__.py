"""Files of weights: safetensors, torch.save, shards with their index, folders.

A file is mapped, not read: memory holds what is being worked on, and the input is never written.
The output is the input with the bytes of some tensors replaced, so names, shapes, types, ties and
metadata are the same; it appears under its name only when it is complete.
"""

"""What a model gives: every tensor in its result, keys and values that it keeps for itself aside.

A language model of the transformers library hands out a cache of keys and values, to be handed in
again with the next token. A cache that the model itself has made is a part of the model: the keys
may be rescaled, for the queries that meet them are. A cache that the caller hands in is an input.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from enorm_fx.nested import instances, tensors_anywhere

CACHE_NOTE = (
    "Keys and values in the cache that the model makes (use_cache) count as inside the model: "
    "after a rescaling, do not go on with a cache that was made before it"
)


def outputs_of(result: Any, inputs: Any = ()) -> Iterator[Tensor]:
    """The tensors in the result of a call on these inputs that leave the model."""
    return tensors_anywhere(result, skip={id(cache) for cache in own_caches(result, inputs)})


def own_caches(result: Any, inputs: Any = ()) -> list[Any]:
    """The caches in a result that the caller did not hand in."""
    library = sys.modules.get("transformers.cache_utils")  # loaded, if the model is from there
    kind = getattr(library, "Cache", None)
    if not isinstance(kind, type):
        return []
    caches: type[Any] = kind
    given = {id(cache) for cache in instances(caches, inputs)}
    return [cache for cache in instances(caches, result) if id(cache) not in given]

"""Which groups are updated together, and in which order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

ORDERS = ("sequential", "colored", "simultaneous", "alternating")


def batches(order: str, touched: Sequence[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """Groups by turn: those of a batch take their steps from the same state.

    touched: for each group, the blocks that it moves.

    "sequential":   one group at a time.
    "colored":      groups that share no block at once, as if one after the other: greedy colours
                    in the order of the groups, so a chain has two.
    "alternating":  as colored; a call of the step makes one of these turns, not all.
    "simultaneous": all at once, whatever they share.
    """
    groups = range(len(touched))
    if order == "sequential":
        return tuple((group,) for group in groups)
    if order == "simultaneous":
        return (tuple(groups),) if groups else ()
    import networkx as nx  # takes longer to load than all of the step

    conflicts: nx.Graph = nx.Graph()
    conflicts.add_nodes_from(groups)
    by_block: dict[int, list[int]] = defaultdict(list)
    for group, blocks in enumerate(touched):
        for block in set(blocks):
            conflicts.add_edges_from((group, other) for other in by_block[block])
            by_block[block].append(group)
    colors = nx.greedy_color(conflicts, strategy=lambda graph, _: sorted(graph))
    classes: dict[int, list[int]] = defaultdict(list)
    for group in groups:
        classes[colors[group]].append(group)
    return tuple(tuple(classes[color]) for color in sorted(classes))

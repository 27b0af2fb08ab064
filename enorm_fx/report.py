"""What a plan found, for people and programs: one dict, seen as plain text or as tables.

`to_dict` collects everything; `text` and `show` only arrange what is in it, `why` explains one
weight. Tables need rich, which is imported when they are made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from enorm_fx._names import broken, few, folded, runs, short, short_source
from enorm_fx._why import why as why
from enorm_fx.plan import Group, Plan

if TYPE_CHECKING:
    from rich.console import Console

_TEXT_GROUPS = 10  # groups in str(plan)
_TABLE_GROUPS, _TABLE_PAIRS, _TABLE_REASONS = 12, 24, 8  # rows, unless all are asked for
_SPELLED_PAIRS = 16  # longer lists are folded: conv{1..6}
_SHOWN_OPS = 4
_SHOWN_NAMES = 8  # of alike blocked weights, after folding


def to_dict(plan: Plan) -> dict[str, Any]:
    """Everything that a plan says, tensors aside: only JSON types, always in the same order."""
    weights = [p for p in plan.parameters if p.counted]
    counted = {p.name for p in weights}
    one_sided = [_is_one_sided(group, counted) for group in plan.groups]
    return {
        "model": type(plan.model).__name__,
        "tracer": plan.tracer,
        "exact": plan.exact,
        "inexact_because": _inexact_because(plan),
        "notes": list(plan.notes),
        "num_scales": plan.num_scales,
        "totals": {
            "weights": len(weights),
            "entries": sum(math.prod(p.shape) for p in weights),
            "rescaled_weights": sum(bool(p.terms) for p in weights),
            "groups": len(plan.groups),
            "one_sided_groups": sum(one_sided),
            "pairs": len(plan.pairs),
            "blocked_sides": len(plan.blocked),
        },
        "groups": [
            {
                "start": group.start,
                "channels": group.channels,
                "producers": list(group.producers),
                "consumers": list(group.consumers),
                "via": list(group.via),
                "one_sided": alone,
            }
            for group, alone in zip(plan.groups, one_sided, strict=True)
        ],
        "pairs": [
            {
                "producer": pair.producer,
                "consumer": pair.consumer,
                "channels": pair.channels,
                "via": list(pair.via),
            }
            for pair in plan.pairs
        ],
        "blocked": [
            {
                "weight": side.weight,
                "side": side.side,
                "reason": side.reason,
                "node": side.node,
                "source": side.source,
                "chain": list(side.chain),
            }
            for side in plan.blocked
        ],
        "parameters": [
            {
                "name": p.name,
                "aliases": list(p.aliases),
                "shape": list(p.shape),
                "depth": p.depth,
                "last": p.last,
                "counted": p.counted,
                "rescaled": bool(p.terms),
            }
            for p in plan.parameters
        ],
    }


def text(plan: Plan) -> str:
    """A short plain summary: what `str(plan)` gives."""
    data = to_dict(plan)
    totals, groups = data["totals"], data["groups"]
    lines = [
        f"Plan for {data['model']} ({data['tracer']} front end): "
        f"{_count(totals['weights'], 'weight')}, {_count(data['num_scales'], 'scale')} in "
        f"{_count(totals['groups'], 'group')}, {_count(totals['pairs'], 'pair')}, "
        f"{_count(totals['blocked_sides'], 'blocked side')}",
        exactness(data),
        *data["notes"],
    ]
    shown = groups[:_TEXT_GROUPS]
    if shown:
        rows = [("channels", "producers", "consumers")]
        rows += [(str(g["channels"]), few(g["producers"]), few(g["consumers"])) for g in shown]
        width = max(len(row[1]) for row in rows)
        lines += [f"  {a:>8}  {b:<{width}}  {c}" for a, b, c in rows]
    if len(groups) > len(shown):
        lines.append(f"  and {_count(len(groups) - len(shown), 'more group')}: see plan.groups")
    return "\n".join(lines)


def exactness(data: dict[str, Any]) -> str:
    """One sentence: is the function kept, and if not, why."""
    if data["exact"]:
        return "exact: rescaling keeps the model's function"
    because = " and ".join(data["inexact_because"])
    return f"not exact: {because}" if because else "not exact: some parameters do not follow"


def show(
    console: Console,
    data: dict[str, Any],
    *,
    title: str,
    notes: Sequence[tuple[str, str]] = (),
    everything: bool = False,
) -> None:
    """Print the tables of a plan's dict: groups, pairs, blocked sides, totals.

    Groups of one producer and one consumer are pairs and stand in the second table, other groups
    in the first. With `everything`, all groups, pairs and blocked sides are listed one by one.

    Args:
        console: made with markup=False, because names may contain brackets.
        data: what `to_dict` returned.
        title: what was analyzed.
        notes: further lines of the totals, such as how long it took.
    """
    console.print(title, style="bold")
    console.print()
    groups, pairs = data["groups"], data["pairs"]
    if not everything:
        groups, pairs = _told_once(groups)
    if not data["groups"]:
        console.print("No weight can be rescaled.")
        console.print()
    folded_any = [
        _show_groups(console, groups, data, everything) if groups else False,
        _show_pairs(console, pairs, data, everything) if pairs else False,
        _show_blocked(console, data["blocked"], everything) if data["blocked"] else False,
    ]
    if any(folded_any):
        console.print("{1..3} stands for 1, 2, 3, on both sides together; --all spells them out")
        console.print()
    _show_totals(console, data, notes)


def _is_one_sided(group: Group, counted: set[str]) -> bool:
    return counted.isdisjoint(group.producers) or counted.isdisjoint(group.consumers)


def _inexact_because(plan: Plan) -> list[str]:
    """Which choices let parameters stay where others are rescaled, read off the plan itself."""
    if plan.exact:
        return []
    reasons = []
    # With batchnorm="affine" a BatchNorm ends every path, so it is never between two weights.
    if any(op.startswith("batch_norm") for group in plan.groups for op in group.via):
        reasons.append(
            'batchnorm="skip" rescales across BatchNorm, whose parameters stay'
            ' (batchnorm="affine" is exact)'
        )
    produced = {name for group in plan.groups for name in group.producers}
    follows = {p.name for p in plan.parameters if p.terms}
    shapes = {p.name: p.shape for p in plan.parameters}
    for _, call in plan.graph.nodes(data=True):
        stay = [n for n in call["parameters"] if n not in follows and len(shapes.get(n, (0,))) == 1]
        if stay and produced.intersection(call["parameters"]):
            reasons.append('biases="skip" leaves biases as they are')
            break
    return reasons


def _told_once(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of several producers or consumers, and the other groups as pairs."""
    several, pairs = [], []
    for group in groups:
        if len(group["producers"]) == len(group["consumers"]) == 1:
            producer, consumer = group["producers"][0], group["consumers"][0]
            pairs.append({**group, "producer": producer, "consumer": consumer})
        else:
            several.append(group)
    return several, pairs


def _show_groups(
    console: Console, groups: list[dict[str, Any]], data: dict[str, Any], everything: bool
) -> bool:
    shown = groups if everything else groups[:_TABLE_GROUPS]
    rows = []
    for group in shown:
        lists = (group["producers"], group["consumers"])
        producers, consumers = (
            [short(n) for n in names] if everything else folded(names) for names in lists
        )
        rows.append(([str(group["channels"])], producers, consumers, _via(group, everything)))
    what = "Groups" if everything else "Groups with several producers or consumers"
    title = f"{what}: {len(groups)} of {len(data['groups'])}"
    columns = ["channels", "producers", "consumers", "via"]
    left_out = _left_out(len(groups) - len(shown), "group")
    return _print_table(console, title, columns, rows, left_out, leading=1)


def _show_pairs(
    console: Console, pairs: list[dict[str, Any]], data: dict[str, Any], everything: bool
) -> bool:
    elsewhere = max(len(data["pairs"]) - len(pairs), 0)
    title = f"Pairs: {len(pairs)}"
    if elsewhere:
        title += f", the other {elsewhere} are in the groups above"
    named = (
        (
            (pair["channels"], _via(pair, everything)),
            (short(pair["producer"]), short(pair["consumer"])),
        )
        for pair in pairs
    )
    found = runs(named, fold=not everything and len(pairs) > _SPELLED_PAIRS)
    shown = found if everything else found[:_TABLE_PAIRS]
    rows = []
    for run in shown:
        (channels, via), (producer, consumer) = run.key, run.spelled()
        number = f"{channels}" if run.count == 1 else f"{run.count} x {channels}"
        rows.append(([number], [producer], [consumer], via))
    columns = ["channels", "producer", "consumer", "via"]
    left_out = _left_out(sum(run.count for run in found[len(shown) :]), "pair")
    return _print_table(console, title, columns, rows, left_out)


def _show_blocked(console: Console, blocked: list[dict[str, str]], everything: bool) -> bool:
    """One row for each reason and side, or for each blocked side."""
    alike: dict[Hashable, list[dict[str, str]]] = {}
    for i, side in enumerate(blocked):
        alike.setdefault(i if everything else (side["reason"], side["side"]), []).append(side)
    shown = list(alike.values())[: None if everything else _TABLE_REASONS]
    rows = []
    for sides in shown:
        names = folded([side["weight"] for side in sides])
        if len(names) > _SHOWN_NAMES:
            names[_SHOWN_NAMES:] = [f"and {len(names) - _SHOWN_NAMES} more: --all"]
        first = sides[0]
        where = [place for place in (first["node"], short_source(first["source"])) if place]
        if len(sides) > 1 and where:
            where[0] = f"first: {where[0]}"
        number = _count(len(sides), first["side"])
        rows.append(([number], names, where, first["reason"]))
    title = f"Blocked sides of weights: {len(blocked)}"
    left_out = _left_out(len(blocked) - sum(map(len, shown)), "blocked side")
    columns = ["sides", "weights", "where", "why"]
    return _print_table(console, title, columns, rows, left_out, leading=0 if everything else 1)


def _show_totals(console: Console, data: dict[str, Any], notes: Sequence[tuple[str, str]]) -> None:
    from rich.table import Table

    totals = data["totals"]
    one_sided = totals["one_sided_groups"]
    aside = f" ({one_sided} one-sided: factor 1)" if one_sided else ""
    exact, _, because = exactness(data).partition(": ")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in (
        (
            "weights",
            f"{totals['weights']:,} with {totals['entries']:,} entries; "
            f"{totals['rescaled_weights']:,} can be rescaled",
        ),
        ("scales", f"{data['num_scales']:,} in {_count(totals['groups'], 'group')}{aside}"),
        ("pairs", f"{totals['pairs']:,}"),
        ("blocked", _count(totals["blocked_sides"], "side")),
        ("exact", f"{'no' if exact.startswith('not') else 'yes'}: {because}"),
        *(("note", note) for note in data["notes"]),
        *notes,
    ):
        table.add_row(*row)
    console.print(table)


def _left_out(count: int, what: str) -> str:
    verb, them = ("is", "it") if count == 1 else ("are", "them")
    return f"{_count(count, f'more {what}')} {verb} not shown: --all shows {them}" if count else ""


_Row = tuple[list[str], list[str], list[str], str]


def _print_table(
    console: Console,
    title: str,
    columns: list[str],
    rows: list[_Row],
    left_out: str,
    leading: int = 0,
) -> bool:
    """Four columns: a short one, two of names (a line each, broken at dots), one of words.

    Returns whether some name stands for several.
    """
    from rich import box
    from rich.table import Table

    first = max(len(columns[0]), *(len(line) for row in rows for line in row[0]))
    wanted = [max(len(name) for row in rows for name in (*row[i], columns[i])) for i in (1, 2)]
    longest = max((len(word) for row in rows for word in row[3].split()), default=0)
    room = console.width - first - 6  # 6 for the space between columns
    words = min(max(room - sum(wanted), longest, len(columns[3]), 16), 30)
    widths = _share(room - words, *wanted)
    table = Table(
        box=box.SIMPLE_HEAD, leading=leading, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(columns[0], justify="right", no_wrap=True)
    for column, width in zip(columns[1:3], widths, strict=True):
        table.add_column(column, width=width, overflow="fold")
    table.add_column(columns[3], max_width=words, overflow="fold")
    for first_lines, one, two, last in rows:
        cells = (
            "\n".join(line for name in names for line in broken(name, width))
            for names, width in ((one, widths[0]), (two, widths[1]))
        )
        table.add_row("\n".join(first_lines), *cells, last)
    console.print(title, style="bold")
    console.print(table)
    if left_out:
        console.print(f"  {left_out}")
    console.print()
    return any("{" in name for row in rows for names in row[1:3] for name in names)


def _share(room: int, one: int, two: int) -> tuple[int, int]:
    """Widths of two columns that would like `one` and `two`."""
    if one + two <= room:
        return one, two
    half = max(room // 2, 12)
    if one <= half:
        return one, max(room - one, 12)
    return (max(room - two, 12), two) if two <= half else (half, half)


def _via(item: dict[str, Any], everything: bool) -> str:
    ops = item["via"]
    shown = ops if everything or len(ops) <= _SHOWN_OPS + 1 else ops[:_SHOWN_OPS]
    rest = f" ... (+{len(ops) - len(shown)})" if len(ops) > len(shown) else ""
    note = " (one-sided: keeps factor 1)" if item.get("one_sided") else ""
    return " ".join(shown or ["(directly)"]) + rest + note


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

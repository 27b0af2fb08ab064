"""The tables that the command line prints, made of a plan's dict.

Tables need rich, which is imported when they are made.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from enorm_fx.report.contents import exactness
from enorm_fx.report.names import broken, folded, plural, runs, short, short_source

if TYPE_CHECKING:
    from rich.console import Console

_TABLE_GROUPS, _TABLE_PAIRS, _TABLE_REASONS = 12, 24, 8  # rows, unless all are asked for
_SPELLED_PAIRS = 16  # longer lists are folded: conv{1..6}
_SHOWN_OPS = 4
_SHOWN_NAMES = 8  # of alike blocked weights, after folding


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
        groups, pairs = _groups_and_pairs(groups)
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


def _groups_and_pairs(
    groups: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
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
    """Print a row for each group; returns whether some name stands for several."""
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
    """Print a row for each pair or run of pairs; returns whether some name stands for several."""
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
    """Print a row for each reason and side, or each blocked side; returns as the others do."""
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
        number = plural(len(sides), first["side"])
        rows.append(([number], names, where, first["reason"]))
    title = f"Blocked sides of weights: {len(blocked)}"
    left_out = _left_out(len(blocked) - sum(map(len, shown)), "blocked side")
    columns = ["sides", "weights", "where", "why"]
    return _print_table(console, title, columns, rows, left_out, leading=0 if everything else 1)


def _show_totals(console: Console, data: dict[str, Any], notes: Sequence[tuple[str, str]]) -> None:
    """Print how much there is of everything, whether the plan is exact, and the notes."""
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
        ("scales", f"{data['num_scales']:,} in {plural(totals['groups'], 'group')}{aside}"),
        ("pairs", f"{totals['pairs']:,}"),
        ("blocked", plural(totals["blocked_sides"], "side")),
        ("exact", f"{'no' if exact.startswith('not') else 'yes'}: {because}"),
        *(("note", note) for note in data["notes"]),
        *notes,
    ):
        table.add_row(*row)
    console.print(table)


def _left_out(count: int, what: str) -> str:
    """What a table does not show, as a sentence; nothing if it shows everything."""
    verb, them = ("is", "it") if count == 1 else ("are", "them")
    return f"{plural(count, f'more {what}')} {verb} not shown: --all shows {them}" if count else ""


_Row = tuple[list[str], list[str], list[str], str]


def _print_table(
    console: Console,
    title: str,
    columns: list[str],
    rows: list[_Row],
    left_out: str,
    leading: int = 0,
) -> bool:
    """Print four columns: a short one, two of names (a line each, broken at dots), one of words.

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
    """Share a width between two columns that would like to have `one` and `two`."""
    if one + two <= room:
        return one, two
    half = max(room // 2, 12)
    if one <= half:
        return one, max(room - one, 12)
    return (max(room - two, 12), two) if two <= half else (half, half)


def _via(item: dict[str, Any], everything: bool) -> str:
    """The ops between two ends of a group, the first ones if there are many."""
    ops = item["via"]
    shown = ops if everything or len(ops) <= _SHOWN_OPS + 1 else ops[:_SHOWN_OPS]
    rest = f" ... (+{len(ops) - len(shown)})" if len(ops) > len(shown) else ""
    note = " (one-sided: keeps factor 1)" if item.get("one_sided") else ""
    return " ".join(shown or ["(directly)"]) + rest + note

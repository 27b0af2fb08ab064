"""The record of `python -m benchmarks.speed` as bars, tables on the terminal, and markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

PAPER = ("fully connected", "fully convolutional")
RESNETS = ("resnet18", "resnet50")
BACKENDS = ("eager", "native", "cudagraph")
TITLES = {
    "sgd": "fused SGD",
    **{name: f"ENorm, {name}" for name in BACKENDS},
    "loop": "plain loop",
    "flat": "floor",
}

Record = Mapping[str, Any]


def bars(record: Record) -> list[dict[str, Any]]:
    """What was asked for, what was measured: one row a bar whose parts the record holds.

    bound: an upper one ("most") or a lower one ("least").
    """
    return [
        {"bar": name, "measured": measured, kind: bound, "met": met}
        for name, measured, kind, bound in _bars(record)
        for met in [measured <= bound if kind == "most" else measured >= bound]
    ]


def _bars(record: Record) -> Iterator[tuple[str, float, str, float]]:
    for name, row in record.get("step", {}).items():
        ratios, auto = row["ratios"], row["auto"]
        if name in PAPER + RESNETS and auto in ratios:
            bound = 1.0 if name in PAPER else 1.2
            yield f"{name}: step ({auto}) / fused SGD", ratios[auto], "most", bound
        if auto in ratios:
            faster = ratios["loop"] / ratios[auto]
            yield f"{name}: plain loop / step ({auto})", faster, "least", 5.0
        if name in PAPER + RESNETS and "eager" in ratios:
            yield f"{name}: step (eager) / fused SGD", ratios["eager"], "most", 4.0
    cycles = record.get("cycles", {})
    for name, ratio in cycles.get("ratios", {}).items():
        if name.endswith(" 10"):
            backend = name.removesuffix(" 10")
            yield f"{cycles['network']}: 10 cycles / 1 cycle ({backend})", ratio, "most", 3.0
    for family, costs in _families(record).items():
        if len(costs) > 1:
            spread = max(costs) / min(costs)
            yield f"{family}: largest / least cost per parameter", spread, "most", 1.2
    build = record.get("build", {})
    if "eager" in build.get("backends", {}):
        seconds = build["backends"]["eager"]["median"]
        yield f"{build['network']}: seconds to build the eager step", seconds, "most", 1.0


def _families(record: Record) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in record.get("sizes", {}).get("rows", ()):
        found.setdefault(row["family"], []).append(row["enorm_ns_per_parameter"])
    return found


# ---- the terminal ----


def show(record: Record, console: Console) -> None:
    """Every section that the record has, as tables."""
    if record.get("bandwidth"):
        rates = (f"{name} {rate / 1e9:.1f} GB/s" for name, rate in record["bandwidth"].items())
        console.print(f"memory: {', '.join(rates)}", highlight=False)
    if record.get("step"):
        console.print(_step_table(record["step"]))
    if record.get("training"):
        console.print(_training_table(record["training"]))
    if record.get("converge"):
        console.print(_converge_table(record["converge"]))
    for key, title in (("cycles", "cycles"), ("orders", "orders, eager")):
        if record.get(key):
            console.print(_variant_table(record[key], title))
    if record.get("sizes"):
        console.print(_size_table(record["sizes"]))
    if record.get("build"):
        console.print(_build_table(record["build"]))
    if record.get("bars"):
        console.print(_bar_table(record["bars"]))
    for text, names in _skipped(record).items():
        console.print(f"left out: {', '.join(names)}: {text}", highlight=False, markup=False)


def _step_table(step: Record) -> Table:
    """Medians in ms with their quartiles; below, ratios to the fused SGD step."""
    names = contenders(step)
    table = Table("network", "parameters", *(TITLES[name] for name in names), title="one step, ms")
    for network, row in step.items():
        cells = []
        for name in names:
            cost = row["contenders"].get(name)
            if cost is None:
                cells.append("")
                continue
            text = f"{_ms(cost['median'])} [{_ms(cost['q1'])} {_ms(cost['q3'])}]"
            if name != "sgd":
                text += f"\n{row['ratios'][name]:.2f} x"
            if "launches" in cost:
                text += f"\n{cost['launches']} launches"
            cells.append(text.replace("[", r"\["))
        floor = row["floor"]
        cells[-1] += (
            f"\nby bytes {_ms(floor['seconds_reading_once'])}"
            f" to {_ms(floor['seconds_reading_twice'])}"
        )
        auto = f"{network}\nauto: {row['auto']}"
        table.add_row(auto, f"{row['parameters']:,}", *cells)
    return table


def _training_table(training: Record) -> Table:
    table = Table(
        "network", "batch", "training step", "+ BatchNorm", "+ GroupNorm", "+ ENorm",
        title="a training step, ms, and what is added to it",
    )  # fmt: skip
    for network, row in training.items():
        base = row["contenders"][f"train {row['base']}"]["median"]
        added = [
            f"{_ms(row['adds'][key])} ({row['adds_share_of_base'][key]:.1%})"
            if key in row["adds"]
            else ""
            for key in ("batch", "group", "enorm")
        ]
        table.add_row(network, " x ".join(map(str, row["batch"])), _ms(base), *added)
    return table


def _converge_table(converge: Record) -> Table:
    title = "to the optimum of the moment, ms, and multiples of one cycle"
    table = Table("network", "SGD", "one cycle", "converge", "cycles", "ratio", title=title)
    for network, row in converge.items():
        cells = [
            _ms(row["contenders"][name]["median"]) if name in row["contenders"] else ""
            for name in ("sgd", "cycle", "converge")
        ]
        ratio = f"{row['ratios']['converge']:.1f}" if "converge" in row["ratios"] else ""
        table.add_row(network, *cells, str(row.get("cycles", "")), ratio)
    return table


def _variant_table(section: Record, title: str) -> Table:
    table = Table("step", "ms", "ratio", title=f"{section['network']}: {title}")
    costs = section["contenders"]
    first = next(iter(costs.values()), None)
    for name, cost in costs.items():
        below = section.get("ratios", {}).get(name, cost["median"] / (first or cost)["median"])
        table.add_row(name, _ms(cost["median"]), f"{below:.2f}")
    return table


def _size_table(sizes: Record) -> Table:
    table = Table(
        "family", "parameters", "ENorm ms", "ENorm ns each", "SGD ns each", "ratio",
        title="cost per parameter",
    )  # fmt: skip
    for row in sorted(sizes["rows"], key=lambda row: (row["family"], row["parameters"])):
        ours, sgd = row["enorm_ns_per_parameter"], row["sgd_ns_per_parameter"]
        table.add_row(
            row["family"], f"{row['parameters']:,}", _ms(row["enorm"]["median"]), f"{ours:.3f}",
            f"{sgd:.3f}", f"{ours / sgd:.2f}",
        )  # fmt: skip
    return table


def _build_table(build: Record) -> Table:
    title = f"{build['network']}: seconds to build a step (analysis: {build['analysis']:.2f} s)"
    table = Table("backend", "first time", "median", title=title)
    for name, row in build["backends"].items():
        table.add_row(name, f"{row['first']:.3f}", f"{row['median']:.3f}")
    return table


def _bar_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("bar", "measured", "asked for", "")
    for row in rows:
        asked = f"<= {row['most']:g}" if "most" in row else f">= {row['least']:g}"
        mark = "[green]met[/]" if row["met"] else "[red]missed[/]"
        table.add_row(row["bar"], f"{row['measured']:.2f}", asked, mark)
    return table


def _skipped(record: Record) -> dict[str, list[str]]:
    """What was left out, by reason."""
    sections = [*record.get("step", {}).values(), *record.get("converge", {}).values()]
    sections += [record[key] for key in ("cycles", "orders", "sizes", "build") if key in record]
    found: dict[str, list[str]] = {}
    for section in sections:
        for name, text in section["skipped"].items():
            names = found.setdefault(text, [])
            if name not in names:
                names.append(name)
    return found


def contenders(step: Record) -> list[str]:
    """The contenders that any network has, in the order of `TITLES`."""
    return [name for name in TITLES if any(name in row["contenders"] for row in step.values())]


def _ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    ms = 1e3 * seconds
    return f"{ms:.3g}" if abs(ms) < 100 else f"{ms:.0f}"


# ---- markdown ----


def converge_markdown(record: Record) -> str:
    """One cycle and `converge=True` as multiples of the SGD step before them."""
    rows = [["", "SGD step", "one cycle", "`converge=True`", "its cycles"]]
    rows.append(["---"] + ["---:"] * 4)
    for network, row in record["converge"].items():
        over = row.get("over_sgd", {})
        cells = [f"{over[name]:.2f}" if name in over else "" for name in ("cycle", "converge")]
        sgd = f"{_ms(row['contenders']['sgd']['median'])} ms" if row["contenders"] else ""
        rows.append([network, sgd, *cells, str(row.get("cycles", ""))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(record: Record) -> str:
    """The README's table: the step as multiples of the fused SGD step, and of a training step."""
    step, training = record["step"], record.get("training", {})
    names = [name for name in contenders(step) if name != "sgd"]
    added = {"enorm": "ENorm", "batch": "BatchNorm", "group": "GroupNorm"} if training else {}
    head = ["", "parameters", "fused SGD step", *(TITLES[name] for name in names)]
    head += [f"training step + {title}" for title in added.values()]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for network, row in step.items():
        ratios = row["ratios"]
        cells = [f"{ratios[name]:.2f}" if name in ratios else "" for name in names]
        shares = training.get(network, {}).get("adds_share_of_base", {})
        cells += [f"{shares[key]:+.1%}" if key in shares else "" for key in added]
        millions = f"{row['parameters'] / 1e6:.3g}M"
        rows.append([network, millions, f"{_ms(row['contenders']['sgd']['median'])} ms", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

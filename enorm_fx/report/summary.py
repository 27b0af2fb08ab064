"""A plan in a few lines of plain text: what `str(plan)` gives."""

from __future__ import annotations

from enorm_fx.plan.data import PlanData
from enorm_fx.report.contents import exactness, to_dict
from enorm_fx.report.names import few, plural

_TEXT_GROUPS = 10  # groups in str(plan)


def summary(plan: PlanData) -> str:
    """A few lines of plain text: totals, whether the plan is exact, the first groups."""
    data = to_dict(plan)
    totals, groups = data["totals"], data["groups"]
    lines = [
        f"Plan for {data['model']} ({data['tracer']} front end): "
        f"{plural(totals['weights'], 'weight')}, {plural(data['num_scales'], 'scale')} in "
        f"{plural(totals['groups'], 'group')}, {plural(totals['pairs'], 'pair')}, "
        f"{plural(totals['blocked_sides'], 'blocked side')}",
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
        lines.append(f"  and {plural(len(groups) - len(shown), 'more group')}: see plan.groups")
    return "\n".join(lines)

"""Drawings: each call once, colours by group, nothing from outside, whatever the names are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import enorm_fx
from enorm_fx.model_plan import Plan
from enorm_fx.report import drawing
from enorm_fx.report.arrangement import Box, Item, arrange
from enorm_fx.report.dot import dot
from enorm_fx.report.page import html as render

HOSTILE = '</script><b onload="x">\'&amp;\\"\n\t\x07@TITLE@{}\u2028\ud800'


class Hostile(nn.Module):
    """Module and parameter names that no document expects."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(4, 5))
        self.add_module('"', nn.Sequential(nn.ReLU(), nn.Linear(5, 3)))
        self.register_parameter("<!--", nn.Parameter(torch.ones(3, 2)))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x @ self.get_parameter("<!--")


class Parser(HTMLParser):
    """Counts what is opened and closed, and keeps the texts of scripts."""

    VOID = ("meta", "input", "br", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.seen: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data


@cache
def _plan(name: str) -> Plan:
    if name == "hostile":
        return enorm_fx.analyze(Hostile(), torch.zeros(2, 4))
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return enorm_fx.analyze(layer, torch.zeros(2, 3, 16))
    if name == "nothing":
        return enorm_fx.analyze(nn.Tanh(), torch.zeros(2, 3))
    models = pytest.importorskip("torchvision.models")
    return enorm_fx.analyze(getattr(models, name)().eval())


PLANS = ("hostile", "transformer", "nothing", "resnet18", "densenet121", "mobilenet_v2")


def _svg(page: str) -> ElementTree.Element:
    found = re.findall(r'<svg id="drawing".*?</svg>', page, re.DOTALL)
    assert len(found) == 1
    return ElementTree.fromstring(found[0])


def _parsed(page: str) -> Parser:
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


@pytest.mark.parametrize("name", PLANS)
def test_the_page_is_well_formed_and_has_each_call_and_edge_once(name: str) -> None:
    plan = _plan(name)
    page = render(plan, "a plan")
    _parsed(page)
    groups = _svg(page).findall("g")
    ids = [g.get("id") for g in groups if "call" in str(g.get("class")).split()]
    assert ids == [f"call-{n}" for n in plan.graph]
    edges = [g for g in groups if "edge" in str(g.get("class")).split()]
    assert len(edges) == plan.graph.number_of_edges()


@pytest.mark.parametrize("name", PLANS)
def test_the_page_asks_for_nothing_from_outside(name: str) -> None:
    page = render(_plan(name))
    parser = _parsed(page)
    assert not {key for key, _ in parser.attributes} & {"src", "href", "xlink:href", "action"}
    assert not parser.seen.keys() & {"link", "img", "iframe", "object", "base"}
    style = "".join(re.findall(r"<style>.*?</style>", page, re.DOTALL))
    code = parser.scripts[-1]
    for text in (style, code, *(value or "" for _, value in parser.attributes)):
        assert not re.search(r"https?:|@import|//\w+\.|import\(|fetch\(|url\((?!#)", text)


@pytest.mark.parametrize("name", PLANS)
def test_the_data_of_the_page_is_the_dict_of_the_plan(name: str) -> None:
    plan = _plan(name)
    data, code = _parsed(render(plan)).scripts
    found = json.loads(data)
    assert found.pop("palette") == list(drawing.PALETTE)
    assert found == plan.to_dict()
    assert code.strip().startswith('"use strict"')


@pytest.mark.parametrize("name", PLANS)
def test_calls_and_edges_know_their_groups(name: str) -> None:
    plan = _plan(name)
    svg = _svg(render(plan))
    calls = {g.get("id"): g for g in svg.findall("g") if g.get("id")}
    for number, group in enumerate(plan.groups):
        for names, key in ((group.producers, "data-makes"), (group.consumers, "data-takes")):
            for node, call in plan.graph.nodes(data=True):
                known = (calls[f"call-{node}"].get(key) or "").split()
                both = set(group.producers) & set(group.consumers)
                if set(names) & set(call["parameters"]) - both:
                    assert str(number) in known
    for node, call in plan.graph.nodes(data=True):
        known = (calls[f"call-{node}"].get("data-groups") or "").split()
        assert {str(g) for g in call["groups"]} <= set(known)


@pytest.mark.parametrize("name", PLANS)
def test_what_is_pinned_says_why(name: str) -> None:
    plan = _plan(name)
    calls = drawing.drawn_calls(plan)
    for blocked in plan.blocked:
        mine = [call for call in calls if blocked.weight in call.parameters]
        assert mine
        for call in mine:
            assert f"{blocked.side} pinned: {blocked.reason}" in call.title
    by_call = {call.number: call for call in calls}
    pinning = {b.call for b in plan.blocked}
    assert {call.number for call in calls if call.pins} == pinning
    for blocked in plan.blocked:
        call = by_call[blocked.call]
        place = call.op if call.leaf else f"{call.module}.{call.op}".lstrip(".")
        assert (blocked.node, blocked.source) == (place, call.source)
        assert f"({blocked.reason})" in call.pins


@pytest.mark.parametrize("name", PLANS)
def test_dot_has_each_node_and_edge_once(name: str) -> None:
    plan = _plan(name)
    source = dot(plan)
    bare = re.sub(r'"(\\.|[^"\\])*"', '""', source)
    assert '"' not in bare.replace('""', "")
    assert bare.count("{") == bare.count("}") == 1 + bare.count("subgraph")
    nodes = re.findall(r"^ +n(\d+) \[", bare, re.MULTILINE)
    assert sorted(map(int, nodes)) == sorted(plan.graph)
    edges = re.findall(r"^ +n(\d+) -> n(\d+) \[", bare, re.MULTILINE)
    assert [(int(a), int(b)) for a, b in edges] == list(plan.graph.edges)
    for blocked in plan.blocked:
        assert f"pinned: {blocked.reason}".replace("\\", "\\\\") in source


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("name", [name for name in PLANS if name != "densenet121"])
def test_graphviz_reads_dot(name: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.dot"
    file.write_text(dot(_plan(name)), encoding="utf-8")
    done = subprocess.run(
        ["dot", "-Tsvg", str(file)], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stderr == ""
    assert done.stdout.count('class="node"') == _plan(name).graph.number_of_nodes()


def test_hostile_names_stay_text() -> None:
    plan = _plan("hostile")
    page = render(plan, HOSTILE)
    page.encode("utf-8")
    harmless = render(enorm_fx.analyze(nn.Sequential(nn.Linear(4, 5), nn.ReLU())), "x")
    parser, other = _parsed(page), _parsed(harmless)
    assert parser.seen["script"] == other.seen["script"] == 2
    assert parser.seen["b"] == 0
    assert not {key for key, _ in parser.attributes if key.startswith("on")}
    assert "<!--" not in page.replace("&lt;!--", "")
    assert [w for w in json.loads(parser.scripts[0])["parameters"] if w["name"] == "<!--"]
    assert "@TITLE@{}" in page, "templates are filled once"
    dot(plan, HOSTILE).encode("utf-8")


def test_colours_of_neighbours_differ_and_repeat_after_the_palette() -> None:
    count = len(drawing.PALETTE)
    assert len(set(drawing.PALETTE)) == count
    for group in range(3 * count):
        assert drawing.colour(group) == drawing.colour(group + count)
        assert drawing.colour(group) != drawing.colour(group + 1)


@pytest.mark.parametrize("colour", [*drawing.PALETTE, drawing.PINNED, drawing.SEVERAL])
def test_dark_text_can_be_read_on_every_fill(colour: str) -> None:
    """WCAG 2: a contrast of at least 7 to 1."""

    def luminance(text: str) -> float:
        channels = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (luminance(drawing.tint(colour)) + 0.05) / (luminance("#1c2128") + 0.05) >= 7


def _overlap(one: Box, two: Box) -> bool:
    return one.x < two.right and two.x < one.right and one.y < two.bottom and two.y < one.bottom


@pytest.mark.parametrize("count", [0, 1, 2, 40, 300])
def test_boxes_do_not_overlap_and_edges_join_them(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    draws = torch.randint(0, 4, (count, 3), generator=generator).tolist()
    items = [
        Item(20 + 10 * a, tuple(f"m{i // 20}.{i // 7}.{b}".split(".")[: b + 1]))
        for i, (a, b, _) in enumerate(draws)
    ]
    edges = {(max(i - 1 - 9 * c, 0), i) for i, (_, _, c) in enumerate(draws) if i}
    edges |= {(0, i) for i in range(1, count, 11)}
    layout = arrange(items, sorted(edges))
    for i, box in enumerate(layout.boxes):
        assert box.height == items[i].height
        assert not any(_overlap(box, other) for other in layout.boxes[:i])
        assert 0 <= box.x < box.right <= layout.width
        assert 0 <= box.y < box.bottom <= layout.height
    for frame in layout.modules:
        for box in layout.boxes:
            inside = frame.x < box.x and box.right < frame.right
            inside = inside and frame.y < box.y and box.bottom < frame.bottom
            assert inside or not _overlap(frame, box)
    assert set(layout.routes) == edges
    for (a, b), points in layout.routes.items():
        one, two = layout.boxes[a], layout.boxes[b]
        assert points[0][0] in (one.right, one.x + one.width / 2)
        assert one.y <= points[0][1] <= one.bottom
        assert points[-1][0] in (two.x, two.right, two.x + two.width / 2)
        assert two.y <= points[-1][1] <= two.bottom
        for (x, y), (u, v) in pairwise(points):
            assert x == u or y == v, "lines are upright or level"
            assert not any(
                other.x < max(x, u) and min(x, u) < other.right
                and other.y < max(y, v) and min(y, v) < other.bottom
                for other in layout.boxes
            ), "no line crosses a call"  # fmt: skip

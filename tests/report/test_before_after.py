"""Before and after: ranges and norms are the weights', and the page and the figure show them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from enorm_fx.errors import ArgumentError
from enorm_fx.report import before_after
from enorm_fx.report.before_after import Layer, layers, measure_weights, span
from enorm_fx.report.before_after_page import page
from enorm_fx.report.before_after_plot import check_plot, draw


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Linear(6, 2))


def shown() -> tuple[Layer, ...]:
    net = network()
    before = measure_weights(net)
    with torch.no_grad():
        net[0].weight.mul_(100)
        net[2].weight[1] = 0
    return layers(before, measure_weights(net))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_norms_and_ranges_are_those_of_the_weights(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before_after, "_CHUNK", chunk)
    net = network().to(torch.bfloat16)
    found = measure_weights(net)
    assert list(found) == ["0.weight", "2.weight", "3.weight"]
    for name, measured in found.items():
        weight = net.get_parameter(name).detach().double()
        assert measured.norm == pytest.approx(float(weight.norm()), rel=1e-12)
        assert torch.equal(measured.ranges, weight.abs().flatten(1).amax(1))


def test_what_moved_and_what_is_spanned() -> None:
    found = shown()
    assert [layer.moved for layer in found] == [True, True, False]
    low, high = span(found)
    every = [m.ranges for layer in found for m in (layer.before, layer.after)]
    assert high == float(torch.cat(every).max())
    assert low == float(torch.cat(every)[torch.cat(every) > 0].min()) > 0
    assert span(()) == (0.1, 1.0)


def test_the_page_has_a_tick_for_each_channel_and_asks_for_nothing() -> None:
    found = shown()
    text = page("Net <b>", [("checked", "a & b")], found, [("why <i>", ["2.weight"]), ("x", ())])
    assert "Net &lt;b&gt;" in text
    assert "a &amp; b" in text
    assert "why &lt;i&gt;" in text
    assert "@" not in re.sub(r"@media|@font-face", "", text)
    assert not re.search(r"(?:src|href)=|url\(|https?://", text)
    strips = re.findall(r'<path class="(before|after)" d="(.*?)"', text)
    assert [kind for kind, _ in strips] == ["before", "after"] * 3
    counts = [ticks.count("M") for _, ticks in strips]
    assert counts == [4, 4, 6, 5, 2, 2]  # a channel that is zero has no place on a log scale
    assert text.count("class=same") == 1
    places = [float(x) for _, ticks in strips for x in re.findall(r"M([\d.]+)", ticks)]
    assert 0 <= min(places) < max(places) <= 460


@pytest.mark.parametrize(
    ("size", "marks"),
    [(3.0, ["0.5", "1", "2"]), (1e9, ["1e-09", "1e-08"]), (1e30, ["1e-30", "1e-23"])],
)
def test_the_axis_has_round_numbers(size: float, marks: list[str]) -> None:
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        one.weight.fill_(0.9 if size < 10 else 1.0)
        other.weight.fill_(0.9 * size if size < 10 else 1 / size)
    text = page("", [], layers(measure_weights(one), measure_weights(other)), [])
    found = re.findall(r'<text x="[\d.]+" y="12">(.*?)</text>', text)
    assert [mark for mark in found if mark in marks] == [m for m in marks if m in found]
    assert 2 <= len(found) <= 11
    assert all(float(f"{float(mark):.0e}") == float(mark) for mark in found)


def test_many_channels_are_drawn_thinned_out() -> None:
    wide = nn.Linear(2, 5000)
    text = page("", [], layers(measure_weights(wide), measure_weights(wide)), [])
    ticks = re.search(r'<path class="before" d="(.*?)"', text)
    assert ticks is not None
    assert ticks[1].count("M") == 200
    assert "5,000" in text
    assert "Nothing." in text


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_the_figure_is_written(tmp_path: Path, form: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "x"
    for found in (shown(), ()):
        draw(path, form, "Net", found)
        start = path.read_bytes()[:5]
        assert start == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[form]


def test_other_figures_are_refused() -> None:
    check_plot(Path("a.PNG"))
    with pytest.raises(ArgumentError, match=r"--plot a\.jpg: name a file that ends in"):
        check_plot(Path("a.jpg"))

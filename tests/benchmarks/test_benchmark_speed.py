"""The speed benchmark: fair turns, a plain loop that computes the same, records that add up."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import enorm_fx
from benchmarks.models import fully_convolutional, group_norm
from benchmarks.speed import __main__ as speed
from benchmarks.speed import settings as speed_settings
from benchmarks.speed import table as speed_table
from benchmarks.speed.bench import reason, try_enorm
from benchmarks.speed.costs import median_visit, ratios
from benchmarks.speed.interleave import (
    LEAST_ROUNDS,
    Contender,
    interleave,
    kernel_launches,
    summary,
)
from benchmarks.speed.networks import (
    NORMS,
    Network,
    networks,
    normalized,
    set_up,
    stack,
    with_state,
)
from benchmarks.speed.plain_loop import PlainLoop
from benchmarks.speed.report import bars, markdown

CPU = torch.device("cpu")


# ---- turns ----


def _turns(rounds: int, budget: float, seed: int = 0) -> tuple[list[str], dict[str, list[float]]]:
    log: list[str] = []
    contenders = [
        Contender(
            name, lambda name=name: log.append(name), lambda name=name: log.append("-" + name)
        )  # type: ignore[misc]
        for name in "abc"
    ]
    rng = random.Random(seed)
    seconds = interleave(contenders, rounds=rounds, budget=budget, rng=rng, device=CPU)
    return log, seconds


def test_every_round_visits_each_contender_once_after_what_goes_before_it() -> None:
    log, seconds = _turns(rounds=10, budget=60)
    assert log[::2] == ["-" + name for name in log[1::2]]
    rounds = [tuple(log[1::2][start : start + 3]) for start in range(0, len(log) // 2, 3)]
    assert all(sorted(visited) == ["a", "b", "c"] for visited in rounds)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 10, "b": 10, "c": 10}
    assert len(set(rounds)) > 1, "the order changes"
    assert log == _turns(rounds=10, budget=60)[0], "and is seeded"


def test_rounds_end_with_the_budget_but_not_before_the_least() -> None:
    _, seconds = _turns(rounds=100, budget=0.0)
    assert {len(values) for values in seconds.values()} == {LEAST_ROUNDS}
    _, seconds = _turns(rounds=2, budget=0.0)
    assert {len(values) for values in seconds.values()} == {2}


def test_summary() -> None:
    assert summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {
        "median": 3.0, "q1": 2.0, "q3": 4.0, "fastest": 1.0, "rounds": 5,
    }  # fmt: skip
    assert summary([7.0])["median"] == 7.0
    assert ratios({"sgd": [1.0, 2.0, 3.0], "eager": [8.0]}, "sgd") == {"eager": 4.0}


def test_launches_are_counted_on_a_gpu_alone() -> None:
    called: list[int] = []
    assert kernel_launches(lambda: called.append(1), CPU) is None
    assert not called


# ---- the plain loop ----


def _residual() -> nn.Module:
    model: nn.Module = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5)
    return model


def _flattened() -> nn.Module:
    """A Linear that reads each channel at several places, and biases."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 7), nn.ReLU(),
        nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: stack(12, 6), (2, 12)),
        (lambda: fully_convolutional(3, 4), (2, 3, 8, 8)),
        (_flattened, (2, 3, 8, 8)),
        (_residual, (2, 3, 32, 32)),
    ],
    ids=["chain", "convolutions", "flattened", "residual"],
)
@pytest.mark.parametrize("last_layer", [False, True])
def test_plain_loop_agrees_with_enorm(
    build: Callable[[], nn.Module], shape: tuple[int, ...], last_layer: bool
) -> None:
    ours = build().double()
    theirs = copy.deepcopy(ours)
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    optimizers = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        optimizers.append(with_state(model))
    inputs = torch.randn(shape, dtype=torch.float64)
    enorm_fx.ENorm(
        enorm_fx.analyze(ours, inputs),
        optimizers[0],
        last_layer=last_layer,
        start="as_is",
        backend="eager",
    ).step()
    plan = enorm_fx.analyze(theirs, inputs)
    PlainLoop(plan, optimizers[1], last_layer=last_layer).step()

    parameters = dict(theirs.named_parameters())
    moved = [name for name, old in before.items() if not torch.equal(ours.get_parameter(name), old)]
    assert len(moved) >= 3
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            optimizers[1].state[parameters[name]]["momentum_buffer"],
            optimizers[0].state[parameter]["momentum_buffer"],
            rtol=1e-9,
            atol=0,
        )


def test_plain_loop_counts_what_it_moves() -> None:
    model = _flattened()
    plan = enorm_fx.analyze(model, torch.zeros(2, 3, 8, 8))
    optimizer = with_state(model)
    weights = [3 * 6 * 9, 54 * 7, 7 * 6, 6 * 2]
    biases = [6, 7, 6]
    loop = PlainLoop(plan, optimizer, last_layer=True)
    assert loop.moved() == (sum(weights) + sum(biases), sum(weights))
    without_last = PlainLoop(plan, optimizer)
    assert without_last.moved() == (sum(weights[:3]) + sum(biases[:2]), sum(weights[:3]))


class _Recurrent(nn.Module):
    """The middle weight reads what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(h + self.again(h)))  # type: ignore[no-any-return]


def test_plain_loop_refuses_what_it_cannot_do() -> None:
    model = _Recurrent()
    plan = enorm_fx.analyze(model, torch.zeros(2, 3))
    assert plan.num_scales == 4
    with pytest.raises(ValueError, match="no closed form"):
        PlainLoop(plan, with_state(model), last_layer=True)


# ---- networks ----


def test_normalization_goes_between_a_layer_and_its_relu() -> None:
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)
    )
    plain, batch, group = (normalized(layers, norm) for norm in NORMS)
    assert list(plain) == list(layers)
    assert [type(layer) for layer in batch] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU,
        nn.Linear,
    ]  # fmt: skip
    norms = [layer for layer in group if isinstance(layer, nn.GroupNorm)]
    assert [(norm.num_groups, norm.num_channels) for norm in norms] == [(2, 8), (3, 12)]
    assert [group_norm(channels).num_groups for channels in (1, 64, 128, 320, 500)] == [
        1, 16, 32, 32, 25,
    ]  # fmt: skip


def test_the_networks_that_were_asked_for() -> None:
    known = networks()
    assert [*known][:6] == [
        "fully connected", "fully convolutional", "resnet18", "resnet50", "vgg16", "MLP 50 x 64",
    ]  # fmt: skip
    mlp = known["MLP 50 x 64"].build("none")
    linears = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == 50
    assert {layer.in_features for layer in linears} == {64}
    assert {known[name].own for name in ("resnet18", "resnet50")} == {"batch"}


@pytest.mark.parametrize("norm", NORMS)
def test_training_steps_do_not_drift(norm: str) -> None:
    setup = set_up(TINY["fully convolutional"], norm, CPU)
    before = [parameter.detach().clone() for parameter in setup.model.parameters()]
    setup.train_step()
    assert all(map(torch.equal, before, setup.model.parameters()))
    norms = {"none": (), "batch": (nn.BatchNorm2d,), "group": (nn.GroupNorm,)}
    found = {type(layer) for layer in setup.model.modules()}
    assert found & {nn.BatchNorm2d, nn.GroupNorm} == set(norms[norm])
    assert all(
        bool(setup.optimizer.state[parameter]["momentum_buffer"].abs().sum() > 0)
        for parameter in setup.model.parameters()
    )


# ---- the whole ----


def _tiny_convolutional(norm: str) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 4)]
    return normalized(nn.Sequential(*layers, *head), norm)


# Under the names of the networks that bars are set for.
TINY = {
    "fully convolutional": Network("fully convolutional", _tiny_convolutional, (2, 3, 8, 8), 4),
    "resnet50": Network("resnet50", _tiny_convolutional, (2, 3, 8, 8), 4),
    "MLP 50 x 64": Network("MLP 50 x 64", lambda norm: normalized(stack(8, 4), norm), (4, 8), 8),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a whole run on tiny networks."""
    out = tmp_path_factory.mktemp("speed") / "speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "networks", lambda: TINY)
        patch.setattr(speed, "bandwidths", lambda bench: {"scale": 1e9, "read": 2e9})
        sizes = lambda bench: speed_settings.size_costs(bench, (1_000_000,))  # noqa: E731
        patch.setattr(speed, "size_costs", sizes)
        arguments = ["--rounds", "2", "--visits", "2", "--backends", "eager", "--out", str(out)]
        assert speed.main(arguments) == 0
    return out


@pytest.fixture
def record(written: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return loaded


def test_record_has_every_section(record: dict[str, Any]) -> None:
    assert record["benchmark"] == "speed"
    assert {"cpu", "threads", "torch", "seed", "device"} <= set(record["environment"])
    assert set(speed.SECTIONS) <= set(record)
    assert record["rounds"] == 2
    for row in record["step"].values():
        assert set(row["contenders"]) == {"sgd", "eager", "loop", "flat"}
        assert set(row["ratios"]) == {"eager", "loop", "flat"}
        assert row["skipped"] == {}
        assert all(cost["rounds"] == 2 for cost in row["contenders"].values())
        assert row["contenders"]["eager"]["median"] == pytest.approx(
            row["ratios"]["eager"] * row["contenders"]["sgd"]["median"]
        )
    for row in record["training"].values():
        assert set(row["contenders"]) == {"train none", "train batch", "train group", "enorm"}
        assert set(row["adds"]) == {"batch", "group", "enorm"}
    for row in record["converge"].values():
        assert set(row["contenders"]) == {"sgd", "cycle", "cycle, eager", "converge"}
        medians = {name: cost["median"] for name, cost in row["contenders"].items()}
        assert row["ratios"]["converge"] == pytest.approx(medians["converge"] / medians["cycle"])
        assert row["over_sgd"]["cycle"] == pytest.approx(medians["cycle"] / medians["sgd"])
        assert row["cycles"] >= 1
        assert row["gap"] <= 1e-8
        assert row["skipped"] == {}
    cycles = record["cycles"]
    assert [*cycles["contenders"]] == ["eager 1", "eager 2", "eager 5", "eager 10"]
    assert cycles["ratios"]["eager 1"] == 1
    assert {"sequential", "simultaneous"} <= set(record["orders"]["contenders"])
    assert {row["family"] for row in record["sizes"]["rows"]} == {"wider", "deeper"}
    for row in record["sizes"]["rows"]:
        assert row["parameters"] == pytest.approx(1e6, rel=0.01)
        each = 1e9 * row["enorm"]["median"] / row["parameters"]
        assert row["enorm_ns_per_parameter"] == pytest.approx(each)
    assert record["build"]["backends"]["eager"]["rounds"] == 3


def test_the_floor_counts_bytes(record: dict[str, Any]) -> None:
    floor = record["step"]["MLP 50 x 64"]["floor"]
    # Three of four weights of 8 x 8 move, their momentum with them, in four bytes each.
    assert floor["moved"] == floor["measured"] == 3 * 64
    costs = record["step"]["MLP 50 x 64"]["contenders"]
    distance = costs["eager"]["median"] / costs["flat"]["median"]
    assert floor["bytes_reading_once"] == 4 * (4 * 3 * 64)
    assert floor["bytes_reading_twice"] == 4 * (5 * 3 * 64)
    assert floor["seconds_reading_once"] == pytest.approx(4 * (4 * 3 * 64) / 1e9)
    assert floor["seconds_reading_twice"] == pytest.approx(4 * (4.5 * 3 * 64) / 1e9)
    assert record["step"]["MLP 50 x 64"]["auto"] == "eager"
    assert floor["step_over_flat"] == pytest.approx(distance)


def test_no_path_of_this_machine(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert str(Path.home()) not in text
    assert "site-packages" not in text
    assert str(Path(speed.__file__).parent) not in text


def test_picture(written: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = written.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000


def test_what_is_not_there_is_left_out_with_the_reason() -> None:
    model = stack(8, 4)
    optimizer = with_state(model)
    plan = enorm_fx.analyze(model, torch.zeros(2, 8))
    skipped: dict[str, str] = {}
    assert try_enorm(plan, optimizer, skipped, "no such", backend="no such") is None
    assert skipped["no such"].startswith("ArgumentError: backend must be one of")
    assert try_enorm(plan, optimizer, skipped, "eager", backend="eager") is not None
    assert [*skipped] == ["no such"]
    assert reason(RuntimeError("first\n/home/someone/x.py")) == "RuntimeError: first"


def test_cuda_is_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "speed.json"
    assert speed.main(["--device", "cuda", "--out", str(out)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not out.exists()


# ---- bars and tables ----


def _row(auto: str, sgd: float, **contenders: float) -> dict[str, Any]:
    seconds = {"sgd": [sgd], **{name: [value] for name, value in contenders.items()}}
    return {
        "parameters": 2_500_000,
        "auto": auto,
        "contenders": {name: summary(values) for name, values in seconds.items()},
        "ratios": ratios(seconds, "sgd"),
    }


def test_bars() -> None:
    found = bars(
        {
            "step": {
                "resnet18": _row("native", 1e-3, native=1.1e-3, eager=5e-3, loop=6e-3),
                "vgg16": _row("native", 1e-3, native=2e-3, eager=5e-3, loop=6e-3),
            },
            "cycles": {"network": "conv", "ratios": {"native 1": 1.0, "native 10": 2.5}},
            "sizes": {
                "rows": [
                    {"family": "wider", "enorm_ns_per_parameter": 1.0},
                    {"family": "wider", "enorm_ns_per_parameter": 1.5},
                ]
            },
            "build": {"network": "resnet50", "backends": {"eager": {"median": 0.2}}},
        }
    )
    assert [(row["bar"], round(row["measured"], 3), row["met"]) for row in found] == [
        ("resnet18: step (native) / fused SGD", 1.1, True),
        ("resnet18: plain loop / step (native)", 5.455, True),
        ("resnet18: step (eager) / fused SGD", 5.0, False),
        ("vgg16: plain loop / step (native)", 3.0, False),
        ("conv: 10 cycles / 1 cycle (native)", 2.5, True),
        ("wider: largest / least cost per parameter", 1.5, False),
        ("resnet50: seconds to build the eager step", 0.2, True),
    ]
    assert bars({}) == []


def test_markdown() -> None:
    adds = {"enorm": 0.013, "batch": 0.2}
    table = markdown(
        {
            "step": {
                "resnet18": _row("native", 2e-3, native=2.2e-3, loop=6e-3, flat=1e-3),
                "vgg16": _row("native", 0.5, eager=2.0, loop=3.0, flat=0.4),
            },
            "training": {"resnet18": {"adds_share_of_base": adds}},
        }
    )
    assert table.splitlines() == [
        "|  | parameters | fused SGD step | ENorm, eager | ENorm, native | plain loop | floor "
        "| training step + ENorm | training step + BatchNorm | training step + GroupNorm |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| resnet18 | 2.5M | 2 ms |  | 1.10 | 3.00 | 0.50 | +1.3% | +20.0% |  |",
        "| vgg16 | 2.5M | 500 ms | 4.00 |  | 6.00 | 0.80 |  |  |  |",
    ]


def test_table_on_the_command_line(
    written: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert speed_table.main([str(written)]) == 0
    tables = [table.splitlines() for table in capsys.readouterr().out.split("\n\n")]
    assert len(tables) == 2
    for lines in tables:
        assert len(lines) == 2 + len(TINY)
        assert len({line.count("|") for line in lines}) == 1
    assert "`converge=True`" in tables[1][0]
    empty = tmp_path / "other.json"
    empty.write_text("{}", encoding="utf-8")
    assert speed_table.main([str(empty)]) == 2
    assert "no steps" in capsys.readouterr().err
    assert speed_table.main([str(tmp_path / "none.json")]) == 2


def test_the_median_visit_is_reported_and_all_are_kept(record: dict[str, Any]) -> None:
    visits = [{"auto": "native", "ratios": {"native": x}, "floor": x} for x in (3.0, 1.0, 2.0)]
    chosen = median_visit(visits)
    assert chosen["floor"] == 2.0
    assert [visit["native"] for visit in chosen["visits"]] == [3.0, 1.0, 2.0]
    assert all(len(row["visits"]) == 2 for row in record["step"].values())


def test_medians_of_ratios_come_from_one_run(record: dict[str, Any]) -> None:
    for row in record["training"].values():
        base = row["contenders"][f"train {row['base']}"]["median"]
        for name, share in row["adds_share_of_base"].items():
            assert share == pytest.approx(row["adds"][name] / base)

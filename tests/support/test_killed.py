"""The helper really kills, at each stage once, and limits what is written."""

from __future__ import annotations

from pathlib import Path

from tests.support.killed import killed_at_every_stage, killed_at_random, with_room_for


def test_every_stage_is_met_once(tmp_path: Path) -> None:
    def write_and_rename() -> None:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")

    found = []
    for stage in killed_at_every_stage(write_and_rename, tmp_path):
        found.append((stage, sorted(p.name for p in tmp_path.iterdir())))
    assert found == [("open a", []), ("os.rename a", ["a"])]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_it_is_killed_at_different_moments(tmp_path: Path) -> None:
    def count() -> None:
        with (tmp_path / "count").open("ab", buffering=0) as file:
            while True:
                file.write(b"x")

    found = []
    for delay in killed_at_random(count, 0.1, times=4, seed=0):
        found.append((delay, (tmp_path / "count").exists()))
        (tmp_path / "count").unlink(missing_ok=True)
    assert len({delay for delay, _ in found}) == 4
    assert any(started for _, started in found)


def test_no_file_grows_beyond_the_room(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "a").write_bytes(bytes(100))

    assert with_room_for(100, write) == 0
    assert with_room_for(50, write) == 1

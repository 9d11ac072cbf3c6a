"""Build folders: found again by content, never by a build that did not end, swept when their owner is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from specgen_engine.evaluation.buildcache import (
    NOTE,
    BuildFolder,
    PreparedFolder,
    forget_builds,
    remember_hang,
    remembered_hang,
    sweep,
)


def test_a_complete_build_is_found_again_where_it_was_made(tmp_path: Path) -> None:
    prepared = PreparedFolder(tmp_path)
    with BuildFolder(tmp_path, "k", lambda: prepared) as build:
        assert not build.hit
        assert build.path == prepared.path
        (build.path / "torch" / "module.so").touch()
        build.keep()
    with BuildFolder(tmp_path, "k", lambda: pytest_fail()) as again:
        assert again.hit
        assert (again.path / "torch" / "module.so").exists()


def a_library(folder: Path) -> Path:
    library = folder / "torch" / "library"
    library.mkdir()
    (library / NOTE).write_text("what it is from")
    (library / "library.so").write_text("code")
    (library / "main.o").write_text("much")
    os.utime(library / "library.so", (1_000_000, 1_000_000))
    return library


def test_a_library_is_copied_to_where_a_waiting_process_may_write(tmp_path: Path) -> None:
    with BuildFolder(tmp_path, "k") as build:
        a_library(build.path)
        build.keep()
    waiting = PreparedFolder(tmp_path)
    with BuildFolder(tmp_path, "k", lambda: waiting) as again:
        assert (again.hit, again.moved, again.path) == (True, True, waiting.path)
        found = {path.name: path for path in (again.path / "torch" / "library").iterdir()}
        assert set(found) == {NOTE, "library.so"}
        assert found["library.so"].stat().st_mtime == 1_000_000
        again.keep()
    assert not waiting.path.exists()
    with BuildFolder(tmp_path, "k") as third:
        assert (third.hit, third.moved, third.path) == (True, False, build.path)


OTHERWISE = {
    "no note": lambda library: (library / NOTE).unlink(),
    "a second library without one": lambda library: (library.parent / "other").mkdir(),
    "a link to what is not its own": lambda library: (library / "key").symlink_to("/etc/hostname"),
    "a folder elsewhere": lambda library: (library.parent / "other").symlink_to(library),
    "a pipe": lambda library: os.mkfifo(library / "pipe"),
    "a folder in it": lambda library: (library / "folder").mkdir(),
    "too much": lambda library: os.truncate(library / "library.so", 65 << 20),
    "too many": lambda library: [(library / str(number)).touch() for number in range(64)],
    "Triton's files, which name their folder": lambda library: (library.parents[1] / "triton" / "x").touch(),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_anything_else_stays_where_it_was_built(tmp_path: Path, name: str) -> None:
    with BuildFolder(tmp_path, "k") as build:
        OTHERWISE[name](a_library(build.path))
        build.keep()
    with BuildFolder(tmp_path, "k", lambda: pytest_fail()) as again:
        assert (again.hit, again.moved, again.path) == (True, False, build.path)


def test_without_a_waiting_process_a_library_stays_too(tmp_path: Path) -> None:
    with BuildFolder(tmp_path, "k") as build:
        a_library(build.path)
        build.keep()
    with BuildFolder(tmp_path, "k", lambda: None) as again:
        assert (again.hit, again.moved, again.path) == (True, False, build.path)


def pytest_fail() -> None:
    raise AssertionError("a complete build needs no prepared folder")


def test_a_build_that_did_not_end_is_gone(tmp_path: Path) -> None:
    with BuildFolder(tmp_path, "k") as build:
        (build.path / "torch" / "lock").touch()
    assert not build.path.exists()
    with BuildFolder(tmp_path, "k") as again:
        assert not again.hit
        assert list((again.path / "torch").iterdir()) == []


def test_two_builds_of_one_candidate_at_a_time(tmp_path: Path) -> None:
    with BuildFolder(tmp_path, "k") as first, BuildFolder(tmp_path, "k") as second:
        assert first.path != second.path
        second.keep()
    with BuildFolder(tmp_path, "k") as third:
        assert not third.hit  # the second was nobody's to keep, the first was never complete


def test_forgetting_builds_leaves_the_folder_that_a_waiting_worker_prepared(tmp_path: Path) -> None:
    with BuildFolder(tmp_path, "done") as build:
        build.keep()
    remember_hang(tmp_path, "task", "stuck", "a loop")
    waiting = PreparedFolder(tmp_path)
    assert forget_builds(tmp_path) == 1
    assert remembered_hang(tmp_path, "task", "stuck") is None
    assert sorted(tmp_path.glob("build-*")) == [waiting.path]
    with BuildFolder(tmp_path, "done", prepared=lambda: waiting) as build:
        assert not build.hit
        assert build.path == waiting.path
        assert build.path.is_dir()


def test_sweep_removes_only_what_nobody_owns(tmp_path: Path) -> None:
    with BuildFolder(tmp_path, "k") as build:
        build.keep()
    held = PreparedFolder(tmp_path)
    orphan = PreparedFolder(tmp_path)
    os.close(orphan._lock)
    for folder in (build.path, held.path, orphan.path):
        os.utime(folder, (time.time() - 3600,) * 2)
    assert sweep(tmp_path) == 1
    assert [folder.exists() for folder in (build.path, held.path, orphan.path)] == [True, True, False]


def test_a_hang_is_forgotten_after_a_day(tmp_path: Path) -> None:
    remember_hang(tmp_path, "task", "candidate", "timing took more than 30 s")
    assert remembered_hang(tmp_path, "task", "candidate") == "timing took more than 30 s"
    assert remembered_hang(tmp_path, "other", "candidate") is None
    os.utime(tmp_path / "candidate-task.hang", (time.time() - 90_000,) * 2)
    assert remembered_hang(tmp_path, "task", "candidate") is None

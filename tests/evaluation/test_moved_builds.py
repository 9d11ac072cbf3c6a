"""A candidate whose library was built before is taken on by the process that waits, with the library moved to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine.evaluation.base import Candidate
from specgen_engine.evaluation.limits import EvaluationLimits
from specgen_engine.evaluation.worker import Worker


@pytest.mark.parametrize(("hit", "moved", "taken"), [(False, False, True), (True, True, True), (True, False, False)])
def test_the_spare_takes_what_lies_where_it_may_write(tmp_path: Path, hit: bool, moved: bool, taken: bool) -> None:
    worker: Any = object.__new__(Worker)
    spare, fresh = (SimpleNamespace(ended=False, scratch=tmp_path, warm=True) for _ in range(2))
    worker.spare, worker.spare_build, worker.guards_off, worker.limits = spare, None, frozenset(), EvaluationLimits()
    worker.ask = lambda *_: None
    worker._fork_waiting = lambda path: fresh
    build: Any = SimpleNamespace(hit=hit, moved=moved, path=tmp_path)
    child = worker.start_candidate(Candidate("x = 1"), (), build)
    assert child is (spare if taken else fresh)
    assert (worker.spare is None) == taken

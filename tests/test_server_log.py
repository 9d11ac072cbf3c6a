from __future__ import annotations

from tests.server_log import traceback_in

FROZE = "[2026-01-02 03:04:05] post-warmup freeze_gc failed\nTraceback (most recent call last):\n  File a\nE: refused\n"
UP = "[2026-01-02 03:04:05] The server is fired up\n"


def test_only_sglangs_own_known_traceback_is_passed_over() -> None:
    assert traceback_in(UP + FROZE + UP) == ""
    assert traceback_in(FROZE) == ""
    assert traceback_in(UP + FROZE + UP + "Traceback x\n") == "Traceback x\n"
    assert traceback_in("[2026-01-02 03:04:05] other failed\nTraceback y").startswith("Traceback y")

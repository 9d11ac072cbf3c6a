"""bench.kv_transfer and its companions, rehearsed in shared memory; on a machine without GPUs one clear error."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path

import pytest

from bench import kv_failures, kv_headline, kv_links, kv_plot, kv_sanitize, kv_transfer
from bench.kv_methods import address_lists
from bench.kv_rig import LenderProcess, Rig, Tables
from bench.kv_shapes import MODEL_SHAPES, Shape, mla, qwen3_8b
from bench.machine import new_report, write_report
from specgen_engine.kv.native import _kv

ROW_FIELDS = {
    "method",
    "direction",
    "shape",
    "chunk_bytes",
    "pages",
    "sms",
    "gbps",
    "us",
    "p50_us",
    "p99_us",
    "verified",
    "decode_slowdown",
}
without_gpus = pytest.mark.skipif(
    _kv.HAS_CUDA and _kv.device_count() >= 2, reason="this machine has 2 GPUs: the commands would run"
)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("kv") / "report.json"
    status = kv_transfer.main(["--backend", "loopback", "--quick", "--only", "single", "--json", str(target)])
    assert status == 0
    return target


def test_rehearsed_report_has_the_schema_and_every_measured_row_is_verified(rehearsal: Path) -> None:
    report = json.loads(rehearsal.read_text())
    assert report["schema"] == "specgen.kv_transfer/1"
    assert {"machine", "command", "commit", "seed", "ceiling", "rows"} <= report.keys()
    assert report["command"].startswith("python -m bench.kv_transfer")
    measured = [row for row in report["rows"] if row["gbps"]]
    assert {(row["method"], row["direction"]) for row in measured} >= {
        ("ours-auto", "push"),
        ("ours-auto", "pull"),
        ("ours-auto", "both"),
    }
    for row in report["rows"]:
        assert row.keys() >= ROW_FIELDS
        assert row["verified"] is True if row["gbps"] else row["skipped"]


def test_peer_libraries_have_rows_that_move_pages_or_say_why_not(rehearsal: Path) -> None:
    rows = [row for row in json.loads(rehearsal.read_text())["rows"] if row["method"] in ("nixl", "mooncake")]
    assert {(row["method"], row["direction"]) for row in rows} == set(
        itertools.product(("nixl", "mooncake"), ("push", "pull"))
    )
    for row in rows:
        assert row["clock"] == "host"
        assert row["verified"] if row["gbps"] else "isn't installed" in row["skipped"]


def test_a_peers_page_lists_name_the_bytes_that_ours_move(tmp_path: Path) -> None:
    for layout in ("page_first", "layer_first"):
        with LenderProcess("loopback", 1, 2, 4) as lender:
            rig = Rig("cpu", lender, 2, Shape("mixed", (1024, 528), layout), 1 << 20, seed=5)
            tables = rig.tables(300)

            def copy(given: Tables, rig: Rig = rig) -> None:
                for target, source, size in zip(*address_lists(rig, "push", given, rig.base), strict=True):
                    ctypes.memmove(int(target), int(source), int(size))

            assert rig.verify_push(copy, tables, tagged=False)
            rig.close()


def test_the_fewest_sms_for_a_share_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"method": "ours-auto", "shape": "sweep", "chunk_bytes": 2048, "bytes": 1 << 30, "direction": "push"}
    rows = [row | {"sms": sms, "gbps": 1.0, "of_ceiling": share} for sms, share in ((4, 0.4), (12, 0.86), (16, 0.93))]
    kv_headline.print_fewest_sms(rows)
    assert "70 %: 12, 80 %: 12, 85 %: 12, 90 %: 16, 92 %: 16, 95 %: none" in capsys.readouterr().out


def test_wrong_bytes_are_noticed(rehearsal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import kv_methods

    def moves_one_page_less(rig: object, way: object, tables: kv_methods.Tables) -> None:
        honest(rig, way, kv_methods.Tables(*(column[1:] for column in tables)))

    honest = kv_methods._loopback
    monkeypatch.setattr(kv_methods, "_loopback", moves_one_page_less)
    target = tmp_path / "report.json"
    assert kv_transfer.main(["--backend", "loopback", "--quick", "--only", "single", "--json", str(target)]) == 1
    rows = [row for row in json.loads(target.read_text())["rows"] if row["method"] == "ours-auto"]
    assert not any(row["verified"] for row in rows)


def test_report_can_be_drawn_and_judged_later(
    rehearsal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curves.png"
    assert kv_transfer.main(["--plot-from", str(rehearsal), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert kv_plot.plot_report([tmp_path / "none.json"], picture) == 2
    assert kv_headline.main([str(rehearsal)]) == 0
    assert "64 x 32 KiB push ours-auto" in capsys.readouterr().out


@without_gpus
def test_without_gpus_each_command_says_so_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.json"
    assert kv_transfer.main(["--json", str(target)]) == 2
    assert kv_failures.main(["--json", str(target)]) == 2
    assert kv_sanitize.main([]) == 2
    assert kv_links.main(["--json", str(target)]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 4
    assert not target.exists()


@pytest.mark.parametrize("arguments", [[], ["--plot-from", "x"], ["--backend", "tape", "--json", "f"]])
def test_options_that_make_no_sense_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        kv_transfer.main(arguments)
    assert caught.value.code == 2


def test_failures_are_survived_in_shared_memory(tmp_path: Path) -> None:
    target = tmp_path / "failures.json"
    assert kv_failures.main(["--backend", "loopback", "--json", str(target)]) == 0
    assert [scenario["ok"] for scenario in json.loads(target.read_text())["scenarios"]] == [True, True]


def test_shapes_are_the_models() -> None:
    assert qwen3_8b(1).page_bytes == 147_456  # bytes a token
    assert mla("deepseek", 61, 1).page_bytes == 61 * 576 * 2
    assert mla("deepseek", 61, 64).page_bytes == 61 * 64 * (1152 + 132)
    assert all(size % 16 == 0 for shape in MODEL_SHAPES for size in shape.planes)


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_report(target, new_report("specgen.test/1", 3))
    before = target.read_text()
    with pytest.raises(ValueError):
        write_report(target, {"x": float("nan")})
    assert target.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

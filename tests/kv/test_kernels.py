"""Every kernel compiles for Hopper, without spills; the launch shapes chosen for them fit the chip."""

from __future__ import annotations

import itertools
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specgen_engine.kv import toolchain
from specgen_engine.kv.base import KvError
from specgen_engine.kv.cuda import CudaBackend
from specgen_engine.kv.native import _kv

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "kernels").glob("*.cu"))
SHARED_LIMIT = 227 * 1024


def compile_kernel(source: Path, target: Path) -> str:
    tools = toolchain.find_toolchain()
    command = toolchain.compile_command(tools, source, target, "-Xptxas", "-v,-warn-spills,-warn-lmem-usage")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.stderr[-2000:]}\n{toolchain.explain_failure(done.stderr)}"
    return done.stderr


def test_there_are_kernels() -> None:
    assert [path.name for path in KERNELS] == ["page_copy.cu"]


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernel_compiles_for_sm_90a_without_spills(source: Path, tmp_path: Path) -> None:
    said = compile_kernel(source, tmp_path / "kernel.o")
    functions = re.findall(r"Compiling entry function '(\S+)' for 'sm_90a'", said)
    assert len(functions) == 3, said
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        == [("0", "0", "0")] * 3
    )


def test_the_check_notices_a_spill(tmp_path: Path) -> None:
    body = "".join(f"float a{i} = x[i * {i + 1}];" for i in range(40))
    used = "".join(f"x[{i}] = a{i};" for i in range(40))
    source = tmp_path / "spill.cu"
    source.write_text(
        f"__global__ __launch_bounds__(1024, 2) void spill(float* x, int i) {{ {body} __syncthreads(); {used} }}"
    )
    said = compile_kernel(source, tmp_path / "spill.o")
    assert re.search(r"[1-9]\d* bytes spill stores", said)


def test_nvcc_is_taken_from_its_package_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECGEN_NVCC", raising=False)
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")
    found = toolchain.find_nvcc()
    assert found is not None
    assert found.parts[-4:] == ("nvidia", "cu13", "bin", "nvcc")


def test_a_named_nvcc_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECGEN_NVCC", "/nonexistent/nvcc")
    with pytest.raises(toolchain.ToolchainError, match="SPECGEN_NVCC='/nonexistent/nvcc' is no file"):
        toolchain.find_nvcc()


def test_packages_that_do_not_fit_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_package_file", lambda package, relative: Path("/p/nvcc"))
    monkeypatch.setattr(
        metadata, "version", lambda name: {"nvidia-cuda-nvcc": "13.0.88", "nvidia-nvvm": "13.5.37"}[name]
    )
    said = toolchain.package_mismatch(Path("/p/nvcc"))
    assert said is not None
    assert "pip install 'nvidia-nvvm==13.0.*'" in said


@given(
    slot=st.integers(1, 512).map(lambda n: n * 16),
    total=st.integers(1, 1 << 34),
    direction=st.sampled_from([_kv.Direction.EXPORT, _kv.Direction.IMPORT]),
    sms=st.integers(1, 132),
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_chosen_shapes_are_ones_the_kernels_take(slot: int, total: int, direction: _kv.Direction, sms: int) -> None:
    config = _kv.select_copy_config(slot, total, direction, sms)
    _kv.check_copy_config(config, slot)
    assert 1 <= config.sms <= sms
    assert config.shared_bytes <= SHARED_LIMIT
    assert (config.method == "vector") == (slot < 512)


@pytest.mark.parametrize(
    ("direction", "sms", "mib", "tiles"),
    [
        ("EXPORT", 16, 256, 8),
        ("EXPORT", 16, 1024, 16),
        ("EXPORT", 16, 16, 1),  # too few bytes a warp for two tiles
        ("EXPORT", 12, 1024, 16),
        ("EXPORT", 8, 1024, 1),
        ("EXPORT", 132, 1024, 3),
        ("IMPORT", 4, 1024, 1),
        ("IMPORT", 16, 256, 1),
        ("IMPORT", 16, 1024, 1),
        ("IMPORT", 132, 1024, 1),
    ],
)
@pytest.mark.parametrize("slot", [1024, 2048])
def test_only_a_push_by_sms_that_fill_the_link_takes_tiles_in_turn(
    slot: int, direction: str, sms: int, mib: int, tiles: int
) -> None:
    config = _kv.select_copy_config(slot, mib << 20, getattr(_kv.Direction, direction), sms)
    assert config.tiles_per_warp == tiles


@given(
    pages=st.integers(1, 3000),
    per_page=st.integers(1, 200),
    workers=st.integers(1, 528),
    per_worker=st.integers(1, 16),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_tiles_cover_every_segment_once_and_end_each_page_once(
    pages: int, per_page: int, workers: int, per_worker: int
) -> None:
    tiles = _kv.plan_tiles(pages, per_page, workers, per_worker)
    assert len(tiles) == workers * per_worker
    assert tiles[0][0] == 0
    assert tiles[-1][1] == pages * per_page
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(tiles))
    filled = [(begin, end) for begin, end in tiles if begin < end]
    whole = sum(max(0, end // per_page - -(-begin // per_page)) for begin, end in filled)
    # As the last block counts them: a tile that starts inside a page and holds its end.
    cut = sum(1 for begin, end in filled if begin % per_page and end >= (begin // per_page + 1) * per_page)
    assert whole + cut == pages


@given(
    pages=st.lists(st.integers(0, 60), max_size=80),
    per_chunk=st.integers(1, 20),
    piece=st.integers(1, 9),
    most_runs=st.integers(0, 30),
)
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
def test_a_staging_plan_has_every_page_once_and_runs_the_copy_engine_can_move(
    pages: list[int], per_chunk: int, piece: int, most_runs: int
) -> None:
    order, runs, packed = _kv.plan_staging(np.array(pages, np.int64), per_chunk, piece, most_runs)
    assert sorted(order.tolist()) == list(range(len(pages)))
    assert sum(count for _, count in runs) == packed <= len(pages)
    assert len(runs) <= most_runs + packed // piece  # a run cut at a piece's end counts twice
    at = 0
    for first, count in runs:
        assert first == at
        assert first // piece == (first + count - 1) // piece
        listed = [pages[position] for position in order[first : first + count].tolist()]
        assert listed == list(range(listed[0], listed[0] + count))
        assert listed[0] // per_chunk == listed[-1] // per_chunk
        at += count
    packed_pages = [pages[position] for position in order[:packed].tolist()]
    assert len(set(packed_pages)) == packed  # a repeated page goes directly
    if most_runs >= len(pages):
        assert set(packed_pages) == set(pages)


def test_a_staging_plan_packs_the_longest_runs() -> None:
    order, runs, packed = _kv.plan_staging(np.array([9, 1, 2, 3, 5, 6, 20]), 100, 50, 2)
    assert packed == 5
    assert {tuple(order[first : first + count].tolist()) for first, count in runs} == {(1, 2, 3), (4, 5)}
    assert order[packed:].tolist() == [0, 6]


@pytest.mark.parametrize(
    ("mib", "fits", "paced", "path"),
    [
        (1024, True, False, "STAGED"),
        (63, True, False, "DIRECT"),
        (1024, False, False, "DIRECT"),
        (1024, True, True, "DIRECT"),
    ],
)
def test_only_large_unpaced_copies_of_pages_that_fit_are_staged(mib: int, fits: bool, paced: bool, path: str) -> None:
    assert _kv.select_copy_path(mib << 20, fits, paced) == getattr(_kv.CopyPath, path)


def test_equal_shares_differ_little_and_the_last_tiles_are_fine() -> None:
    shares = [end - begin for begin, end in _kv.plan_tiles(1000, 72, 64, 1)]
    assert max(shares) - min(shares) <= 1
    tiles = [end - begin for begin, end in _kv.plan_tiles(7281, 72, 64, 16)]
    assert max(tiles[-64:]) * 5 < min(tiles[:64])


@pytest.mark.parametrize(
    ("given_config", "message"),
    [
        (("warp", 16, 4, 4, 8192), "method=warp"),
        (("bulk", 0, 4, 4, 8192), "sms=0"),
        (("bulk", 16, 9, 4, 8192), "warps=9"),
        (("bulk", 16, 4, 2, 8192), "stages=2"),
        (("bulk", 16, 4, 4, 1024), "stage_bytes=1024"),
        (("bulk", 16, 8, 8, 8192), "exceeds a block's shared memory"),
        (("bulk", 16, 1, 33, 4096), "stages=33"),
        (("bulk", 16, 8, 17, 2048), "warps x stages=136"),
        (("bulk", 16, 4, 4, 8192, 0), "tiles_per_warp=0"),
        (("bulk", 16, 4, 4, 8192, 1, -1.0), "max_gbps=-1"),
        (("vector", 16, 4, 0, 0, 1, float("inf")), "max_gbps=inf"),
    ],
)
def test_impossible_shapes_are_refused(given_config: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _kv.check_copy_config(_kv.CopyConfig(*given_config), 2048)


@pytest.mark.parametrize(
    ("plane", "message"),
    [((8, 64, 64), "base=8"), ((16, 64, 60), "bytes=60"), ((16, 32, 64), "stride=32"), ((16, 64, 0), "bytes=0")],
)
def test_planes_that_vectors_cannot_move_are_refused(plane: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"plane 0: {message}.*multiple of 16"):
        _kv.plan_page_layout([_kv.Plane(*plane)], _kv.ArenaLayout.PAGE_FIRST, 1 << 21)


def test_a_page_larger_than_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no page of 4096 bytes"):
        _kv.plan_page_layout([_kv.Plane(16, 4096, 4096)], _kv.ArenaLayout.PAGE_FIRST, 4096)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(KvError, match=r"device=99|built without CUDA"):
        CudaBackend(99)

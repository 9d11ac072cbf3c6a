"""What can't be had is refused at start, in one line that names the flag and what fits."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tests.tier.support  # noqa: F401  (skipped where that is)
from specgen_engine.cli import app
from specgen_engine.config import KvConfig, SpecGenConfig
from specgen_engine.kv.lender import Lender
from specgen_engine.kv.loopback import LoopbackBackend
from specgen_engine.tier.base import TierError, page_shape, plane_of, register_pool
from specgen_engine.tier.hooks import prepare_arguments, radix_cache
from specgen_engine.tier.lend import lend, parse_bytes, plan_offer

MIB = 1 << 20


def pool(name: str = "MHATokenToKVPool", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Looks like a device pool of that class."""
    buffer = torch.zeros(64, 2, 8, dtype=dtype)
    fields = {"store_dtype": dtype, "kv_cache_layout": "nhd", "k_buffer": [buffer], "v_buffer": [buffer.clone()]}
    return type(name, (), {**fields, **more})()


@pytest.mark.parametrize(
    ("device_pool", "page_size", "says"),
    [
        (pool("DeepSeekV4TokenToKVPool"), 64, "DeepSeekV4TokenToKVPool is not supported: the tier serves"),
        (pool(), 8, "--page-size 8: the remote KV tier serves 1, 16, 32, 64"),
        (pool(dtype=torch.int32), 16, "--kv-cache-dtype: int32 is not served"),
        (pool(kv_cache_layout="hnd"), 16, "KV layout hnd is not supported"),
        (pool(k_buffer=[torch.zeros(8, 64, 2).transpose(0, 1)]), 16, "not contiguous"),
    ],
)
def test_a_pool_that_does_not_fit(device_pool: Any, page_size: int, says: str) -> None:
    with pytest.raises(TierError, match=says):
        page_shape(device_pool, page_size)


def test_a_page_that_is_no_multiple_of_16_bytes() -> None:
    with pytest.raises(TierError, match="a page of 24 bytes a layer is no multiple of 16: use a larger --page-size"):
        plane_of(torch.zeros(64, 6), 1)


def test_another_pool_can_be_registered() -> None:
    with pytest.raises(TierError):
        page_shape(pool("PoolOfAnotherModel"), 16)
    register_pool("PoolOfAnotherModel", lambda one, size: page_shape(pool(), size))
    assert page_shape(pool("PoolOfAnotherModel"), 16).page_bytes == 2 * 16 * 64


@pytest.mark.parametrize(("text", "value"), [("auto", None), ("24GiB", 24 << 30), ("500MB", 500_000_000), ("77", 77)])
def test_sizes(text: str, value: int | None) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "-1GiB", "0", "4 apples", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(TierError, match="--specgen-kv-lend"):
        parse_bytes(text)


def test_an_offer_beyond_what_is_free_names_what_fits() -> None:
    assert plan_offer(640 * MIB, 1 << 30, 64 * MIB).chunks == 10
    with pytest.raises(TierError, match=r"1.00 GiB free; what fits is 1 to 16 chunks of 64 MiB, 1073741824 bytes"):
        plan_offer(2 << 30, 1 << 30, 64 * MIB)
    assert plan_offer(None, 6 << 30, 64 * MIB, reserve=4 << 30).chunks == 32
    with pytest.raises(TierError, match="4 of them kept for evaluations"):
        plan_offer(None, 3 << 30, 64 * MIB, reserve=4 << 30)


def arguments(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"enable_hierarchical_cache": False, "device": None, **given})


def settings(folder: Path, **kv: Any) -> SpecGenConfig:
    return SpecGenConfig(kv=KvConfig(directory=folder, chunk_mib=1, **kv))


@pytest.mark.parametrize(
    ("given", "kv", "says"),
    [
        ({}, {"tier": "loopback"}, "no usable lender in .*specgen lend.*--specgen-kv-fallback host or off"),
        ({"device": "cpu"}, {"tier": "peer"}, "peer needs a GPU, and this server runs on the CPU: use loopback"),
        ({"hicache_storage_backend": "mooncake"}, {"tier": "loopback"}, "mooncake reads the host pool.*use file"),
        ({"hicache_write_policy": "write_back"}, {"tier": "loopback"}, "write_back .*: use write_through"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(
    tmp_path: Path, given: dict[str, Any], kv: dict[str, Any], says: str
) -> None:
    with pytest.raises(TierError, match=says):
        prepare_arguments(arguments(**given), settings(tmp_path, **kv))


def test_a_lender_of_another_chunk_size_is_named_as_the_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    lender = Lender(tmp_path, "big", LoopbackBackend(), 2 * MIB, 4)
    try:
        with pytest.raises(TierError, match="big: chunk_bytes=1048576: this lender has 2097152"):
            prepare_arguments(arguments(), settings(tmp_path, tier="loopback"))
    finally:
        lender.close()


def test_a_usable_lender_switches_hicache_on_and_keeps_its_memory(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    lender = Lender(tmp_path, "right", LoopbackBackend(), MIB, 4)
    try:
        args = arguments()
        assert prepare_arguments(args, settings(tmp_path, tier="loopback")).kv.tier == "loopback"
        assert args.enable_hierarchical_cache
        assert lender.counts().free == 4
        assert lender.epochs() == {}
    finally:
        lender.close()


@pytest.mark.parametrize(("fallback", "hierarchical"), [("host", True), ("off", False)])
def test_a_fallback_is_taken_and_said(
    tmp_path: Path, fallback: str, hierarchical: bool, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments()
    found = prepare_arguments(args, settings(tmp_path, tier="loopback", fallback=fallback))
    assert found.kv.tier == fallback
    assert args.enable_hierarchical_cache is hierarchical
    assert f"falling back to {fallback}" in caplog.text


def test_without_a_remote_tier_the_radix_cache_is_sglangs_own() -> None:
    context = SimpleNamespace(server_args=SimpleNamespace(specgen=SpecGenConfig()))
    assert radix_cache(lambda ctx: ("own", ctx), context) == ("own", context)


def test_the_lend_command_says_it_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "specgen_engine", "lend", "--backend", "loopback", "--directory", str(tmp_path)]
    done = subprocess.run(
        [*command, "--specgen-kv-lend", "9000000GiB"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "what fits is 1 to" in line


@pytest.mark.parametrize(
    ("directory", "name", "says"),
    [
        ("file", "", "--directory .*file: is no folder"),
        ("file/deeper", "", "--directory .*deeper: Not a directory"),
        ("open", "", "--directory: .*mode 755: it must be yours, mode 700"),
        ("new", "../x", r"--name \.\./x: .* without / "),
        ("new", ".x", r"--name \.x: "),
        ("new", "x" * 200, "--directory, --name: socket path .* use a shorter one"),
    ],
)
def test_the_lend_command_names_the_option_that_is_wrong(tmp_path: Path, directory: str, name: str, says: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(TierError, match=says):
        lend("64MiB", 0, "loopback", tmp_path / directory, name=name)
    assert list(tmp_path.rglob("*.sock")) == []


def test_the_lend_command_names_the_backends_there_are() -> None:
    result = CliRunner().invoke(app, ["lend", "--specgen-kv-lend", "auto", "--backend", "nope"])
    assert result.exit_code == 2
    assert "'nope' is not one of 'cuda', 'loopback'" in " ".join(result.output.replace("│", " ").split())

"""A draft's KV in the target's pages: SGLang's own pools of both, out and back, byte for byte; what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specgen_engine.tier.base import page_shape
from specgen_engine.tier.drafts import kept_beside, remember
from specgen_engine.tier.probe import buffers_of, probe
from tests.tier import support

DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda:0", id="cuda", marks=pytest.mark.gpu(count=2))]
PAGES = [5, 1, 6, 3, 2]


def draft_pool(page_size: int, device: str = "cpu", tokens: int = 512) -> Any:
    """One layer with other heads than the target's."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(
        size=tokens, page_size=page_size, dtype=torch.bfloat16, layer_num=1, device=device,
        enable_memory_saver=False, head_num=1, head_dim=32,
    )  # fmt: skip


def worker_with(draft: Any) -> Any:
    worker = SimpleNamespace()
    remember(worker, draft)
    return worker


def rows(pools: list[Any], page_size: int, page: int) -> list[torch.Tensor]:
    return [
        buffer[page * page_size : (page + 1) * page_size].view(torch.uint8).clone().cpu()
        for pool in pools
        for buffer in buffers_of(pool)
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_what_the_draft_attends_to_comes_back_with_the_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, page_size: int, device: str
) -> None:
    draft = draft_pool(page_size, device)
    monkeypatch.setattr(
        support, "page_shape", lambda pool, size: kept_beside(page_shape(pool, size), pool, worker_with(draft)).shape
    )
    with support.tier(tmp_path, kind, page_size, torch.bfloat16, device) as one:
        pools = [one.device, draft]
        assert one.pool.layer_num == 3
        assert probe(one.device, one.pool.shape, one.arena, draft).pages >= 1
        for seed, pool in enumerate(pools):
            support.fill(pool, seed)
        wanted = [rows(pools, page_size, page) for page in PAGES]
        indices = one.write(PAGES)
        for buffer in [buffer for pool in pools for buffer in buffers_of(pool)]:
            buffer.zero_()
        assert one.read(indices, PAGES[::-1]) == len(PAGES)
        for page, expected in zip(PAGES[::-1], wanted, strict=True):
            found = rows(pools, page_size, page)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(int(row.sum()) == 0 for row in rows(pools, page_size, 7))
        one.pool.free(indices)
        assert one.pool.check_integrity()["used"] == 0


def test_a_draft_comes_with_the_targets_last_layer() -> None:
    target, draft = support.device_pool("mha", 16, torch.bfloat16), draft_pool(16)
    alone = page_shape(target, 16)
    kept = kept_beside(alone, target, worker_with(draft))
    assert (kept.draft, kept.layers) == (draft, 1)
    assert kept.shape.layers == alone.layers == 3
    assert [kept.shape.span(range(layer, layer + 1)) for layer in range(3)] == [(0, 2), (2, 2), (4, 4)]
    assert kept.shape.span(range(3)) == (0, 8)
    assert kept.shape.page_bytes == alone.page_bytes + 16 * 2 * 32 * 2


def test_a_draft_that_does_not_fit_is_left_out_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    target = support.device_pool("mha", 16, torch.bfloat16)
    alone = page_shape(target, 16)
    other = SimpleNamespace(size=512, store_dtype=torch.bfloat16)
    for draft, why in ((draft_pool(16, tokens=256), "256 tokens, the target's 512"), (other, "SimpleNamespace")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert kept_beside(alone, target, worker_with(draft)) == (alone, None, 0)
        assert why in caplog.text
    caplog.clear()
    assert kept_beside(alone, target, SimpleNamespace()) == (alone, None, 0)
    assert not caplog.records


@pytest.mark.parametrize("controller", ["TierController", "TierHybridController"])
def test_a_write_waits_for_the_forward_that_may_compute_its_newest_token(
    monkeypatch: pytest.MonkeyPatch, controller: str
) -> None:
    from specgen_engine.tier import cache, unified

    kind = getattr(cache, controller, None) or getattr(unified, controller)
    steps: list[Any] = []
    (sglangs,) = (base for base in kind.__bases__ if hasattr(base, "start_loading"))
    monkeypatch.setattr(sglangs, "start_writing", lambda self: steps.append("writes"))
    one = kind.__new__(kind)
    one.write_stream, one.forward_stream = SimpleNamespace(wait_stream=steps.append), "forward"
    one.write_queue = []
    one.start_writing()
    one.write_queue = ["operation"]
    one.start_writing()
    assert steps == ["writes", "forward", "writes"]

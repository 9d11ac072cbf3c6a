"""DeepSeek-V4's MTP layer beside the tier: its window keys are in the target's window pages, on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from specgen_engine.tier.drafts import REMEMBERED
from tests.models import dsv4_support as v4
from tests.models.dsv4_support import PAGE, Setting, setting
from tests.models.test_dsv4_tier import LENGTH, evict, lose, match, publish, restore, wipe

KEYS = 256 * 584 + 256  # bytes of a page of one layer's window keys


@contextmanager
def with_draft(
    folder: Path, group: Any, patch: pytest.MonkeyPatch, spoil: Callable[[Any], None] = lambda _draft: None,
    ratios: tuple[int, ...] = (0,),
) -> Iterator[tuple[Setting, Any]]:  # fmt: skip
    """A setting whose target's worker remembers a draft's pool, and that pool."""
    before, drafts = v4.context, list[Any]()

    def context(*args: Any, **given: Any) -> Any:
        ctx = before(*args, **given)
        allocator = ctx.params.token_to_kv_pool_allocator
        draft = v4.device_pool(24, 16, ratios)
        draft.register_mapping(allocator.full_to_swa_index_mapping)
        spoil(draft)
        setattr(ctx.tp_worker, REMEMBERED, draft)
        drafts.append(draft)
        return ctx

    patch.setattr(v4, "context", context)
    with setting(folder, group) as one:
        yield one, drafts[0]


def rows(draft: Any, pages: list[int]) -> torch.Tensor:
    keys = draft.swa_kv_pool.kv_buffer[0].view(torch.uint8)
    return keys.reshape(len(keys), -1)[torch.tensor(pages)].clone()


def test_the_drafts_window_keys_come_back_with_the_targets(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_draft(tmp_path, group, monkeypatch) as (one, draft):
        assert one.cache.draft_layers == 1
        window = one.spaces[1].shape
        assert (window.widths, window.page_bytes) == ((1, 3, 2), 4 * KEYS + 8 * (2048 + 512) * 4)
        indices = publish(one, 0)
        written = rows(draft, (one.window_of(indices)[::PAGE] // PAGE).tolist())
        assert bool(written.any())
        evict(one)
        wipe(one)
        assert not bool(draft.swa_kv_pool.kv_buffer[0].view(torch.uint8).any())
        assert restore(one, 0) == LENGTH
        last = match(one, 0).device_indices[-PAGE:]
        page = (one.window_of(last)[::PAGE] // PAGE).tolist()
        assert torch.equal(rows(draft, page)[0], written[-1])
        one.books()


def test_a_lost_window_page_takes_the_drafts_keys_with_it(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_draft(tmp_path, group, monkeypatch) as (one, draft):
        publish(one, 0, PAGE)
        publish(one, 0, 2 * PAGE)
        evict(one)
        wipe(one)
        lose(one, 1, v4.path(one, match(one, 0, 2 * PAGE).best_match_node)[-1])
        assert restore(one, 0, 2 * PAGE) == PAGE
        keys = draft.swa_kv_pool.kv_buffer[0].view(torch.uint8)
        assert int(keys.reshape(len(keys), -1).any(1).sum()) == 1, "one page of the draft's, as of the target's"
        one.books()


@pytest.mark.parametrize(
    ("spoil", "ratios", "says"),
    [
        (lambda draft: None, (4,), "compressed blocks"),
        (lambda draft: setattr(draft, "swa_size", PAGE), (0,), "its window has 256 tokens"),
        (lambda draft: draft.register_mapping(torch.arange(9)), (0,), "not found by the target's indices"),
    ],
)
def test_a_draft_that_does_not_fit_is_left_out_with_a_warning(
    tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Any], None], ratios: tuple[int, ...], says: str,
) -> None:  # fmt: skip
    with caplog.at_level(logging.WARNING), with_draft(tmp_path, group, monkeypatch, spoil, ratios) as (one, _):
        assert (one.cache.draft_layers, one.spaces[1].shape.widths) == (0, (1, 3, 1))
        publish(one, 0)
        evict(one)
        wipe(one)
        assert restore(one, 0) == LENGTH
    assert "the draft's KV is not kept, its guesses are worse after a restore: its" in caplog.text
    assert says in caplog.text

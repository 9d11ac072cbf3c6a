"""Replay inside the engine: recorded ids replace the sampled ones where sampling happens, so KV and text agree.

The model computes every token; only the choice is recorded. Looked up by request and position: prompt_tokens and
seq_lens are known on the host, also under overlap scheduling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from specgen_engine.protocol import ReplayScript


class Script(NamedTuple):
    prompt_tokens: int
    ids: list[int]


SCRIPTS: dict[str, Script] = {}


def load(message: ReplayScript) -> None:
    SCRIPTS[message.rid] = Script(message.prompt_tokens, message.ids)


def forget(rid: str, prefix: str) -> None:
    """Drop the script of a base request and those of the rids that start with prefix."""
    SCRIPTS.pop(rid, None)
    for other in [name for name in SCRIPTS if name.startswith(prefix)]:
        del SCRIPTS[other]


def sample(next_token_ids: torch.Tensor, _runner: Any, _logits_output: Any, forward_batch: Any) -> torch.Tensor | None:
    """AFTER ModelRunner.sample: next_token_ids is int [batch]; scripted rows are overwritten in place."""
    if not SCRIPTS:
        return None
    rows, ids = [], []
    for row, rid in enumerate(forward_batch.rids):
        script = SCRIPTS.get(rid)
        if script is None:
            continue
        position = int(forward_batch.seq_lens_cpu[row]) - script.prompt_tokens
        if 0 <= position < len(script.ids):
            rows.append(row)
            ids.append(script.ids[position])
    if rows:
        index, values = _on_device(rows, next_token_ids), _on_device(ids, next_token_ids)
        next_token_ids[index.long()] = values
    return next_token_ids


def _on_device(values: list[int], like: torch.Tensor) -> torch.Tensor:
    """int [n] beside `like`. From pinned memory: a pageable copy would wait for the whole forward pass, and the
    scheduler with it, which costs overlap scheduling its overlap."""
    pinned = torch.tensor(values, dtype=like.dtype, pin_memory=like.is_cuda)
    return pinned.to(like.device, non_blocking=True)

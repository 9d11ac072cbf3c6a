"""Dictated output for SGLang's EAGLE worker, where a test needs a certain text: what is said, and what is guessed.

$SPECGEN_TEST_SCRIPT names a JSON file: `base` and `fork`, output ids of requests and of forks; `step_s`, seconds that
every step is held up. Of the drafts for tokens after the n-th, n % 4 are right, so that steps accept 1 to 4 tokens.
Importing this module changes nothing where the variable is not set.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.speculative import eagle_worker_common, eagle_worker_v2

from specgen_engine.protocol import is_fork

VARIABLE = "SPECGEN_TEST_SCRIPT"
PROMPTS: dict[str, int] = {}  # tokens by request id


@cache
def script() -> dict[str, Any]:
    path = os.environ.get(VARIABLE)
    return json.loads(Path(path).read_text()) if path else {}


def dictated(rid: str, position: int) -> int | None:
    """The token at a position of the whole sequence, or None where nothing is dictated."""
    ids = script().get("fork" if is_fork(rid) else "base", ())
    at = position - PROMPTS.get(rid, position + 1)
    return ids[at] if 0 <= at < len(ids) else None


def forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(worker: Any, batch: Any, *args: Any, **options: Any) -> Any:
        if script():
            PROMPTS.update({req.rid: len(req.origin_input_ids) for req in batch.reqs})
            time.sleep(script()["step_s"])
        return original(worker, batch, *args, **options)

    return call


def sample_after_prefill(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(runner: Any, logits: Any, forward_batch: Any) -> Any:
        ids = original(runner, logits, forward_batch)
        for row, rid in enumerate(forward_batch.rids or () if script() else ()):
            if (said := dictated(rid, int(forward_batch.seq_lens[row]))) is not None:
                ids[row] = said
        return ids

    return call


def guess(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(batch: Any, draft_input: Any, parents: Any, scores: Any, drafts: Any, *args: Any, **options: Any) -> Any:
        for row, req in enumerate(batch.reqs if script() else ()):
            length = int(batch.seq_lens[row])
            for step in range(drafts.shape[1]):
                if (said := dictated(req.rid, length + 1 + step)) is not None:
                    drafts[row, step] = said if step < length % 4 else said + 1
        return original(batch, draft_input, parents, scores, drafts, *args, **options)

    return call


def verify(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def call(verify_input: Any, batch: Any, logits_output: Any, *args: Any) -> Any:
        width = verify_input.draft_token_num
        for row, req in enumerate(batch.reqs if script() else ()):
            for step in range(width):
                if (said := dictated(req.rid, int(batch.seq_lens[row]) + 1 + step)) is not None:
                    logits_output.next_token_logits[row * width + step, said] = 1e9
        return original(verify_input, batch, logits_output, *args)

    return call


def install() -> None:
    worker = eagle_worker_v2.EAGLEWorkerV2
    worker.forward_batch_generation = forward(worker.forward_batch_generation)
    ModelRunner.sample = sample_after_prefill(ModelRunner.sample)
    eagle_worker_v2.build_eagle_verify_input = guess(eagle_worker_v2.build_eagle_verify_input)
    eagle_worker_common.eagle_sample = verify(eagle_worker_common.eagle_sample)


install()

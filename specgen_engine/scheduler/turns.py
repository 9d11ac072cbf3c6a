"""The engine's turns on a GPU that evaluators use too (evaluation/engine_turn.py)."""

from __future__ import annotations

import torch

from specgen_engine.evaluation.engine_turn import EngineTurn

SHARE_ON_GPU = 0.5


def engine_turn(device: str, share: float | None) -> EngineTurn | None:
    """For this rank; None when its engine never stands still.

    device: SGLang's, without an index. share: evaluation.pause; None: SHARE_ON_GPU, and none on a CPU, whose cores a
    candidate shares with all else on the machine anyway.
    """
    on_gpu = device == "cuda"
    share = (SHARE_ON_GPU if on_gpu else 0.0) if share is None else share
    if not share:
        return None
    if not on_gpu:
        return EngineTurn("cpu", share, lambda: None)
    return EngineTurn(f"cuda:{torch.cuda.current_device()}", share, torch.cuda.synchronize)

"""The roofline floor in the verdict: a time below it is no measurement of work done."""

from __future__ import annotations

from ..base import Status
from ..children import Child
from ..worker import Ended, Worker
from .roofline import DeviceFacts, Work, below_floor, ideal_ms, peaks_of


def share_of_roofline(
    worker: Worker, judge: Child, slot: int, candidate_ms: float, enforced: bool = True
) -> float | None:
    """The least time of the task's bytes over the candidate's; None when no peak is known.

    The judge is asked twice at most: which inputs matter costs some calls of the reference, and is only asked when the
    candidate would be too fast if all of them did. Raises Ended with REJECTED when it is and
    the floor is enforced.
    """
    cold = worker.on_gpu
    for needed in (False, True):
        worker.ask(judge, {"op": "work", "slot": slot, "needed": needed, "flops": False})
        told = worker.reply(judge, worker.limits.task_s, "counting the task's bytes")
        work, facts = Work(**told["work"]), DeviceFacts(**told["facts"])
        peaks = peaks_of(facts, worker.limits.peak_memory_gbs)
        reason = below_floor(candidate_ms, work, peaks, cold)
        if not reason or not enforced:
            ideal = ideal_ms(work, peaks)
            return None if ideal is None else round(ideal / candidate_ms, 4)
    raise Ended(Status.REJECTED, reason)

"""A server process on a Ray pool, to be killed: python -m tests.pools.ray_server ADDRESS COUNT

Submits COUNT candidates that sleep in their check, says `submitted` once the head has them all, and waits.
"""

from __future__ import annotations

import asyncio
import sys

from specgen_engine.evaluation.base import Candidate
from specgen_engine.pools.ray_pool import RayPool
from tests.pools.burst import MODULE, TASK

SLEEP_S = 6.0
"""Below the check's own limit, so that it isn't that which ends them."""


def sleeper(number: int, seconds: float = SLEEP_S) -> Candidate:
    return Candidate(MODULE.format(f"__import__('time').sleep({seconds}) or x * 3.0", number))


async def main(address: str, count: int) -> None:
    pool = RayPool(address)
    jobs = [pool.submit(TASK, sleeper(number), search="s", job=f"{pool.name}/{number}") for number in range(count)]
    for job in jobs:
        await job.sent.wait()
    print("submitted", pool.name, flush=True)
    await asyncio.gather(*(job.verdict() for job in jobs))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))

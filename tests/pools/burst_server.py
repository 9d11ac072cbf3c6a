"""A server process with a local pool and a journal, to be killed: python -m tests.pools.burst_server JOURNAL CACHE

Says on stdout, a line each: slots' processes, ends of jobs, its pool's last snapshot. A later life goes on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from specgen_engine.pools.job import PoolJob
from specgen_engine.pools.journal import Journal
from specgen_engine.pools.local import LocalPool
from tests.pools.burst import LIMITS, TASK, burst

CANCELLED_SEARCH, CANCELLED_AFTER = "s5", 60


def say(*words: object) -> None:
    print(*words, flush=True)


async def main(journal: Path, cache: Path) -> None:
    pool = LocalPool(workers=2, limits=LIMITS, cache=cache, journal=Journal(journal))
    resumed = pool.resume(retry=True)
    say("resumed", len(resumed.retry), len(resumed.reported))
    for entry in resumed.reported:
        say("end", entry.id, json.loads(str(entry.outcome))["status"])
    waits = dict(pool.ledger.jobs)
    for one in burst():
        if pool.ledger.journal.entry(one.id) is None:
            waits[one.id] = pool.submit(
                TASK, one.candidate, search=one.search, stage=one.stage, fork=one.fork, job=one.id
            )
    ended = 0

    async def follow(job: PoolJob) -> None:
        nonlocal ended
        verdict = await job.verdict()
        say("end", job.id, verdict.status)
        ended += 1
        if ended == CANCELLED_AFTER:
            pool.cancel_search(CANCELLED_SEARCH)

    say("ready", len(waits))
    pool.start_soon()
    await asyncio.gather(*(follow(job) for job in waits.values()))
    account = pool.ledger.account
    seconds = {"total": account.total(), "by_search": sum(account.by_search().values())}
    say("snapshot", json.dumps({**pool.snapshot(), "seconds": seconds}))
    await pool.close()
    say("done")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))

"""Ranks of DeepSeek-V4's cache, run by test_dsv4_ranks: `python -m tests.models.dsv4_ranks WORLD FOLDER`.

Each rank has lenders of its own. What they leave in FOLDER/rankN.json must be the same but for `own`.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.models.dsv4_storm import Storm, tree_of
from tests.models.dsv4_support import setting
from tests.tier.forked_ranks import fork_ranks

ROUNDS, SEEDS = 300, (7, 8, 9, 10)


def run_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    out: dict[str, Any] = {"storms": [], "own": []}
    for seed in SEEDS:
        own = folder / f"rank{rank}-{seed}"
        own.mkdir()
        with setting(own, dist.group.WORLD, chunks=(6, 6)) as one:
            seen: list[int] = []
            storm = Storm(one, seed, rank, own)
            storm.play(ROUNDS, lambda: seen.append(zlib.crc32(json.dumps(tree_of(one.cache)).encode())))  # noqa: B023
            out["storms"].append(seen)
            out["own"].append(dict(one.cache.stats.counts))
            dist.barrier()
    (folder / f"rank{rank}.json").write_text(json.dumps(out))
    dist.barrier()


def main() -> int:
    """Import SGLang once, then fork the ranks."""
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    import specgen_engine.tier.build  # noqa: F401

    return fork_ranks(world, lambda rank: run_rank(rank, world, folder))


if __name__ == "__main__":
    sys.exit(main())

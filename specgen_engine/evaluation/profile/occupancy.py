"""Theoretical occupancy from a kernel's resources. Pure; CUDA C++ Programming Guide, Hardware Multithreading."""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
REGISTER_UNIT, SHARED_UNIT, RESERVED_SHARED = 256, 128, 1024
"""Registers are given by 256 a warp, shared memory by 128 bytes a block and 1 KiB is the system's (from cc 8.0 on)."""


class SmLimits(NamedTuple):
    """Of one multiprocessor; the defaults are those of compute capability 9.0."""

    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    shared_bytes: int = 233472


class Occupancy(NamedTuple):
    """share of the warps that fit, 0 to 1; limited_by: warps, blocks, registers or shared memory."""

    share: float
    limited_by: str


def theoretical(threads: int, registers: int, shared_bytes: int, sm: SmLimits | None = None) -> Occupancy:
    """threads: a block's. registers: a thread's. Raises ValueError when not even one block fits."""
    sm = sm or SmLimits()
    warps = -(-threads // WARP)
    registers_of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT + RESERVED_SHARED
    blocks = {
        "warps": sm.warps // max(1, warps),
        "blocks": sm.blocks,
        "registers": sm.registers // registers_of_warp // max(1, warps) if registers_of_warp else sm.blocks,
        "shared memory": sm.shared_bytes // shared,
    }
    limit = min(blocks, key=lambda name: blocks[name])
    if blocks[limit] < 1:
        raise ValueError(f"a block of {threads} threads doesn't fit a multiprocessor: {limit}")
    return Occupancy(min(1.0, blocks[limit] * warps / sm.warps), limit)

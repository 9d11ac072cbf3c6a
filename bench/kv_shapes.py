"""What travels in bench.kv_transfer: models' pages, chunk-size sweeps, and the cases made of them."""

from __future__ import annotations

from typing import NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Shape(NamedTuple):
    """A page as a list of planes (bytes a page in each); `chunk_bytes` is the largest."""

    name: str
    planes: tuple[int, ...]
    layout: str = "page_first"
    segment_bytes: int = 0  # the largest piece one bulk copy moves; 0: as the command line says

    @property
    def chunk_bytes(self) -> int:
        return max(self.planes)

    @property
    def page_bytes(self) -> int:
        return sum(self.planes)


class Case(NamedTuple):
    shape: Shape
    batch_bytes: int  # 0: one page
    sms: int

    @property
    def pages(self) -> int:
        return max(1, self.batch_bytes // self.shape.page_bytes)


def qwen3_8b(page_size: int) -> Shape:
    """36 layers of K and V, 8 heads of 128 in bfloat16: 2,048 bytes a token each."""
    return Shape(f"qwen3-8b/page{page_size}", (2048 * page_size,) * 72, "layer_first")


def mla(name: str, layers: int, page_size: int) -> Shape:
    """A latent of 576 bfloat16 a token; at page size 64 the DSA index too, 128 fp8 and a float32 scale a token."""
    planes = (1152 * page_size,) * layers
    if page_size == 64:
        planes += (132 * page_size,) * layers
    return Shape(f"{name}/page{page_size}", planes)


def sweep(chunk_kib: int, layout: str = "page_first") -> Shape:
    """72 planes of one size: Qwen3-8B's page at other chunk sizes."""
    suffix = "" if layout == "page_first" else "/layer-first"
    return Shape(f"sweep{suffix}", (chunk_kib * KIB,) * 72, layout)


def pieces(segment_bytes: int) -> Shape:
    """Chunks of 32 KiB cut into pieces of another size: does the size of one bulk copy matter?"""
    return Shape("pieces", (32 * KIB,) * 72, segment_bytes=segment_bytes)


def single_plane(chunk_kib: int) -> Shape:
    """One buffer, as MLA's: a page is one chunk."""
    return Shape("single", (chunk_kib * KIB,))


MODEL_SHAPES = [
    *(qwen3_8b(page) for page in (1, 16, 64)),
    *(mla("glm-5", 78, page) for page in (1, 16, 64)),
    *(mla("deepseek-v3.2", 61, page) for page in (1, 16, 64)),
]
PIECES = (2 * KIB, 4 * KIB, 16 * KIB, 32 * KIB)
SWEEP_KIB = (2, 32, 1, 8, 4, 16, 64, 128)  # those that the headline is judged by first
LATENCY_SHAPE = single_plane(32)
LATENCY_PAGES = 64


def batches_of(shape: Shape, quick: bool) -> list[int]:
    """Batch sizes for a shape at 16 SMs: one page to 1 GiB."""
    if quick:
        return [0, 4 * MIB]
    if shape.name == "sweep" and shape.chunk_bytes in (2 * KIB, 32 * KIB):
        return [0, 1 * MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB]
    if shape.name.startswith("sweep"):
        return [0, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB]
    return [256 * MIB, GIB] if shape.name == "pieces" else [0, 256 * MIB, GIB]

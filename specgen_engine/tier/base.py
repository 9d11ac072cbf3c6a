"""The contract of the tier: which device pools fit, what a page of theirs is made of, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from specgen_engine.errors import SpecGenError
from specgen_engine.kv.native import _kv

PAGE_SIZES = (1, 16, 32, 64)
DTYPES = ("bfloat16", "float16", "float32", "uint8")  # as stored: fp8 lies there as uint8
STAGED_STORAGE = ("file",)  # backends that move pages through host tensors; the others want the host pool's addresses


class TierError(SpecGenError):
    """The tier can't be had as asked for; the message names the flag or the value, and what fits."""


class PageShape(NamedTuple):
    """A page of a device pool: `planes` in the order of the layers, `planes_per_layer` of them to each layer.

    `widths`: planes of each layer, where layers differ in them; `planes_per_layer` is then the most.
    """

    planes: list[_kv.Plane]
    planes_per_layer: int
    page_size: int
    widths: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.widths) or len(self.planes) // self.planes_per_layer

    def span(self, layers: range) -> tuple[int, int]:
        """(first plane, how many) of consecutive layers."""
        if not self.widths:
            return layers.start * self.planes_per_layer, len(layers) * self.planes_per_layer
        return sum(self.widths[: layers.start]), sum(self.widths[layers.start : layers.stop])

    @property
    def page_bytes(self) -> int:
        return sum(plane.bytes for plane in self.planes)


ShapeOf = Callable[[Any, int], PageShape]
_SHAPES: dict[str, ShapeOf] = {}


def register_pool(device_pool: str, shape_of: ShapeOf) -> None:
    """Say how the pages of a device pool's class look: the seam for pools of one index space, as DSA's (GLM-5).

    `device_pool` is the class's own name, not a base class's: a subclass may lay out its buffers another way.
    `shape_of(pool, page_size)` raises TierError for a layout that it can't describe.
    """
    _SHAPES[device_pool] = shape_of


def page_shape(pool: Any, page_size: int) -> PageShape:
    """The planes of a device pool's pages, `page_size` tokens each.

    Raises TierError for a pool, page size or dtype that the tier does not serve, naming those that it does.
    """
    name = type(pool).__name__
    if name not in _SHAPES:
        raise TierError(
            f"--specgen-kv: this model's KV pool {name} is not supported: the tier serves "
            f"{', '.join(sorted(_SHAPES))}; use --specgen-kv host or off"
        )
    if page_size not in PAGE_SIZES:
        raise TierError(f"--page-size {page_size}: the remote KV tier serves {', '.join(map(str, PAGE_SIZES))}")
    dtype = str(pool.store_dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TierError(
            f"--kv-cache-dtype: {dtype} is not served by the remote KV tier: use one of {', '.join(DTYPES)}"
        )
    return _SHAPES[name](pool, page_size)


def plane_of(buffer: Any, page_size: int) -> _kv.Plane:
    """Pages of consecutive rows of a (tokens, ...) buffer.

    Raises TierError when its rows do not lie one after the other, or a page is no multiple of 16 bytes.
    """
    if not buffer.is_contiguous():
        raise TierError(f"--specgen-kv: a KV buffer of shape {tuple(buffer.shape)} is not contiguous: use host or off")
    row = buffer[0].nbytes * page_size
    if row % 16 or buffer.data_ptr() % 16:
        raise TierError(f"--specgen-kv: a page of {row} bytes a layer is no multiple of 16: use a larger --page-size")
    return _kv.Plane(buffer.data_ptr(), row, row)


def _mha(pool: Any, page_size: int) -> PageShape:
    if pool.kv_cache_layout != "nhd":
        raise TierError(f"--specgen-kv: KV layout {pool.kv_cache_layout} is not supported: the tier serves nhd")
    layers = zip(pool.k_buffer, pool.v_buffer, strict=True)
    return PageShape([plane_of(buffer, page_size) for pair in layers for buffer in pair], 2, page_size)


def _mla(pool: Any, page_size: int) -> PageShape:
    if pool.layer_shard_enabled:
        raise TierError("--specgen-kv: an MLA pool sharded by layers is not supported: use --specgen-kv host or off")
    return PageShape([plane_of(buffer, page_size) for buffer in pool.kv_buffer], 1, page_size)


register_pool("MHATokenToKVPool", _mha)
register_pool("MLATokenToKVPool", _mla)

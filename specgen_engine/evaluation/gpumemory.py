"""GPU memory that two processes map, passed as a file descriptor (CUDA's virtual memory management).

The older CUDA IPC handles work only where both processes see each other's PIDs; a sandboxed candidate does not.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

_GRANULE = 2 << 20
_PINNED, _POSIX_FD, _ON_DEVICE, _READ_WRITE = 1, 1, 1, 3


class GpuMemoryError(RuntimeError):
    """The driver refused; the message names the call and its error."""


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):  # CUmemAllocationProp
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):  # CUmemAccessDesc
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        said = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(said))
        raise GpuMemoryError(f"{name}: {(said.value or b'unknown error').decode()} ({code})")


driver_call = _call


class GpuRegion:
    """`size` bytes of a GPU; .bytes is a uint8 tensor over them. Another process opens the same memory by fd()."""

    def __init__(self, handle: ctypes.c_uint64, size: int, device: str) -> None:
        self.size, self._handle = size, handle
        index = torch.device(device).index or 0
        self._address = ctypes.c_uint64()
        self._length = ctypes.c_size_t(size)
        zero = ctypes.c_uint64(0)
        _call("cuMemAddressReserve", ctypes.byref(self._address), self._length, ctypes.c_size_t(0), zero, zero)
        _call("cuMemMap", self._address, self._length, ctypes.c_size_t(0), handle, zero)
        access = _Access(_Location(_ON_DEVICE, index), _READ_WRITE)
        _call("cuMemSetAccess", self._address, self._length, ctypes.byref(access), ctypes.c_size_t(1))
        self.bytes = torch.as_tensor(_Array(self._address.value or 0, size), device=torch.device("cuda", index))

    @classmethod
    def create(cls, size: int, device: str) -> GpuRegion:
        """At least `size` bytes, rounded up to 2 MiB. The device's context must be current in the calling thread."""
        size = max(1, -(-size // _GRANULE)) * _GRANULE
        index = torch.device(device).index or 0
        properties = _Properties(_PINNED, _POSIX_FD, _Location(_ON_DEVICE, index))
        handle = ctypes.c_uint64()
        none = ctypes.c_uint64(0)
        _call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(properties), none)
        return cls(handle, size, device)

    @classmethod
    def open(cls, fd: int, size: int, device: str) -> GpuRegion:
        """Memory that another process made; fd is closed. size must be what its maker has."""
        handle = ctypes.c_uint64()
        try:
            _call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), ctypes.c_int(_POSIX_FD))
        finally:
            os.close(fd)
        return cls(handle, size, device)

    def fd(self) -> int:
        """A descriptor that opens this memory; the caller closes it."""
        number = ctypes.c_int(-1)
        kind = ctypes.c_int(_POSIX_FD)
        _call("cuMemExportToShareableHandle", ctypes.byref(number), self._handle, kind, ctypes.c_uint64(0))
        return number.value

    def close(self) -> None:
        """Nothing may use .bytes any more."""
        del self.bytes
        torch.cuda.synchronize()
        _call("cuMemUnmap", self._address, self._length)
        _call("cuMemAddressFree", self._address, self._length)
        _call("cuMemRelease", self._handle)


class _Array:
    """What torch.as_tensor reads a foreign pointer from."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}

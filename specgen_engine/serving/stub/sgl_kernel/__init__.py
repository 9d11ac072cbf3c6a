"""Stand-in for the `sgl_kernel` wheel on machines without a GPU, put ahead of it on PYTHONPATH by `cpu_environment`.

The wheel's extensions need libcuda even to be imported, while the CPU engine imports it in many places and calls it in
none. So every name and every submodule can be imported here, and calling one raises NotImplementedError with its dotted
name.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn


class MissingKernel:
    """A name of the real package: it can be imported, read from and subclassed, but not called."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self.__name__} needs a GPU: this process runs with the CPU stand-in for sgl_kernel"
        )

    def __getattr__(self, name: str) -> MissingKernel:
        return _missing(self.__name__, name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __repr__(self) -> str:
        return f"<missing kernel {self.__name__}>"


def _missing(owner: str, name: str) -> MissingKernel:
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"{owner} has no attribute {name}")
    return MissingKernel(f"{owner}.{name}")


class MissingModule(ModuleType):
    """A submodule that exists in the real package (or may): all of its names are missing kernels."""

    def __getattr__(self, name: str) -> MissingKernel:
        return _missing(self.__name__, name)


class SubmoduleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers every import below `sgl_kernel`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MissingModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


def __getattr__(name: str) -> MissingKernel:
    return _missing(__name__, name)


sys.meta_path.insert(0, SubmoduleFinder())

"""One loader for every format. It reads and checks text; no task's code runs here."""

from __future__ import annotations

from pathlib import Path

from ..base import Task
from ..candidates.forms import defined_names
from .base import Format, LoadedTask, TaskError, Workload, parse_module, read_text

MODULE_NAMES = ("Model", "get_inputs", "get_init_inputs")


def load_task(path: Path | str) -> LoadedTask:
    """A KernelBench module (.py), a trace folder with task.py, a GPU MODE task.yml, a FlashInfer Trace definition.

    Folders: one with task.yml, one with task.py, a FlashInfer Trace dataset with a single definition.
    Raises TaskError.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix in (".yml", ".yaml"):
        from .gpumode import load_gpumode

        return load_gpumode(path)
    if path.suffix == ".json":
        from .flashinfer import load_flashinfer

        return load_flashinfer(path)
    return _load_module(path)


def _in_folder(folder: Path) -> Path:
    for name in ("task.yml", "task.yaml", "task.py"):
        if (folder / name).is_file():
            return folder / name
    definitions = sorted((folder / "definitions").rglob("*.json"))
    if len(definitions) == 1:
        return definitions[0]
    if definitions:
        names = ", ".join(str(one.relative_to(folder)) for one in definitions[:4])
        raise TaskError(f"{folder}: {len(definitions)} definitions; name one of them: {names} ...")
    raise TaskError(f"{folder}: no task here: give a module, task.yml or definitions/*.json")


def _load_module(path: Path) -> LoadedTask:
    """A KernelBench module: Model, get_inputs(), get_init_inputs()."""
    text = read_text(path)
    names = defined_names(parse_module(text, path))
    for name in MODULE_NAMES:
        if name not in names:
            raise TaskError(f"{path}: the task defines no {name}; a task needs {', '.join(MODULE_NAMES)}")
    name = path.parent.name if path.name == "task.py" else path.stem
    return LoadedTask(name, Format.KERNELBENCH, path, (Workload("", Task(text, name)),))

"""The build path from a clean tree: setup.py, CMake, and an extension that imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_INPUTS = (
    "pyproject.toml",
    "setup.py",
    "CMakeLists.txt",
    "README.md",
    "LICENSE",
    "csrc",
    "kernels",
    "specgen_engine",
)


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, without anything built."""
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "build"))
        else:
            shutil.copy(source, tree / name)
    return tree


@pytest.fixture(scope="module")
def built(clean_tree: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=clean_tree,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return clean_tree


def test_extension_builds_and_imports(built: Path) -> None:
    extensions = list((built / "specgen_engine").glob("_kv*.so"))
    assert len(extensions) == 1
    code = "import specgen_engine._kv as kv; print(kv.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=built, capture_output=True, text=True, timeout=60, check=True
    )
    assert Path(done.stdout.strip()) == extensions[0]


def test_wheel_carries_data_and_entry_points(built: Path, tmp_path: Path) -> None:
    import zipfile

    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=built, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("specgen_engine-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert {"specgen_engine/serving/stub/sgl_kernel/__init__.py", "specgen_engine/py.typed"} <= names
    assert any(name.startswith("specgen_engine/replay/bundled/") for name in names)
    assert any(name.startswith("specgen_engine/_kv") and name.endswith(".so") for name in names)
    assert not any(name.startswith(("tests/", "bench/")) for name in names)
    assert "[sglang.srt.plugins]\nspecgen = specgen_engine.plugin:load" in entry_points
    assert "specgen = specgen_engine.cli:main" in entry_points


def make_venv(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """requirements/venv.sh in a tree of its own, with only the commands that it is given."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "requirements", tree / "requirements")
    (tree / "pyproject.toml").write_text("")
    return subprocess.run(
        ["/bin/bash", "requirements/venv.sh"], cwd=tree, env=environment, capture_output=True, text=True, timeout=60
    )


def tools(tmp_path: Path, *names: str) -> str:
    """A PATH with these commands alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("dirname", "sha256sum", "cut", "find", "sort", "rm", "basename", *names):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return str(folder)


def test_missing_compiler_is_one_line(tmp_path: Path) -> None:
    done = make_venv(tmp_path, PATH=tools(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "make venv: missing: a C++17 compiler (g++ or clang++, or name one with CXX=...)\n"


def test_missing_python_is_one_line(tmp_path: Path) -> None:
    done = make_venv(tmp_path, PATH=tools(tmp_path, "g++", "as"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "make venv: missing: Python 3.11 or 3.12 (install one, or name it with SPECGEN_PYTHON=/path/to/python)"
    ]


def test_named_python_of_another_version_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/bash\nexit 1\n")
    other.chmod(0o755)
    done = make_venv(tmp_path, PATH=tools(tmp_path, "g++", "as"), SPECGEN_PYTHON=str(other))
    assert done.returncode == 1
    assert done.stderr == f"make venv: SPECGEN_PYTHON: {other} is not a Python 3.11 or 3.12\n"

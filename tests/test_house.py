"""What a clean clone must have, and what must never be committed."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
FOLDERS = ("specgen_engine", "csrc", "kernels", "patches", "bench", "tests", "docs", "requirements", ".ci")
FILES = ("README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "patches/README.md")
TEXT_SUFFIXES = {
    "",
    ".md",
    ".py",
    ".pyi",
    ".toml",
    ".txt",
    ".in",
    ".lock",
    ".sh",
    ".cpp",
    ".hpp",
    ".cu",
    ".cuh",
    ".cmake",
}


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def tracked_text() -> list[tuple[Path, str]]:
    return [
        (path.relative_to(ROOT), path.read_text(encoding="utf-8"))
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES and path.is_file()
    ]


@pytest.mark.parametrize("name", FOLDERS)
def test_top_level_folder_is_there(name: str) -> None:
    assert (ROOT / name).is_dir()
    assert any(path.is_relative_to(ROOT / name) for path in tracked_files()), f"nothing tracked in {name}/"


@pytest.mark.parametrize("name", FILES)
def test_document_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_is_plain_pins_with_hashes(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text, "a lock must not say where a package came from"
    assert not re.search(r"^-", text, re.M), "a lock must hold no option (index, find-links)"
    requirements = [block for block in re.split(r"\n(?=[A-Za-z0-9])", text) if not block.startswith("#")]
    assert requirements
    for block in requirements:
        first = block.splitlines()[0]
        assert re.match(r"^[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", first), first
        assert "--hash=sha256:" in block, f"no hash: {first}"


def test_three_locks() -> None:
    assert [lock.name for lock in LOCKS] == ["bootstrap.lock", "dev.lock", "models.lock"]


def test_lock_pins_the_sglang_that_the_wheel_allows() -> None:
    assert re.search(r"^sglang==0\.5\.17\b", (ROOT / "requirements" / "dev.lock").read_text(), re.M)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "sglang>=0.5.17,<0.6" in dependencies


def test_every_direct_requirement_is_locked() -> None:
    locked = {
        line.split("==")[0].lower()
        for line in (ROOT / "requirements" / "dev.lock").read_text().splitlines()
        if "==" in line
    }
    wanted = [line.strip() for line in (ROOT / "requirements" / "dev.in").read_text().splitlines()]
    names = {re.split(r"[\[=<>]", line)[0].lower() for line in wanted if line and not line.startswith("#")}
    assert names - {name.split("[")[0] for name in locked} == set()


# Spelled in pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(
    "|".join(
        (
            "/wo" + r"rk/\w",
            "/tm" + r"p/(?!specgen|x\b|test)\w",
            "/ho" + r"me/\w",
            "/ro" + "ot/",
            "/op" + r"t/(wheels|pypi)",
        )
    )
)
REGISTRY = re.compile("|".join(("py" + r"pi\.org", "pythonho" + r"sted\.org", "registry\\.npm" + "js")))


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY], ids=["machine path", "registry address"])
def test_no_address_or_machine_path_is_tracked(pattern: re.Pattern[str]) -> None:
    found = [f"{path}: {match[0]}" for path, text in tracked_text() if (match := pattern.search(text))]
    assert found == []


FORMATS = ROOT / "tests" / "evaluation" / "formats"


def test_nothing_built_is_tracked() -> None:
    built = {".so", ".o", ".pyc", ".whl", ".safetensors", ".gguf"}
    found = [path for path in tracked_files() if path.suffix in built]
    assert [path for path in found if FORMATS not in path.parents] == []
    assert (
        sum(path.stat().st_size for path in found) < 64_000
    )  # FlashInfer keeps the tensors of a workload in such files


def test_make_commands_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / document).read_text(), re.M))
        assert named, f"{document} names no command"
        assert named - targets == set(), document


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test"

"""Does a SGLang wheel that is not installed still have what we hook and call? By syntax tree: nothing of it is run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from specgen_engine import versions
from specgen_engine.errors import SpecGenError
from specgen_engine.versions import Signature

DOWNLOAD_LIMIT_S = 300
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Reader = Callable[[str], ast.Module | None]


class Finding(NamedTuple):
    """One target in a wheel. found None: the target is not there; problem empty: as the table of releases says."""

    target: str
    expects: Signature
    found: Signature | None
    problem: str


class Report(NamedTuple):
    version: str
    tested: bool
    findings: tuple[Finding, ...]

    @property
    def moved(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.problem)


def check_wheel(wheel: Path, targets: Mapping[str, Signature]) -> Report:
    """Compare `targets` (dotted path: parameter names) with a wheel's source, by the table's row for its version.

    Raises SpecGenError for a file that is no SGLang wheel.
    """
    named = re.match(r"sglang-([^-]+)-", wheel.name)
    if named is None or not zipfile.is_zipfile(wheel):
        raise SpecGenError(f"{wheel}: no SGLang wheel; give one that `pip download --no-deps sglang` has fetched")
    version = named.group(1)
    release = versions.release_of(version)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

        def read(path: str) -> ast.Module | None:
            return ast.parse(archive.read(path)) if path in names else None

        wanted = {**targets, **release.moved}
        findings = tuple(
            _compare(target, expects, signature_of(target, read))
            for target, expects in wanted.items()
            if expects is not None
        )
    return Report(version, versions.is_tested(version), findings)


def signature_of(target: str, read: Reader) -> Signature | None:
    """Parameter names of a dotted path, in a tree of sources that `read` parses by path; None when it is not there."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        stem = "/".join(parts[:cut])
        module = read(f"{stem}.py") or read(f"{stem}/__init__.py")
        if module is not None:
            node = _descend(module, parts[cut:], read)
            return None if node is None or isinstance(node, ast.ClassDef) else _parameters(node)
    return None


def _descend(module: ast.Module, names: list[str], read: Reader) -> Definition | None:
    scope: ast.Module | Definition = module
    for depth, name in enumerate(names):
        found = next((node for node in _definitions(scope) if node.name == name), None)
        if found is None:
            return _inherited(scope, module, names[depth:], read) if isinstance(scope, ast.ClassDef) else None
        scope = found
    return None if isinstance(scope, ast.Module) else scope


def _inherited(owner: ast.ClassDef, module: ast.Module, names: list[str], read: Reader) -> Definition | None:
    """The method in a base class, of this module or imported into it by name."""
    for base in (base.id for base in owner.bases if isinstance(base, ast.Name)):
        if any(node.name == base for node in _definitions(module)):
            found = _descend(module, [base, *names], read)
        else:
            found = _imported(module, base, names, read)
        if found is not None:
            return found
    return None


def _imported(module: ast.Module, name: str, names: list[str], read: Reader) -> Definition | None:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            stem = node.module.replace(".", "/")
            if (other := read(f"{stem}.py")) is not None:
                return _descend(other, [name, *names], read)
    return None


def _definitions(scope: ast.Module | Definition) -> Iterator[Definition]:
    """Classes and functions of a scope, those under its if and try statements too, innermost scopes left out."""
    pending: list[ast.stmt] = list(scope.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            pending = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)] + pending


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
    given = node.args
    groups = (given.posonlyargs, given.args, [given.vararg], given.kwonlyargs, [given.kwarg])
    return tuple(argument.arg for group in groups for argument in group if argument is not None)


def _compare(target: str, expects: Signature, found: Signature | None) -> Finding:
    if found == expects:
        return Finding(target, expects, found, "")
    if found is None:
        return Finding(target, expects, None, f"{target} is missing")
    return Finding(target, expects, found, f"{target} takes ({', '.join(found)}), expected ({', '.join(expects)})")


def download_newest(folder: Path) -> Path:
    """The newest SGLang wheel for this Python, without its dependencies, through pip's own configuration."""
    command = [_python_with_pip(folder), "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), "sglang"], capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise SpecGenError(
            f"pip download sglang: no wheel within {DOWNLOAD_LIMIT_S} s; give --check-wheel FILE"
        ) from None
    wheels = sorted(folder.glob("sglang-*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SpecGenError(f"pip download sglang: {reason}; give --check-wheel FILE")
    return wheels[-1]


def _python_with_pip(folder: Path) -> str:
    """This interpreter, or, in an environment without pip (uv makes such), one in `folder` with Python's own pip."""
    if find_spec("pip") is not None:
        return sys.executable
    try:
        venv.create(folder / "pip", with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SpecGenError(f"no pip here, and none can be set up ({error}); give --check-wheel FILE") from None
    return str(folder / "pip" / "bin" / "python")


def lines_of(report: Report) -> Iterator[str]:
    """The report for people: one line a target that moved, then a summary."""
    for finding in report.moved:
        yield f"moved: {finding.problem}"
    state = "tested" if report.tested else "not tested: refused unless allowed"
    fit = len(report.findings) - len(report.moved)
    yield f"SGLang {report.version} ({state}): {fit} of {len(report.findings)} hooks and calls fit"


def check(wheel: Path | None, targets: Mapping[str, Signature]) -> Report:
    """check_wheel of a file, or of the newest wheel, fetched into a temporary folder."""
    if wheel is not None:
        return check_wheel(wheel, targets)
    with tempfile.TemporaryDirectory(prefix="specgen-wheel-") as folder:
        return check_wheel(download_newest(Path(folder)), targets)

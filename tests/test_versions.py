"""Other releases of SGLang: refused unless allowed, read as wheels, and one row each in the table."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import zipfile
from array import array
from importlib.util import find_spec
from pathlib import Path

import pytest

from specgen_engine import plugin, signatures, versions
from specgen_engine.errors import HookError, SpecGenError


def test_a_release_outside_the_table_is_refused_naming_the_hooks_unless_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(versions.ALLOW, raising=False)
    monkeypatch.setattr(plugin, "sglang_version", lambda: "0.5.99")
    hook = next(hook for hook in plugin.HOOKS if hook.target.endswith("process_batch_result"))
    monkeypatch.setattr(plugin, "HOOKS", (dataclasses.replace(hook, expects=("self", "batch")),))
    with pytest.raises(HookError, match=r"SGLang 0\.5\.99 is none of the releases") as error:
        plugin.check_release()
    assert "Scheduler.process_batch_result takes (self, batch, result), expected (self, batch)" in str(error.value)
    assert "SPECGEN_ALLOW_SGLANG=0.5.99" in str(error.value)
    monkeypatch.setenv(versions.ALLOW, "0.5.98")
    with pytest.raises(HookError):
        plugin.check_release()
    monkeypatch.setenv(versions.ALLOW, "0.5.99")
    plugin.check_release()


def test_an_untested_release_whose_hooks_fit_is_refused_too() -> None:
    assert "behaviour is untested" in (versions.refusal("0.6.0", [], {}) or "")
    assert versions.refusal(versions.RELEASES[0].version, [], {}) is None


def test_the_row_of_a_release_is_its_own_or_the_newest_before_it() -> None:
    for release in versions.RELEASES:
        assert versions.release_of(release.version) is release
    assert versions.release_of("0.5.17.post1") is versions.RELEASES[0]
    assert versions.release_of("9.0") is versions.RELEASES[-1]
    assert versions.release_of("0.1") is versions.RELEASES[0]


SOURCE = """
class Base:
    def inherited(self, a): ...

if True:
    class Scheduler(Base):
        @classmethod
        def run(cls, x, /, y, *rest, key=None, **more): ...

    async def wait(seconds): ...
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "sglang-0.9.9-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sglang/srt/scheduler.py", SOURCE)
        archive.writestr("sglang/srt/tool/__init__.py", "from sglang.srt.scheduler import Base\nclass T(Base): ...\n")
    return path


def test_a_wheel_is_read_without_running_it(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits = {
        "sglang.srt.scheduler.Scheduler.run": ("cls", "x", "y", "rest", "key", "more"),
        "sglang.srt.scheduler.Scheduler.inherited": ("self", "a"),
        "sglang.srt.scheduler.wait": ("seconds",),
        "sglang.srt.tool.T.inherited": ("self", "a"),
    }
    moved = {"sglang.srt.scheduler.wait.gone": (), "sglang.srt.nowhere.f": (), "sglang.srt.tool.T.inherited": ("self",)}
    assert not {finding.target for finding in signatures.check_wheel(wheel, fits).moved} & fits.keys()
    report = signatures.check_wheel(wheel, moved)
    assert {finding.target for finding in report.moved} >= moved.keys()
    assert (report.version, report.tested) == ("0.9.9", False)
    assert plugin.main(["--check-wheel", str(wheel)]) == 1
    printed = capsys.readouterr().out
    assert "moved: sglang.srt.managers.scheduler.Scheduler.process_batch_result is missing" in printed
    assert printed.splitlines()[-1].startswith("SGLang 0.9.9 (not tested: refused unless allowed): 0 of ")


def test_what_is_no_wheel_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sglang-0.9.9-py3-none-any.whl"
    path.write_text("no")
    with pytest.raises(SpecGenError, match="no SGLang wheel"):
        signatures.check_wheel(path, {})
    assert plugin.main(["--check-wheel", str(tmp_path / "torch-1-x.whl")]) == 2
    assert plugin.main(["--help"]) == 2
    assert capsys.readouterr().err.startswith("specgen: ")


def test_the_installed_releases_row_is_right() -> None:
    """Every function that we call or hook, by its source, as for a wheel."""
    import sglang

    root = Path(next(iter(sglang.__path__))).parent

    def read(path: str) -> ast.Module | None:
        return ast.parse((root / path).read_text()) if (root / path).is_file() else None

    for target, usual in {**plugin.targets(), **versions.current().moved}.items():
        expects = versions.expected(target, usual or (), versions.current())
        if expects is not None:
            assert signatures.signature_of(target, read) == expects, target


def test_an_environment_without_pip_gets_one_for_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert signatures._python_with_pip(tmp_path) == sys.executable or find_spec("pip") is None
    monkeypatch.setattr(signatures, "find_spec", lambda name: None)
    python = signatures._python_with_pip(tmp_path)
    assert python != sys.executable
    done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, timeout=60)
    assert str(tmp_path) in done.stdout


def test_the_row_of_the_installed_release_reads_sglangs_own_request() -> None:
    from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
    from sglang.srt.sampling.sampling_params import SamplingParams

    req = Req("r", "", array("q", [1, 2, 3]), SamplingParams())
    kv = versions.current().kv
    assert not kv.held(req)
    if req.kv is None:  # 0.5.17 makes it with the first allocation
        req.kv = ReqKvInfo(kv_allocated_len=3, swa_evicted_seqlen=2)
    else:
        req.kv.component_evicted_seqlens[1] = 2  # ComponentType.SWA, an integer
    assert (kv.committed(req), kv.in_tree(req), kv.released(req)) == (0, 0, 2)

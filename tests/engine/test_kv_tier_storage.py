"""SGLang's file storage below the tier: what no longer fits there comes back from files, staged through host memory.

A device pool of one prompt, a tier of three, and files of all: each page is written to a file once it is in the tier.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.tier.support  # noqa: F401  (skipped where that is)
from tests.engine.conftest import Client, StartServer
from tests.engine.test_kv_tier import LENGTH, PROMPTS, prompt, state

pytestmark = pytest.mark.timeout(600)

POOL, TIER_CHUNKS, TOKENS = 512, 45, 8
FOLDER = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def tier(start_server: StartServer, files: Path) -> Iterator[Client]:
    arguments = ["--smollm", "--max-total-tokens", str(POOL), "--max-running-requests", "2"]
    flags = ["--specgen-kv", "loopback", "--specgen-kv-chunk-mib", "1", "--specgen-kv-max-chunks", str(TIER_CHUNKS)]
    storage = ["--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(files))
        with start_server(*arguments, *flags, *storage) as client:
            yield client


def ask(client: Client, number: int) -> tuple[list[int], int]:
    """(answer, prompt tokens that came from files)."""
    answer = client.generate([*prompt(number), 17, 18], TOKENS)
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return answer["output_ids"], details.get("storage", 0)


def wait_for_files(files: Path, count: int) -> None:
    """A page has a file of its own; threads of SGLang's write them."""
    end = time.monotonic() + 60
    while (found := len(list(files.iterdir()))) < count:
        assert time.monotonic() < end, f"{found} of {count} pages were written to files"
        time.sleep(0.1)


def test_pages_evicted_from_the_tier_come_back_from_files(tier: Client, files: Path) -> None:
    computed = []
    for number in range(PROMPTS):
        answer, stored = ask(tier, number)
        assert stored == 0
        computed.append(answer)
        wait_for_files(files, (number + 1) * LENGTH)
    found = state(tier)
    assert found["pages"]["backed"] < 4 * LENGTH  # the oldest two are in files only
    for number in range(2):
        answer, stored = ask(tier, number)
        assert stored >= 0.99 * LENGTH
        assert answer == computed[number]
    found = state(tier)
    assert found["counts"]["hit_tokens_storage"] >= 2 * 0.99 * LENGTH
    assert found["counts"]["mismatched_pages"] == found["counts"]["late_mismatched_pages"] == 0
    assert found["integrity"] == "ok"
    device = found["device"]
    assert device["free"] + device["evictable"] + device["protected"] == device["total"]


def test_a_file_that_was_changed_changes_the_answer(tier: Client, files: Path) -> None:
    """What comes back are the files' bytes: with zeros in them, the same prompt is answered another way."""
    expected, _ = ask(tier, 2)
    wait_for_files(files, PROMPTS * LENGTH)
    for number in (0, 1, 3, 4):
        ask(tier, number)
    for file in files.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    answer, stored = ask(tier, 2)
    assert stored >= 0.99 * LENGTH
    assert answer != expected

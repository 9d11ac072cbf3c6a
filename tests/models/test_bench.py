"""bench.models: whose turn it is, what a slowdown is, where a run is put."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import models, models_forks, models_tier
from bench.models_client import Generated
from bench.models_compare import even_split, paired
from bench.models_forks import Fork, Shape, check_forks, reuse_decoded, reuse_prefilled
from bench.models_load import held, slowdown_of
from bench.models_merge import merge
from bench.models_servers import Case, Running, case_of, environment_of
from bench.models_turns import TIMED, TimeIsOver, Turn, Turns, may_start
from specgen_engine.errors import SpecGenError
from specgen_engine.models.base import facts_of

STEPS = ("smoke", "restores", "forks", "storm", "slowdown")


def turn(step: str, case: int) -> Turn:
    return Turn(step, (STEPS.index(step), case))


@pytest.mark.parametrize(
    ("step", "waiting", "running", "starting", "starts"),
    [
        ("forks", ["storm"], ["forks", "smoke"], 2, True),
        ("forks", [], ["restores"], 0, False),
        ("forks", ["restores"], [], 0, False),
        ("forks", ["slowdown"], [], 0, True),
        ("restores", ["forks"], [], 3, True),
        ("restores", ["smoke"], [], 0, False),
        ("restores", [], ["forks"], 0, False),
        ("slowdown", [], [], 1, False),
        ("slowdown", [], [], 0, True),
    ],
)
def test_a_steps_turn_comes_by_what_waits_runs_and_starts(
    step: str, waiting: list[str], running: list[str], starting: int, starts: bool
) -> None:
    others = [turn(one, 1) for one in waiting]
    assert may_start(turn(step, 0), [turn(step, 0), *others], [turn(one, 2) for one in running], starting) is starts


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6), st.lists(st.sampled_from(STEPS), max_size=3))
def test_somebody_can_always_start_when_all_servers_are_up_and_nothing_timed_runs_beside_another(
    waiting: Sequence[str], running: Sequence[str]
) -> None:
    ready = [turn(step, case) for case, step in enumerate(waiting)]
    busy = [turn(step, 10 + case) for case, step in enumerate(running)]
    started = [one for one in ready if may_start(one, ready, busy, 0)]
    assert started or busy
    for one in started:
        assert not (busy if one.step in TIMED else [other for other in busy if other.step in TIMED])


def test_turns_keep_timed_steps_alone_and_end_those_that_wait() -> None:
    turns, beside, most = Turns(STEPS, 3), [], 0

    def check(case: int) -> None:
        nonlocal most
        turns.started()
        for step in STEPS:
            with turns.take(step, case) as starting:
                beside.append(step)
                assert step not in TIMED or len(beside) == 1
                assert step != "slowdown" or starting == 0
                most = max(most, len(beside))
                time.sleep(0.02)
                beside.remove(step)

    threads = [threading.Thread(target=check, args=(case,)) for case in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not beside
    assert most > 1, "the others ran side by side"
    turns.end()
    with pytest.raises(TimeIsOver), turns.take("smoke", 0):
        pass


def test_a_slow_half_minute_of_the_host_is_no_slowdown_by_forks() -> None:
    pairs = [{"alone": alone, "forked": alone * 1.02} for alone in (3.6, 3.6, 4.4, 4.0, 3.6)]
    row = slowdown_of(pairs)
    assert row["slowdown"] == pytest.approx(0.02)
    in_between = {"alone": 4.4, "forked": 3.672}
    assert slowdown_of([*pairs[1:3], in_between])["slowdown"] == pytest.approx(0.02)


def run_of(date: str, cases: str) -> dict[str, object]:
    command = "python -m bench.models --json some/where/models.json --logs /x/logs --cases a:plain@0"
    return {"schema": "specgen.models/1", "machine": {"date": date}, "command": command, "cases": {cases: {}}}


def test_runs_lie_beside_each_other_by_date_without_folders() -> None:
    both = merge(run_of("2026-01-02", "late"), run_of("2026-01-01", "early"))
    assert [list(run["cases"]) for run in both["runs"]] == [["early"], ["late"]]
    assert both["runs"][0]["command"] == "python -m bench.models --json models.json --logs logs --cases a:plain@0"
    again = merge(both, run_of("2026-01-02", "late again"))
    assert [list(run["cases"]) for run in again["runs"]] == [["early"], ["late again"]]
    assert [list(run["cases"]) for run in merge({}, run_of("2026-01-01", "first"))["runs"]] == [["first"]]


@pytest.mark.parametrize(
    ("gpus", "case", "on"),
    [
        (2, "a:plain", "2 GPUs"),
        (2, "a:tier", "2 GPUs; the tier's lender on another GPU"),
        (1, "a:invariant-tier", "1 GPU; the tier's lender on the serving GPU: copies within its memory, no NVLink"),
    ],
)
def test_a_run_says_where_it_was_made_and_no_folder_of_that_machine(gpus: int, case: str, on: str) -> None:
    run = run_of("2026-01-02", case)
    log = "/dev/shm/site/sglang/launch.py:56: '/tmp/specgen-model-x' POST /v1/chat/completions"
    run |= {"machine": {"date": "2026-01-02", "gpus": gpus}, "cases": {case: {"storm": {"log": [log]}}}}
    (merged,) = merge({}, run)["runs"]
    assert merged["on"] == on
    assert merged["cases"][case]["storm"]["log"] == ["launch.py:56: 'specgen-model-x' POST /v1/chat/completions"]


class Engine:
    """A server whose logprob is away by `error` wherever a prefix was cached; keeps what it was asked."""

    def __init__(self, error: float) -> None:
        self.error, self.asked, self.cache = error, [], []  # type: ignore[var-annotated]

    def flush(self) -> None:
        self.cache.clear()

    def generate(self, ids: Sequence[int], tokens: int, logprobs: bool = True) -> Generated:
        cached = max(
            (len(one) for one in self.cache if list(ids[: len(one)]) == one and len(one) < len(ids)), default=0
        )
        self.asked.append(list(ids))
        self.cache.append(list(ids))
        value = -1.0 - sum(ids) / 1e6 - (self.error if cached else 0.0)
        return Generated([7] * tokens, [value] * tokens, {7: value}, cached, 0, 0.0)


FORKS = [
    Fork(0, [1, 2, 3, 4, 5, 90, 91], [7], 2, 5, 4),
    Fork(0, [1, 2, 3, 90, 91], [7], 2, 3, 3),
    Fork(1, [6, 8, 9, 90], [7], 1, 3, 2),
]


@pytest.mark.parametrize(("error", "within"), [(0.0, 3), (0.5, 0)])
def test_the_controls_see_what_reusing_an_ordinary_prefix_does(error: float, within: int) -> None:
    engine: Any = Engine(error)
    fresh = [Engine(error).generate(fork.input_ids, 1) for fork in FORKS]
    row = reuse_prefilled(engine, FORKS, fresh)
    assert engine.asked[:3] == [[1, 2, 3, 90], [1, 2, 3, 4, 5], [6, 8, 9]], "prefixes first, a base's shortest first"
    assert (row["logprob_within"], row["first_token_equal"]) == (within, 3)
    assert row["outside"] == ([4, 5, 7] if error else [])

    engine = Engine(error)
    said = [[33, 44, 55, 66], [88, 99]]
    engine.cache += [[1, 2, 33, 44, 55], [6, 88, 99]]
    row = reuse_decoded(engine, FORKS, said, [0, 1, 2], 2)
    own = [[1, 2, 33, 44, 55, 90, 91], [1, 2, 33, 90, 91], [6, 88, 99, 90]]
    assert sorted(engine.asked[:3]) == own, "the base's own words"
    assert row["logprob_within"] == within + (error > 0), "one of them found no prefix"
    assert row["reused_mean"] == pytest.approx((5 + 0 + 3) / 3)


def test_inputs_that_are_outside_alone_are_counted_and_weighed() -> None:
    forks = {"away": [0.02] * 5 + [0.0] * 3 + [0.0101, 0.02]}
    control = {"away": [0.0] * 5 + [0.01, 0.011, 0.0] + [0.5, 0.5]}
    assert paired(forks, control) == {"forks_only": 5, "other_only": 1, "both": 2, "p": pytest.approx(14 / 64)}
    assert [even_split(0, 0), even_split(3, 3), even_split(9, 0)] == [1.0, 1.0, 2 / 512]


def record_of(prompt: list[int], said: list[int]) -> dict[str, Any]:
    fork = {"state": "length", "prompt_tokens": len(prompt), "at_token": len(said) - 1, "prefix_reused": len(prompt)}
    ids = {"forks": [{"input_ids": [*prompt, *said[:-1], 90], "output_ids": [7, 8]}], "base": said}
    return {"forks": [fork], "forks_skipped": 0, "ids": ids}


def test_a_row_of_forks_holds_each_input_and_stays_where_it_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record_of([1, 2], [3, 4, 5]), record_of([6], [8, 9])]
    monkeypatch.setattr(models_forks, "search_all", lambda *_: records)
    shape = Shape(bases=2, forks=1)
    whole = check_forks(Engine(0.5), 1, shape, {})  # type: ignore[arg-type]
    assert whole["lengths"] == [5, 3]
    assert whole["agreed"] == [1, 1]
    assert whole["control"]["agreed"] == [2, 2]
    assert whole["control"]["away"] == [0.0, 0.0]
    assert whole["reuse_prefilled"]["away"] == [0.5, 0.5]
    assert whole["paired"]["control"] == {"forks_only": 0, "other_only": 0, "both": 0, "p": 1.0}

    engine, row, flushes = Engine(0.5), {}, iter(range(2))  # type: ignore[var-annotated]
    monkeypatch.setattr(engine, "flush", lambda: next(flushes))
    with pytest.raises(StopIteration):
        check_forks(engine, 1, shape, row)  # type: ignore[arg-type]
    assert row["lengths"] == [5, 3]
    assert "control" not in row, "the budget ended in it"


def test_what_a_wrong_page_does_is_asked_where_the_fork_stopped_reusing() -> None:
    engine: Any = Engine(0.0)
    fork = Fork(0, list(range(300)), [7], 100, 299, 256)
    rows = models_forks.sensitivity(engine, [fork])
    _right, middle, end = ([at for at, one in enumerate(ids) if one != at] for ids in engine.asked)
    assert (middle[0], middle[-1], end[0], end[-1]) == (150, 213, 192, 255)
    assert rows.keys() == {"sensitivity", "sensitivity_end"}
    assert rows["sensitivity_end"]["shift_min"] == pytest.approx(64 / 1e6)


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_a_restored_prefix_is_set_beside_the_one_that_was_kept(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """Of four answers the third comes from the tier, which spoils it by `wrong`."""
    engine: Any = Engine(0.25)
    engine.state = dict
    asked = 0

    def ask(_client: Any, length: int) -> Generated:
        nonlocal asked
        asked += 1
        value = -1.0 - (0.25 if asked > 1 else 0.0) - (wrong if asked == 3 else 0.0)
        return Generated([7], [value], {7: value}, length, length, 1.0)

    monkeypatch.setattr(models_tier, "ask", ask)
    monkeypatch.setattr(models_tier, "_settle", lambda *_: None)
    (row,) = models_tier.restores(Running(case_of("tiny:tier"), engine, Path("log"), 0.0, None), (4,))
    assert row["logprob"] == pytest.approx(0.25 + wrong)
    assert row["kept"]["logprob"] == pytest.approx(wrong)
    assert row["kept"]["logprob_computed"] == pytest.approx(0.25)


def test_modes_that_need_sglangs_switches_set_those_it_has() -> None:
    from sglang.srt.environ import envs

    facts = facts_of("glm5-small")
    plain = environment_of(facts, case_of("glm5-small:plain"))
    accepted = environment_of(facts, case_of("glm5-small:mtp-accepted@1"))
    assert accepted["SGLANG_SIMULATE_ACC_LEN"] == "3"
    assert accepted["SGLANG_SIMULATE_ACC_TOKEN_MODE"] == "real-draft-token"
    assert environment_of(facts, case_of("glm5-small:mtp-accepted-tier")) == accepted
    assert "SGLANG_SIMULATE_ACC_LEN" not in environment_of(facts, case_of("glm5-small:mtp-tier"))
    assert case_of("glm5-small:mtp-tier").has_tier
    assert not [name for name in plain if "SIMULATE" in name or "INVARIANT" in name or "STRICT" in name]
    assert all(hasattr(envs, name) for name in accepted if "SIMULATE" in name or "STRICT" in name)
    assert environment_of(facts, case_of("glm5-small:invariant"))["SPECGEN_BATCH_INVARIANT"] == "1"


def test_a_token_that_a_storm_leaves_taken_shows() -> None:
    usage = {"weight": 1.0, "token_capacity": 128}
    before = {
        "memory_usage": usage,
        "specgen": {"free_tokens": 128, "watched": 0, "scripts": 0, "pauses": {"count": 1}},
    }
    for name in ("free_tokens", "watched", "scripts"):
        after = {**before, "specgen": {**before["specgen"], name: 127}}
        assert held(after) != held(before)
    assert held({**before, "specgen": {**before["specgen"], "pauses": {"count": 9}}}) == held(before)
    assert held({**before, "specgen_kv": {"integrity": "1 page lost"}}) != held(before)


def test_what_the_budget_cuts_off_says_so_and_a_server_that_never_came_up_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed = threading.Event()

    def start(stack: ExitStack, case: Case, logs: Path, timeout_s: float) -> Running:
        if case.mode == "tier":
            raise SpecGenError("no lender")
        stack.callback(killed.set)
        (logs / "log").write_text("Error: SIGTERM")
        return Running(case, Engine(0.0), logs / "log", 0.0, None)  # type: ignore[arg-type]

    def smoke(_running: Running) -> dict[str, Any]:
        killed.wait(5)
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(models, "start", start)
    monkeypatch.setattr(models, "smoke", smoke)
    report = models.Report(tmp_path / "models.json", 1)
    cases = [case_of("tiny:plain"), case_of("tiny:tier")]
    begun = time.monotonic()
    assert models.run(cases, ["smoke", "forks"], tmp_path, 0.3, 1, report) == 1
    assert time.monotonic() - begun < 4, "the server outlived the budget"
    rows = json.loads((tmp_path / "models.json").read_text())["cases"]
    assert rows["tiny:plain"] == {"smoke": {"error": "cut off: the budget was over", "log": ["Error: SIGTERM"]}}
    assert rows["tiny:tier"]["start"]["error"] == "no lender"

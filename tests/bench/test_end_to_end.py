"""bench.end_to_end's figures, worked out by hand, and its refusals; no server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import (
    e2e_budget,
    e2e_evaluators,
    e2e_oracle,
    e2e_plot,
    e2e_report,
    e2e_runs,
    e2e_spent,
    e2e_table,
    end_to_end,
)
from bench.e2e_configurations import CONFIGURATIONS, chosen, server_arguments, workers_of
from bench.e2e_searches import tokens_at_verdicts
from bench.e2e_servers import Gpus, Setup, host_size, server
from specgen_engine.errors import SpecGenError
from specgen_engine.pools.base import busy_seconds
from specgen_engine.replay.trace import BUNDLED, load_traces


def candidate(name: str, speedup: float | None, verdict_s: float, order: int, forks: list[int]) -> dict[str, Any]:
    status = "correct" if speedup else "wrong"
    return {
        "hash": name, "status": status, "speedup": speedup, "submitted_s": verdict_s - 2.0, "verdict_s": verdict_s,
        "order": order, "forks": forks, "source": "fork" if forks else "base", "profiled": bool(speedup),
        "device": "cuda:1", "stages": {"queued": 0.5, "compile": 0.5, "time": 1.0},
    }  # fmt: skip


def fork(n: int, tokens: int, of: str | None) -> dict[str, Any]:
    times = {"started_s": float(n), "finished_s": n + 2.0}
    return {"n": n, "tokens": tokens, "candidate": of, "prefix_reused": 90, "prefix_computed": 10, **times}


ALONE: dict[str, Any] = {
    "configuration": "sequential", "trace": "t", "iteration": 1, "group": "ours", "seed": 0, "began_s": 0.0,
    "client_s": 100.0, "wall_s": 100.0,
    "reasoning_s": 90.0, "reasoning_tokens": 900, "answer_tokens": 100, "fork_tokens": 0,
    "accepted": {"hash": "own", "speedup": 2.0}, "candidates": [candidate("own", 2.0, 100.0, 0, [])], "forks": [],
    "verdict_tokens": [1000], "ended_by": "reasoning",
}  # fmt: skip
FORKED: dict[str, Any] = {
    **ALONE, "configuration": "specgen", "client_s": 40.0, "wall_s": 40.0, "reasoning_s": 40.0,
    "reasoning_tokens": 360, "answer_tokens": 0, "fork_tokens": 300, "accepted": {"hash": "b", "speedup": 1.6},
    "candidates": [candidate("a", None, 10.0, 0, [1]), candidate("b", 1.6, 40.0, 1, [2, 3])],
    "forks": [fork(1, 100, "a"), fork(2, 100, "b"), fork(3, 100, "b")], "verdict_tokens": [190, 660],
    "ended_by": "criterion",
}  # fmt: skip


def test_one_trace_beside_its_sequential_run() -> None:
    found = e2e_report.compare(FORKED, ALONE, 1.5)
    assert (found["met"], found["gain"], found["accepted_over_final"]) == (True, 2.5, 0.8)
    assert found["best_by_time"] == {"25%": 0.0, "50%": 0.8, "75%": 0.8, "100%": 0.8}
    assert found["best_by_tokens"] == {"25%": 0.0, "50%": 0.0, "75%": 0.8, "100%": 0.8}
    assert found["base_rate_over_sequential"] == pytest.approx(0.9)


def test_a_verdict_that_no_decision_followed_came_after_all_tokens() -> None:
    row = {**ALONE, "verdict_tokens": []}
    spent = e2e_report.tokens(row)
    assert e2e_report.best_at_tokens(row, spent - 1) is None
    assert e2e_report.best_at_tokens(row, spent) == e2e_report.accepted(row)


def test_a_gain_has_a_floor_that_no_faster_compiler_takes_away() -> None:
    assert e2e_report.compare(FORKED, ALONE, 1.5)["gain_floor"] == pytest.approx((100 - 0.5 - 0.5) / 40)
    assert e2e_report.compare(FORKED, ALONE, 1.7)["gain_floor"] == 1.0


def test_an_early_end_returns_an_answer_that_nobody_decoded_twice() -> None:
    row = {**FORKED, "answer_tokens": 100}
    assert e2e_report.tokens(row) == 660
    assert e2e_report.engine_tokens([row])["answer"] == 0
    assert e2e_report.tokens({**row, "ended_by": "reasoning"}) == 760


def test_where_the_time_of_a_search_went() -> None:
    own = {"reasoning": 90.0, "answer": 8.0, "queued": 0.5, "compile": 0.5, "check_and_time": 1.0, "rest": 0.0}
    assert e2e_spent.where_time_went(ALONE) == own
    forked = e2e_spent.where_time_went({**FORKED, "client_s": 40.25})
    assert forked == {**own, "reasoning": 2.0, "answer": 36.0, "rest": 0.25}
    draft = {**candidate("b", 1.6, 40.0, 1, []), "source": "draft"}
    assert e2e_spent.where_time_went({**FORKED, "candidates": [draft]}) == {**own, "reasoning": 38.0, "answer": 0.0}
    assert e2e_spent.where_time_went({**FORKED, "accepted": None}) is None


def test_latency_by_what_a_candidate_is_written_in() -> None:
    slow = {**candidate("s", 1.0, 70.0, 0, []), "kind": "cuda", "submitted_s": 5.0}
    row = {**ALONE, "candidates": [slow, {**candidate("q", 1.0, 9.0, 1, []), "kind": "triton"}]}
    said = e2e_report.feedback([row])["by_kind"]
    assert [(kind, one["verdicts"], one["latency_p50_s"]) for kind, one in said.items()] == [
        ("cuda", 1, 65.0), ("triton", 1, 2.0)
    ]  # fmt: skip
    many = [{**candidate("c", 1.0, 10.0, 0, []), "submitted_s": 10.0 - n} for n in range(1, 21)]
    assert e2e_report.latency(many)["latency_p95_s"] == 19.0


def test_the_oracle_takes_this_run_s_rates_and_service_times() -> None:
    (trace,) = load_traces([BUNDLED])
    one = trace.iterations[0]
    answers = e2e_oracle.recorded([(trace, one)])
    first = next(name for name, (answer, _) in answers.items() if answer.endswith("/fork-1.md"))
    scores: dict[str, dict[str, Any]] = {
        name: {"status": "correct", "speedup": 1.6, "import_s": 500.0, "check_s": 500.0} for name, _ in answers.values()
    }
    judged = {**candidate(first, 1.6, 20.0, 0, [1]), "stages": {"queued": 7.0, "compile": 3.0, "check": 1.0}}
    slower = {**judged, "stages": {"compile": 30.0, "check": 1.0}}
    alone = {**ALONE, "trace": trace.name, "client_s": 10_000.0}
    rows = [alone, {**alone, "configuration": "specgen", "candidates": [judged, slower]}]
    report = {"rows": rows, "evaluators": 1, "target": 1.5}

    def letters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return [0] * len(text), [(n, n + 1) for n in range(len(text))]

    gains = e2e_oracle.oracle_gains(report, [(trace, one)], scores, letters)
    mark = one.marks[0]
    tokens = len(one.reasoning[: mark.char_offset]) + len(one.forks[mark.fork])
    assert gains == {trace.name: pytest.approx(10_000 / (tokens / 10 + 0.1 + 4.0))}
    e2e_oracle.name_kinds(rows, answers)
    assert judged["kind"] == answers[first][1]


def test_a_criterion_that_is_not_met_gains_nothing() -> None:
    found = e2e_report.compare(FORKED, ALONE, 1.7)
    assert (found["met"], found["gain"], found["time_over_sequential"]) == (False, 1.0, 0.4)


def test_tokens_by_kind_and_feedback() -> None:
    kinds = e2e_report.engine_tokens([FORKED])
    assert (kinds["fork"], kinds["wasted"], kinds["prefix_reused"]) == (300, 100, 270)
    said = e2e_report.feedback([FORKED])
    assert (said["correct"], said["latency_p50_s"]) == (1, 2.0)
    assert said["correct_per_minute"] == pytest.approx(1.5)
    assert said["correct_per_1000_tokens"] == pytest.approx(1000 / 660)


def test_busy_and_useful_shares_are_of_all_evaluators_and_whole_phases() -> None:
    phase = {"configuration": "specgen", "wall_s": 50.0, "gpu_seconds": {"useful": 20.0, "superseded": 10.0},
             "engine_paused_s": 2.5, "kv": {"written_bytes": 4e9, "restored_bytes": 1e9}}  # fmt: skip
    lines = e2e_report.summarise([ALONE, FORKED], [phase], 2, 1.5)
    assert [line["configuration"] for line in lines] == ["sequential", "specgen"]
    said = lines[1]["evaluators"]
    assert (said["busy"], said["gpu_seconds"]) == (pytest.approx(2.0 / 100), phase["gpu_seconds"])
    assert said["useful"] == pytest.approx(0.02 * 20 / 30)
    assert said["correct_per_wall_minute"] == pytest.approx(60 * 1 / 50)
    assert (said["engine_gpu_seconds"], said["engine_paused_s"]) == (50.0, 2.5)
    assert said["kv"] == {"written_bytes": 4e9, "restored_bytes": 1e9}
    assert lines[0]["evaluators"]["busy"] is None


def test_tokens_are_those_of_the_first_question_that_knew_the_verdict() -> None:
    asked = [{"verdicts": 0, "tokens": 5}, {"verdicts": 2, "tokens": 70}, {"verdicts": 3, "tokens": 90}]
    assert tokens_at_verdicts(asked) == [70, 70, 90]


def test_configurations_share_servers_and_a_budget_needs_sequential() -> None:
    names = [one.name for one in chosen(["pause-and-probe", "specgen", "sequential"])]
    assert names == ["sequential", "specgen", "pause-and-probe"]
    assert CONFIGURATIONS["budget-50"].search("speedup:1.5", 1001).termination == "speedup:1.5|budget:tokens=500"
    assert CONFIGURATIONS["specgen"].search("correct") == ("paragraph:min=800", "correct", None)
    ended = CONFIGURATIONS["new-code-no-repeats"].search("correct")
    assert ended == ("paragraph:min=800:new=code", "correct", {"end_repeats": 0.0})
    with pytest.raises(SpecGenError, match="run that first"):
        CONFIGURATIONS["budget-50"].search("speedup:1.5")
    assert server_arguments("host", "peer") == ["--specgen-kv", "host"]
    assert server_arguments("static", "peer") == ["--specgen-kv", "peer"]
    assert (workers_of("static", 6), workers_of("tier", 6)) == (1, 6)
    assert server_arguments("pause", "off")[:2] == ["--specgen-scheduler-base-share", "0.001"]


def test_gpus() -> None:
    assert Gpus.parse("serve=0,eval=1,2") == Gpus(0, (1, 2))
    assert Gpus.parse("cpu").evaluators == 1
    assert not Gpus.parse("serve=0,eval=1,2").shared
    with pytest.raises(SpecGenError, match="serve=0,eval"):
        Gpus.parse("serve=0")


def test_one_gpu_serves_and_evaluates_but_lends_to_nobody(tmp_path: Path) -> None:
    gpus = Gpus.parse("serve=0,eval=0")
    assert (gpus.shared, gpus.evaluators) == (True, 1)
    setup = Setup(None, (BUNDLED,), gpus, tmp_path, 2, tier="peer")
    with pytest.raises(SpecGenError, match="only evaluator is the serving GPU"), server(setup, "tier", tmp_path):
        pass


def test_the_host_tier_is_as_large_as_what_a_peer_lends() -> None:
    assert host_size(server_arguments("host", "off"), 16) == ["--hicache-size", "18"]
    assert host_size(server_arguments("tier", "peer"), 16) == []


def test_a_search_of_iterations_keeps_its_best_and_adds_up_time_and_tokens() -> None:
    alone = [ALONE, {**ALONE, "iteration": 2, "candidates": [candidate("own2", 3.0, 100.0, 0, [])]}]
    mine = [{**FORKED, "iteration": 2, "candidates": [candidate("c", 1.8, 30.0, 0, [1])]}, FORKED]
    line = e2e_runs.runs([*alone, *mine])[1]
    assert (line["configuration"], line["iterations"], line["seconds"], line["best"]) == ("specgen", 2, 80.0, 1.8)
    assert line["curve"] == [[40.0, 660, 1.6], [70.0, 660 + 190, 1.8]]
    assert line["time_over_sequential"] == pytest.approx(0.4)
    assert line["at_share_of_time"]["25%"] == {"best": 1.6, "sequential": None, "ratio": None}
    assert line["at_share_of_time"]["50%"]["ratio"] == pytest.approx(0.9)
    assert line["at_share_of_tokens"]["100%"]["ratio"] == pytest.approx(1.8 / 3.0)
    assert e2e_runs.runs([*alone, mine[1]])[1:] == []


def test_evaluators_are_busy_while_a_candidate_waits() -> None:
    """One is worked on from 8.5 s to 10 s, on the GPU for the last second; another waits from 8 s to 9.5 s."""
    first, second = candidate("a", 2.0, 10.0, 0, []), candidate("b", 2.0, 11.5, 1, [])
    second |= {"submitted_s": 8.0, "stages": {"queued": 1.5, "compile": 1.0, "time": 1.0}}
    row = {**ALONE, "candidates": [first, second], "client_s": 20.0}
    found = e2e_evaluators.shares([row], 1)
    assert found["waiting_s"] == pytest.approx(1.5)
    assert found["busy_while_waiting"] == pytest.approx(0.5 / 1.5)
    assert found["held"] == pytest.approx((11.5 - 8.5) / 20.0)


def test_evaluators_over_time_of_the_longest_phase() -> None:
    """Held from 8.5 s to 10 s, on the GPU from 9 s, by one of two evaluators."""
    one = candidate("a", 2.0, 10.0, 0, [])
    row = {**ALONE, "began_s": 100.0, "client_s": 11.0, "phase": 2, "candidates": [one]}
    earlier = {**row, "phase": 1, "client_s": 500.0}
    held, busy = e2e_evaluators.over_time([earlier, row, {**row, "candidates": []}], 2, 2.0)
    begin, work = one["verdict_s"] - one["submitted_s"] - one["stages"].get("queued", 0.0), busy_seconds(one["stages"])
    assert len(held) == len(busy) == 6
    assert sum(held) * 2 * 2.0 == pytest.approx(begin)
    assert sum(busy) * 2 * 2.0 == pytest.approx(work)
    assert busy[:4] == [0.0] * 4
    assert busy[4] > 0
    assert e2e_evaluators.shares([row, {**row, "trace": "beside"}], 2)["busy_s"] == pytest.approx(work)
    assert e2e_evaluators.over_time([], 2, 2.0) == ([], [])
    with pytest.raises(ValueError, match="step_s 0"):
        e2e_evaluators.over_time([row], 2, 0)


def test_the_figure_is_drawn_from_a_report(tmp_path: Path) -> None:
    lines = e2e_report.summarise([ALONE, FORKED], [], 1, 1.5)
    e2e_plot.plot({"rows": [ALONE, FORKED], "summary": lines, "seed": 0, "evaluators": 1}, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["f.png"]


def test_a_reasoning_that_cannot_end_in_time_is_left_out() -> None:
    assert e2e_budget.why_left_out(1000, 10.0, 100.0) is None
    assert "1000 tokens at 10/s take 100 s" in str(e2e_budget.why_left_out(1000, 10.0, 99.0))
    assert e2e_budget.why_left_out(1000, None, 1.0) is None
    assert e2e_budget.why_left_out(0, 10.0, 0.0) == "the budget is over"
    assert e2e_budget.longest_first([1, 5, 2], float) == [5, 1, 2]


def test_the_table_says_every_figure_of_a_line() -> None:
    phase = {
        "configuration": "specgen",
        "wall_s": 50.0,
        "gpu_seconds": {"useful": 20.0},
        "engine_paused_s": 3.0,
        "kv": {},
    }
    report = {
        "machine": {"gpu_names": ["H200", "H200"], "gpus": 2, "date": "2026-01-02T00:00:00Z"}, "command": "c",
        "model": "m", "gpus": "serve=0,eval=1", "searches": 8, "target": 1.5,
        "summary": e2e_report.summarise([ALONE, FORKED], [phase], 1, 1.5), "runs": [],
    }  # fmt: skip
    text = e2e_table.markdown(report)
    assert "| t | specgen | 2.0 | 36.0 | 0.5 | 0.5 | 1.0 | 0.0 | 40.0 | 1.60 | 2.50 | - | 2.48 |" in text
    assert "Commits" not in text
    row = next(line for line in text.splitlines() if line.startswith("| specgen | ours | 1/1"))
    assert row.startswith("| specgen | ours | 1/1 | 2.50 | 2.48 |")
    assert "0.00 / 0.80 / 0.80 / 0.80" in row
    assert "| 50 / 20 | 3 |" in text
    heads = [line for line in text.splitlines() if line.startswith("| configuration")]
    assert {head.count("|") for head in heads} == {
        len(one) + 1 for one in (e2e_table.TIME, e2e_table.FEEDBACK, e2e_table.COST)
    }


def test_a_table_says_which_configurations_are_of_another_commit() -> None:
    rows = [
        ALONE | {"commit": "a" * 40, "date": "2026-01-02T00:00:00Z"},
        FORKED | {"commit": "b" * 40, "date": "2026-01-03"},
    ]
    said = e2e_table.commits(e2e_report.summarise(rows, [], 1, 1.5))
    assert said.startswith("Commits: sequential aaaaaaa (2026-01-02); specgen bbbbbbb (2026-01-03). Of another commit")
    rows[1]["commit"] = rows[0]["commit"] + "+changes"
    assert "specgen aaaaaaa+ (2026-01-03). Of another" in e2e_table.commits(e2e_report.summarise(rows, [], 1, 1.5))
    rows[1]["commit"] = rows[0]["commit"]
    assert "Of another commit" not in e2e_table.commits(e2e_report.summarise(rows, [], 1, 1.5))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--configurations", "nothing"], "use some of"),
        (["--gpus", "eval=1"], "serve=0,eval"),
        (["--criterion", "speedup:x"], "--criterion='speedup:x'"),
        (["--resume", "absent.json"], "not readable"),
        (["--json", "absent/r.json"], "make it first"),
    ],
)
def test_bad_input_is_one_line(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--traces", str(BUNDLED), "--gpus", "cpu", "--json", str(tmp_path / "r.json"), *more]
    assert end_to_end.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "other"), [("workers", 2), ("pool_tokens", 9), ("attention_backend", "fa3")])
def test_a_report_goes_on_under_its_own_conditions_alone(name: str, other: object, tmp_path: Path) -> None:
    path, traces = tmp_path / "r.json", load_traces([BUNDLED])
    words = ["--traces", str(BUNDLED), "--gpus", "cpu", "--json", str(path)]
    begun = end_to_end.open_report(end_to_end.parse_arguments(words), traces, Gpus(None))
    words += ["--resume", str(path)]
    before_it_was_said = {key: value for key, value in begun.items() if key not in end_to_end.BEFORE_IT_WAS_SAID}
    path.write_text(json.dumps(before_it_was_said))
    assert end_to_end.open_report(end_to_end.parse_arguments(words), traces, Gpus(None))[name] == begun[name]
    path.write_text(json.dumps(begun | {name: other}))
    with pytest.raises(SpecGenError, match=f"its {name} is {other!r}, not "):
        end_to_end.open_report(end_to_end.parse_arguments(words), traces, Gpus(None))


def test_what_is_played_again_leaves_the_report_and_every_row_keeps_its_commit(tmp_path: Path) -> None:
    path, traces = tmp_path / "old.json", load_traces([BUNDLED])
    words = ["--traces", str(BUNDLED), "--gpus", "cpu", "--json", str(tmp_path / "new.json")]
    begun = end_to_end.open_report(end_to_end.parse_arguments(words), traces, Gpus(None))
    phases = [{"configuration": "sequential"}, {"configuration": "specgen"}]
    path.write_text(json.dumps(begun | {"commit": "old", "rows": [ALONE, FORKED], "phases": phases}))
    words += ["--resume", str(path), "--configurations", "sequential", "specgen", "--again", "specgen"]
    found = end_to_end.open_report(end_to_end.parse_arguments(words), traces, Gpus(None))
    assert found["rows"] == [ALONE | {"commit": "old", "date": begun["machine"]["date"]}]
    assert found["phases"] == phases[:1]


@pytest.mark.parametrize(
    "more",
    [
        ["--again", "specgen"],
        ["--resume", "r.json", "--again", "specgen"],
        ["--resume", "o.json", "--again", "adaptive"],
    ],
)
def test_rows_are_not_dropped_from_the_only_file_that_holds_them(more: list[str]) -> None:
    with pytest.raises(SystemExit):
        end_to_end.parse_arguments(["--traces", "t", "--gpus", "cpu", "--json", "r.json", *more])


def test_rows_of_two_machines_are_not_put_side_by_side() -> None:
    here = end_to_end.describe_machine()
    end_to_end.refuse_other_machine({"rows": [ALONE], "machine": here | {"driver": "other", "kernel": "other"}})
    end_to_end.refuse_other_machine({"rows": [ALONE], "machine": here | {"torch": f"{here['torch']}+cu130"}})
    end_to_end.refuse_other_machine({"rows": [], "machine": here | {"gpu": "other"}})
    with pytest.raises(SpecGenError, match="played with gpu 'other'"):
        end_to_end.refuse_other_machine({"rows": [ALONE], "machine": here | {"gpu": "other"}})


def test_nothing_is_played_without_a_budget(tmp_path: Path) -> None:
    """How a report of a GPU is finished on a machine without one: no server starts, what was left out stays said."""
    path = tmp_path / "r.json"
    words = ["--traces", str(BUNDLED), "--gpus", "cpu", "--json", str(path)]
    begun = end_to_end.open_report(end_to_end.parse_arguments(words), load_traces([BUNDLED]), Gpus(None))
    left = [{"configuration": "sequential", "trace": "t", "iteration": 1, "seed": 0, "why": "w"}]
    machine = begun["machine"] | {"gpu": "other"}
    path.write_text(json.dumps(begun | {"machine": machine, "rows": [ALONE, FORKED], "left_out": left}))
    assert end_to_end.main([*words, "--resume", str(path), "--budget-s", "0"]) == 0
    report = json.loads(path.read_text())
    assert (report["left_out"], [line["gain"] for line in report["summary"]]) == (left, [1.0, 2.5])

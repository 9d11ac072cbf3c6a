"""What a run leaves: best.py, report.html and the JSON (specgen.optimize/1); written whole, after every iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from specgen_engine.agent.base import Attempt, Spent, best_of
from specgen_engine.agent.figures import Lane, Point, improvements, lane_of, progress_of
from specgen_engine.agent.prompts import describe

LEFT, WIDTH = 70.0, 900.0
ROW, LANE_GAP = 9.0, 10.0
CHART_LEFT, CHART_WIDTH, CHART_TOP, CHART_HEIGHT = 40.0, 410.0, 10.0, 180.0


def as_dict(
    task: str, settings: dict[str, Any], attempts: Sequence[Attempt], spent: Spent, ended_by: str
) -> dict[str, Any]:
    """The measurements of specgen.optimize/1, beside the head that new_report() makes."""
    best = best_of(attempts)
    return {
        "task": task,
        "settings": settings,
        "ended_by": ended_by,
        "seconds": round(spent.seconds, 3),
        "tokens": spent.tokens,
        "evaluator_seconds": round(spent.gpu_seconds, 3),
        "best": None if best is None else {"search": best.search, "iteration": best.iteration, "speedup": best.speedup},
        "progress": [point._asdict() for point in progress_of(attempts)],
        "attempts": [one.to_dict() for one in attempts],
    }


def as_html(task: str, settings: dict[str, Any], attempts: Sequence[Attempt], spent: Spent, ended_by: str) -> str:
    """One self-contained page: timeline, speed-up over time and over tokens, iterations, code with differences."""
    environment = Environment(loader=PackageLoader("specgen_engine.agent", "."), autoescape=True)
    points = progress_of(attempts)
    last_s = max((one.ended_s or one.generated_s for one in attempts), default=1.0)
    return environment.get_template("report.html.j2").render(
        task=task,
        settings=settings,
        ended_by=ended_by,
        spent=spent,
        best=best_of(attempts),
        timeline=_timeline([lane_of(one) for one in attempts], last_s),
        charts=[
            _chart(points, [point.seconds for point in points], last_s, "seconds"),
            _chart(points, [float(point.tokens) for point in points], float(max(spent.tokens, 1)), "tokens"),
        ],
        rows=[_row(one) for one in attempts],
        code=[
            {"speedup": one.speedup, "search": one.search, "iteration": one.iteration, "source": one.source,
             "profile": one.judgement.profile if one.judgement else "", "diff": diff}
            for one, diff in improvements(attempts)
        ],
    )  # fmt: skip


def _timeline(lanes: Sequence[Lane], last_s: float) -> dict[str, Any]:
    def x(seconds: float) -> float:
        return round(LEFT + WIDTH * min(seconds / last_s, 1.0), 1)

    drawn, y = [], 4.0
    for lane in lanes:
        bars = [
            {
                "kind": bar.kind, "title": bar.title, "x": x(bar.start), "y": round(y + bar.row * ROW, 1),
                "width": round(max(x(bar.end) - x(bar.start), 1.0), 1), "height": ROW - 2,
            }
            for bar in lane.bars
        ]  # fmt: skip
        height = lane.rows * ROW
        end_x = None if lane.ended_s is None else x(lane.ended_s)
        label = f"{lane.search} / {lane.iteration}"
        drawn.append({"label": label, "y": round(y, 1), "bars": bars, "height": height, "end_x": end_x})
        y += height + LANE_GAP
    ticks = [{"x": x(last_s * part / 5), "label": f"{last_s * part / 5:.0f} s"} for part in range(6)]
    return {"lanes": drawn, "ticks": ticks, "height": round(y + 18, 1)}


def _chart(points: Sequence[Point], at: Sequence[float], last: float, label: str) -> dict[str, Any]:
    top = max((point.speedup for point in points), default=1.0) * 1.1
    path = ""
    for value, point in zip(at, points, strict=True):
        x = CHART_LEFT + CHART_WIDTH * min(value / last, 1.0)
        y = CHART_TOP + CHART_HEIGHT * (1 - point.speedup / top)
        path += f"H{x:.1f}V{y:.1f}" if path else f"M{x:.1f} {CHART_TOP + CHART_HEIGHT:.1f}V{y:.1f}"
    return {
        "label": label,
        "path": f"{path}H{CHART_LEFT + CHART_WIDTH:.1f}" if path else "",
        "x": [{"at": CHART_LEFT + CHART_WIDTH * part / 4, "label": f"{last * part / 4:.0f}"} for part in range(5)],
        "y": [
            {"at": CHART_TOP + CHART_HEIGHT * (1 - part / 4), "label": f"{top * part / 4:.1f}x"} for part in range(5)
        ],
    }


def _row(one: Attempt) -> dict[str, Any]:
    search = one.generation.search or {}
    if one.judgement is not None:
        verdict = describe(one.judgement)
    else:
        verdict = "no module in the answer" if one.source is None else "not judged yet"
    judged = sum(candidate["status"] not in (None, "cancelled") for candidate in search.get("candidates", []))
    return {
        "search": one.search, "iteration": one.iteration, "verdict": verdict,
        "speedup": f"{one.speedup:.2f}x" if one.speedup else "", "tokens": one.generation.completion_tokens,
        "fork_tokens": one.generation.fork_tokens, "forks": len(search.get("forks", [])),
        "verdicts": judged or int(one.judgement is not None),
        "seconds": (one.ended_s or one.generated_s) - one.started_s,
        "ended_by": search.get("ended_by", "reasoning"),
    }  # fmt: skip

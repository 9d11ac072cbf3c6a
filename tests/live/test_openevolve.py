"""openevolve as its package has it, against a replaying server: its prompt holds the task, and it never knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.evaluation.base import Candidate
from specgen_engine.replay.trace import BUNDLED, load_traces
from specgen_engine.serving.command import prepare
from specgen_engine.serving.preload import Template
from specgen_engine.serving.process import Server, running_server
from tests.live.conftest import ENVIRONMENT

EVALUATOR = '''"""A program that defines ModelNew is better than one that doesn't; kernels are judged by the server."""


def evaluate(path):
    return {"combined_score": 1.0 if "class ModelNew" in open(path).read() else 0.1}
'''
CONFIG = """
max_iterations: 1
diff_based_evolution: false
llm:
  api_base: {url}/v1
  api_key: none
  models: [{{name: default, weight: 1.0}}]
  max_tokens: 9000
  temperature: 0.6
  timeout: 1200
  retries: 0
evaluator: {{timeout: 60, cascade_evaluation: false, parallel_evaluations: 1}}
database: {{num_islands: 1}}
"""


def evolve(server: Server, folder: Path) -> Path:
    """One iteration from the bundled task; returns the folder of its results."""
    (trace,) = load_traces([BUNDLED])
    program, evaluator, config = folder / "program.py", folder / "evaluator.py", folder / "config.yaml"
    program.write_text(trace.task_source)
    evaluator.write_text(EVALUATOR)
    config.write_text(CONFIG.format(url=server.url))
    command = [
        Path(sys.executable).with_name("openevolve-run"),
        program,
        evaluator,
        "--config",
        config,
        "--output",
        folder / "out",
    ]
    done = subprocess.run(
        [*map(str, command), "--iterations", "1"], capture_output=True, text=True, timeout=1500, cwd=folder,
        env={**os.environ, "OPENAI_API_KEY": "none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_unchanged_agent_gets_a_grafted_kernel(template: Template, tmp_path: Path) -> None:
    (trace,) = load_traces([BUNDLED])
    launch = prepare(
        ["--tiny-layers", "12", "--replay", str(trace.path), "--reasoning-parser", "deepseek-r1",
         "--specgen-tasks", "prompt", "--specgen-trigger", "every:600", "--specgen-termination", "speedup:1.2",
         "--specgen-scheduler-base-share", "0.25", "--specgen-evaluation-compile-s", "600"]
    )  # fmt: skip
    environment = {**launch.environment, **ENVIRONMENT}
    with running_server(launch.arguments, tmp_path / "log", environment, template=template) as server:
        results = evolve(server, tmp_path)
        (row,) = httpx.get(f"{server.url}/specgen/searches").json()["searches"]
        record = httpx.get(f"{server.url}/specgen/searches/{row['id']}").json()
    assert record["named"] is False
    assert record["task_hash"] == trace.task_hash
    assert record["ended_by"] == "criterion", record["reason"]
    assert record["accepted"]["source"] == "fork"
    assert record["reasoning_tokens"] < record["recorded_reasoning_tokens"]
    best = (results / "best" / "best_program.py").read_text()
    recorded = [extract_candidate(text) for text in trace.iterations[0].forks.values()]
    assert Candidate(best).hash == record["accepted"]["hash"]
    assert Candidate(best).hash in {Candidate(source).hash for source in recorded if source}
    info = json.loads((results / "best" / "best_program_info.json").read_text())
    assert info["metrics"]["combined_score"] == 1.0

"""Modes of SGLang that forks work in: two tensor-parallel ranks, LoRA; and what is refused before the engine starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specgen_engine.controller.answers import extract_candidate
from specgen_engine.replay.trace import load_traces
from specgen_engine.serving.models import tiny_model
from tests.engine.conftest import BUNDLED, TASK, Client, StartServer
from tests.engine.test_fork_kv import tokens_of

# Not the recorded one: such a search is computed, not replayed.
OTHER_TASK = TASK + "\n# not recorded\n"
SEARCH = {"task": OTHER_TASK, "trigger": "every:12", "termination": "none", "fork": {"max_tokens": 10}}
PROMPTS = ("Tell me about rivers.", "Explain how a bicycle stays upright.", "Write a story about a lighthouse.")
BASE_TOKENS = 56


def forks_match_a_flushed_cache(client: Client, **options: Any) -> int:
    """Every fork's tokens equal those of the same input computed anew; returns how many were compared."""
    client.chat("warm", SEARCH, max_tokens=4, **options)  # the first search waits for the pool, its base does not
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        answers = list(
            threads.map(lambda prompt: client.chat(prompt, SEARCH, max_tokens=BASE_TOKENS, **options), PROMPTS)
        )
    forks = []
    for answer in answers:
        _, found, report = tokens_of(answer, client)
        for ids, record in zip(found, report["forks"], strict=True):
            if record["state"] in ("stop", "length"):
                assert record["prefix_reused"] >= record["prompt_tokens"] + record["at_token"] - 2
                forks.append(ids)
    adapter = (options.get("extra_body") or {}).get("lora_path")
    for fork in forks:
        client.flush()
        fresh = generate(client, fork["input_ids"], len(fork["output_ids"]), adapter)
        assert fresh["meta_info"]["cached_tokens"] == 0
        assert fresh["output_ids"] == fork["output_ids"]
    return len(forks)


def generate(client: Client, ids: list[int], tokens: int, adapter: str | None) -> dict[str, Any]:
    body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": tokens}, "lora_path": adapter}
    answer = client.post("/generate", body)
    answer.raise_for_status()
    return answer.json()


# ---- tensor parallel


@pytest.fixture(scope="module")
def two_ranks(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    cache = str(tmp_path_factory.mktemp("builds"))
    replay = ("--replay", str(BUNDLED), "--reasoning-parser", "deepseek-r1", "--specgen-evaluation-cache", cache)
    # Both ranks spin for each other on the cores that judge candidates: verdicts come late there.
    patient = ("--specgen-grace-s", "60", "--specgen-evaluation-check-s", "120", "--specgen-evaluation-time-s", "120")
    with start_server("--tiny", "--tp-size", "2", "--specgen-fork-per-search", "8", *replay, *patient) as client:
        yield client


@pytest.mark.slow
def test_two_ranks_reuse_each_others_forks_kv(two_ranks: Client) -> None:
    """A rank whose fork point held the wrong KV, or none, would spoil the sum over both ranks, and so every token."""
    assert forks_match_a_flushed_cache(two_ranks) >= 6


@pytest.mark.slow
def test_two_ranks_leave_the_bases_tokens_alone(two_ranks: Client) -> None:
    forked = two_ranks.chat(PROMPTS[0], {**SEARCH, "trigger": "every:4"}, max_tokens=BASE_TOKENS)
    two_ranks.flush()
    plain = two_ranks.chat(PROMPTS[0], max_tokens=BASE_TOKENS)
    assert len(forked.model_dump()["sglext"]["specgen"]["forks"]) >= 8
    assert forked.choices[0].message.reasoning_content == plain.choices[0].message.reasoning_content


@pytest.mark.slow
def test_two_ranks_graft(two_ranks: Client) -> None:
    """Both ranks' samplers replay: one that did not would decode other tokens than its sibling."""
    recorded = load_traces([BUNDLED])[0].iterations[0]
    search = {"task": TASK, "trigger": "every:300", "termination": "correct"}
    answer = two_ranks.chat("Make this faster.", search, max_tokens=8000).model_dump()
    report, message = answer["sglext"]["specgen"], answer["choices"][0]["message"]
    assert report["ended_by"] in ("criterion", "reasoning")
    assert report["accepted"] is not None, report
    assert report["accepted"]["speedup"] > 0
    assert recorded.reasoning.startswith(message["reasoning_content"].strip()[:2000])
    answers = [extract_candidate(text) for text in (*recorded.forks.values(), recorded.final)]
    assert extract_candidate(message["content"]) in answers


# ---- LoRA


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its random weights in a file: SGLang loads no adapter beside dummy weights."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(tiny_model(), folder)
    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of rank 4 for the tiny model, strong enough to change its tokens."""
    folder = tmp_path_factory.mktemp("adapter")
    config = json.loads((tiny_model() / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    # SGLang stacks the three into one qkv_proj: an adapter of q_proj alone does not load.
    rows = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    rows["v_proj"] = rows["k_proj"]
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, heads in rows.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(4, hidden, generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(heads * head, 4, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": list(rows), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


@pytest.mark.slow
def test_forks_run_under_their_bases_adapter(start_server: StartServer, weights: Path, adapter: Path) -> None:
    model = ("--model-path", str(weights), "--cpu", "--specgen-fork-per-search", "8")
    with start_server(*model, "--lora-paths", f"a={adapter}", "--lora-backend", "torch_native") as client:
        assert forks_match_a_flushed_cache(client, extra_body={"lora_path": "a"}) >= 6
        prompt = list(range(500, 540))
        assert generate(client, prompt, 8, None)["output_ids"] != generate(client, prompt, 8, "a")["output_ids"]


# ---- modes that need no more than a flag


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [("--enable-streaming-session",), ("--enable-mixed-chunk", "--chunked-prefill-size", "32"),
     ("--enable-priority-scheduling",), ("--stream-interval", "8"), ("--incremental-streaming-output",)],
    ids=" ".join,
)  # fmt: skip
def test_forks_work_beside(start_server: StartServer, arguments: tuple[str, ...]) -> None:
    with start_server("--tiny", "--specgen-fork-per-search", "8", *arguments) as client:
        assert forks_match_a_flushed_cache(client) >= 6

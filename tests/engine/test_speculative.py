"""Forks, grafts and early ends under speculative decoding with a chain of drafts: SGLang's own EAGLE worker on the CPU.

Its kernels are torch here (speculative_cpu.py); worker, batches, allocator, radix tree and overlap scheduling are
SGLang's. Steps accept one to four tokens. What the target would say is computed by transformers, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.conftest import TASK, Client, StartServer
from tests.engine.eagle_models import write_models
from tests.engine.test_fork_kv import PROMPTS, tokens_of
from tests.engine.test_storm import check_storm, scheduler_state
from tests.template import HAS_STAND_INS, new_template

if not HAS_STAND_INS:
    pytest.skip("the kernels in torch are written for SGLang 0.5.17's worker", allow_module_level=True)

OTHER_TASK = TASK + "\n# not recorded\n"
BASE_TOKENS = 56
SEARCH = {"task": OTHER_TASK, "trigger": "every:5", "termination": "none", "fork": {"max_tokens": 10}}


@pytest.fixture(scope="session")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("eagle"))


def words(models: tuple[Path, Path]) -> tuple[str, ...]:
    target, draft = models
    return (
        *("--model-path", str(target), "--cpu", "--specgen-fork-per-search", "16"),
        *("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(draft)),
        *("--speculative-num-steps", "3", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
        *("--speculative-draft-attention-backend", "intel_amx"),
    )


@pytest.fixture(scope="module")
def server(start_server: StartServer, eagle: tuple[Path, Path]) -> Iterator[Client]:
    with start_server(*words(eagle)) as client:
        client.chat("warm", SEARCH, max_tokens=4)  # the first search waits for the pool, its base does not
        yield client


class Oracle:
    """The target without SGLang, greedy, a whole pass over everything a token."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def says(self, ids: list[int], tokens: int) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def oracle(eagle: tuple[Path, Path]) -> Oracle:
    return Oracle(eagle[0])


def searches(client: Client, search: dict[str, Any], tokens: int = BASE_TOKENS) -> list[tuple[Any, ...]]:
    """(answer, base ids, forks with ids, report) of one search a prompt, all at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        answers = list(threads.map(lambda prompt: client.chat(prompt, search, max_tokens=tokens), PROMPTS))
    return [(answer, *tokens_of(answer, client)) for answer in answers]


def check_forks(client: Client, oracle: Oracle, least: int, page: int = 1) -> None:
    """Forks and bases say what the target says to the same input, and forks reuse what was published for them."""
    forks = []
    for answer, base, found, report in searches(client, SEARCH):
        prompt = found[0]["input_ids"][: report["prompt_tokens"]]
        assert base == oracle.says(prompt, BASE_TOKENS)
        assert answer.usage.completion_tokens == len(base) == BASE_TOKENS
        for ids, record in zip(found, report["forks"], strict=True):
            whole = report["prompt_tokens"] + record["at_token"]
            assert record["at_token"] % 5 == 0
            assert ids["input_ids"][:whole] == prompt + base[: record["at_token"]]
            if record["state"] in ("stop", "length"):
                assert record["tokens"] == len(ids["output_ids"]) == SEARCH["fork"]["max_tokens"]
                assert record["prefix_reused"] >= whole - page - 1
                forks.append((ids["input_ids"], ids["output_ids"], whole - record["prefix_inserted"]))
        assert report["fork_tokens"] == sum(record["tokens"] for record in report["forks"])
    assert len(forks) >= least
    if page == 1:  # 1: tokens after the trigger's were accepted in the same step; 2: its own KV is not there yet
        assert {short for _, _, short in forks} == {1, 2}
    assert all(output == oracle.says(ids, len(output)) for ids, output, _ in forks)
    for ids, output, _ in forks[::4]:
        client.flush()
        fresh = client.generate(ids, len(output))
        assert fresh["meta_info"]["cached_tokens"] == 0
        assert fresh["output_ids"] == output


def test_forks_and_bases_say_what_the_target_says(server: Client, oracle: Oracle) -> None:
    check_forks(server, oracle, least=20)


@pytest.mark.slow
def test_a_stop_inside_an_accepted_run_cuts_there(server: Client, oracle: Oracle) -> None:
    prompt = list(range(500, 540))
    whole = oracle.says(prompt, 24)
    for tokens in range(1, 13):
        answer = server.generate(prompt, tokens)
        assert answer["output_ids"] == whole[:tokens]
        assert answer["meta_info"]["completion_tokens"] == tokens
    for token in whole[4:12]:
        params = {"temperature": 0, "max_new_tokens": 24, "stop_token_ids": [token]}
        answer = server.post("/generate", {"input_ids": prompt, "sampling_params": params}).json()
        assert answer["output_ids"] == whole[: whole.index(token) + 1]


@pytest.mark.slow
def test_no_fork_is_made_behind_the_bases_end(server: Client) -> None:
    """The last step may accept more tokens than the base may still have; a trigger among them must not fire."""
    for tokens in range(8, 16):
        answer = server.chat(PROMPTS[0], {**SEARCH, "trigger": "every:1"}, max_tokens=tokens)
        base, found, report = tokens_of(answer, server)
        assert len(base) == answer.usage.completion_tokens == tokens
        assert found
        assert all(record["at_token"] < tokens for record in report["forks"])


@pytest.mark.slow
def test_the_entropy_trigger_reads_the_token_it_fires_at(server: Client, oracle: Oracle) -> None:
    ids, found, report = tokens_of(server.chat(PROMPTS[1], SEARCH, max_tokens=BASE_TOKENS), server)
    prompt = found[0]["input_ids"][: report["prompt_tokens"]]
    with torch.inference_mode():
        logits = oracle.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    best = logits.log_softmax(-1).topk(8).values.softmax(-1)
    nats = (-(best * best.log()).sum(-1)).tolist()[: BASE_TOKENS - 1]
    high = sorted(nats)[-13:-5]  # so that it fires at a handful or more
    threshold = max(pairwise(high), key=lambda pair: pair[1] - pair[0])
    search = {**SEARCH, "trigger": f"entropy:{sum(threshold) / 2}", "fork": {"max_tokens": 2}}
    answer = server.chat(PROMPTS[1], search, max_tokens=BASE_TOKENS)
    base, _, report = tokens_of(answer, server)
    assert base == ids
    unsure = [at for at, value in enumerate(nats, 1) if value > sum(threshold) / 2]
    assert [record["at_token"] for record in report["forks"]] == unsure


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--disable-overlap-schedule",),
        ("--chunked-prefill-size", "32"),
        ("--specgen-scheduler-base-share", "0.5"),
        ("--tp-size", "2"),
    ],
    ids=" ".join,
)
def test_modes(start_server: StartServer, eagle: tuple[Path, Path], oracle: Oracle, arguments: tuple[str, ...]) -> None:
    with start_server(*words(eagle), *arguments) as client:
        client.chat("warm", SEARCH, max_tokens=4)
        check_forks(client, oracle, least=20)


@pytest.mark.slow
def test_pages(start_server: StartServer, eagle: tuple[Path, Path], oracle: Oracle, tmp_path: Path) -> None:
    with (
        new_template(tmp_path / "log", "--page-size", "16") as paged,
        start_server(*words(eagle), "--page-size", "16", using=paged) as client,
    ):
        client.chat("warm", SEARCH, max_tokens=4)
        check_forks(client, oracle, least=20, page=16)


@pytest.mark.slow
def test_forks_that_give_way_go_on_as_if_nothing_had_been(
    start_server: StartServer, eagle: tuple[Path, Path], oracle: Oracle
) -> None:
    """A pool too small for everybody: running forks are retracted, draft slots too; 90 tokens end before the base."""
    search = {**SEARCH, "trigger": "every:20", "fork": {"max_tokens": 90}}
    with start_server(*words(eagle), "--max-total-tokens", "1400") as client:
        client.chat("warm", SEARCH, max_tokens=4)
        with ThreadPoolExecutor(4) as threads:
            running = [threads.submit(client.chat, prompt, search, max_tokens=200) for prompt in PROMPTS]
            long = [threads.submit(client.generate, list(range(at, at + 400)), 20) for at in (1000, 2000, 3000, 4000)]
            answers = [one.result() for one in running]
            others = [one.result()["output_ids"] for one in long]
        retracted = scheduler_state(client)["forks_retracted"]
        compared = 0
        for answer in answers:
            base, found, report = tokens_of(answer, client)
            assert base == oracle.says(found[0]["input_ids"][: report["prompt_tokens"]], 200)
            for ids, record in zip(found, report["forks"], strict=True):
                if record["state"] == "length":
                    assert ids["output_ids"] == oracle.says(ids["input_ids"], 90)
                    compared += 1
        assert others == [oracle.says(list(range(at, at + 400)), 20) for at in (1000, 2000, 3000, 4000)]
        assert retracted > 0
        assert compared > 0


# ---- grafts: the texts are dictated (speculative_script.py), the candidate is judged for real

KERNEL = """Softmax and the weight, in place.

```python
import torch.nn as nn


class ModelNew(nn.Module):
    def forward(self, x, weight):
        return x.softmax(dim=-1).mul_(weight)
```
"""
MUSING = "".join(f"Row {number} is summed first, then scaled; the weight comes last. " for number in range(400))


def dictate(folder: Path, target: Path, base: str) -> tuple[dict[str, str], list[int]]:
    """(environment, base's ids) of a server whose bases say `base` and whose forks answer with the kernel."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in (base, KERNEL)]
    script = {"base": encoded[0], "fork": [*encoded[1], tokenizer.eos_token_id], "step_s": 0.02}
    (folder / "script.json").write_text(json.dumps(script))
    return {"SPECGEN_TEST_SCRIPT": str(folder / "script.json")}, encoded[0]


@pytest.mark.slow
@pytest.mark.parametrize("closes", [False, True], ids=["in the reasoning", "after its end"])
def test_a_graft_takes_over_where_the_reasoning_was_cut(
    start_server: StartServer, eagle: tuple[Path, Path], tmp_path: Path, closes: bool
) -> None:
    """Ended while the base reasons, or while it writes an answer that loses: not a token more, not one less."""
    reasoning = MUSING[:700] if closes else MUSING
    variables, said = dictate(tmp_path, eagle[0], reasoning + ("\n</think>\n" + MUSING if closes else ""))
    tokenizer = AutoTokenizer.from_pretrained(eagle[0])
    parsed = ("--reasoning-parser", "deepseek-r1", "--specgen-grace-s", "60")
    search = {"task": TASK, "trigger": "every:53", "termination": "correct", "fork": {"max_tokens": 200}}
    with start_server(*words(eagle), *parsed, variables=variables) as client:
        answer = client.chat("Make this faster.", search, max_tokens=4000)
        base, found, report = tokens_of(answer, client)
        time.sleep(0.5)
        client.flush()
    assert report["ended_by"] == "criterion", report
    assert len(base) < len(said)
    assert base == said[: len(base)]
    message = answer.model_dump()["choices"][0]["message"]
    assert message["content"].strip() == KERNEL.strip()
    kept = tokenizer.decode(base)
    assert message["reasoning_content"].strip() == kept.strip()
    if closes:
        assert kept == reasoning
    accepted = [ids["output_ids"] for ids in found if tokenizer.decode(ids["output_ids"]).startswith(KERNEL)]
    closing = len(tokenizer.encode("\n</think>\n\n", add_special_tokens=False))
    assert answer.usage.completion_tokens - len(base) in {
        closing + len(ids) + more for ids in accepted for more in (-1, 0)
    }


# ---- a storm


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_storm_leaves_nothing_behind(
    start_server: StartServer, eagle: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    options = ("--specgen-fork-total", "12", "--max-total-tokens", "16384")
    with start_server(*words(eagle), *options, "--specgen-evaluation-cache", str(tmp_path)) as client:
        monkeypatch.undo()
        check_storm(client, scratch, 48)

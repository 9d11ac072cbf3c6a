"""The scheduler extension against a mock scheduler: what it publishes, where it inserts, whom it moves.

The mock keeps a request's KV in the shape of every release in the table of versions, and every test runs on each.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specgen_engine import versions
from specgen_engine.config import SpecGenConfig
from specgen_engine.errors import HookError
from specgen_engine.protocol import EndSearch, ForkPoint, TriggerFired, WatchSearch, fork_rid
from specgen_engine.scheduler.extension import SchedulerExtension
from specgen_engine.scheduler.hooks import attach, internal_state, queued, retraction_order, update_running_batch

PROMPT = [1, 2, 3, 4]


@pytest.fixture(autouse=True, params=versions.RELEASES, ids=lambda release: release.version)
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> versions.Release:
    monkeypatch.setattr(versions, "current", lambda: request.param)
    return request.param


class Tree:
    """As SGLang does it: the pages of the fill range (0.5.17) or up to a length (0.5.23) are in the tree afterwards."""

    is_eagle = False

    def __init__(self, page_size: int = 1) -> None:
        self.page_size = page_size

    def cache_unfinished_req(self, req: Req) -> None:
        req.cache_protected_len = req.extend_range.end // self.page_size * self.page_size

    def checkpoint(self, req: Req, up_to: int) -> None:
        assert req.filled, "checkpoint reads the fill ids"
        req.cache_protected_len = up_to // self.page_size * self.page_size

    def evictable_size(self) -> int:
        return 0

    def supports_swa(self) -> bool:
        return False


class Kv:
    """Where 0.5.23 keeps what 0.5.17 has on the request itself."""

    def __init__(self, req: Req) -> None:
        self.req = req

    @property
    def holds_kv(self) -> bool:
        return self.req.req_pool_idx is not None

    @property
    def kv_committed_len(self) -> int:
        return self.req.kv_committed_len

    @property
    def cache_protected_len(self) -> int:
        return self.req.cache_protected_len


class Req:
    def __init__(self, rid: str, text: str = "", prompt: list[int] = PROMPT, max_new: int = 100) -> None:
        self.rid, self.origin_input_ids, self.output_ids = rid, prompt, [ord(c) for c in text]
        self.kv_committed_len = len(prompt) + len(text)
        self.cache_protected_len = len(prompt)
        self.req_pool_idx: int | None = 0
        self.extend_range: Any = SimpleNamespace(start=0, end=len(prompt))
        self.is_retracted, self.retraction_count, self.done = False, 0, False
        self.sampling_params = SimpleNamespace(max_new_tokens=max_new)
        self.kv, self.filled = Kv(self), False

    def finished(self) -> bool:
        return self.done

    def _refresh_fill_ids(self) -> None: ...

    def refresh_fill_ids(self) -> None:
        self.filled = True

    def set_extend_range(self, start: int, end: int) -> None:
        self.extend_range = SimpleNamespace(start=start, end=end)


class Batch:
    def __init__(self, *reqs: Req) -> None:
        self.reqs, self.batch_is_full, self.fits = list(reqs), True, len(reqs)

    def release_req(self, index: int, remaining: int, server_args: Any = None) -> None:
        req = self.reqs[index]
        req.req_pool_idx, req.is_retracted = None, True
        req.retraction_count += 1

    def filter_batch(self, keep_indices: list[int] | None = None) -> None:
        kept = [i for i, req in enumerate(self.reqs) if not req.done] if keep_indices is None else keep_indices
        self.reqs = [self.reqs[i] for i in kept]

    def check_decode_mem(self) -> bool:
        return len(self.reqs) <= self.fits


class Scheduler:
    def __init__(self, *running: Req, page_size: int = 1) -> None:
        self.running_batch, self.last_batch, self.chunked_req = Batch(*running), None, None
        self.waiting_queue: list[Req] = []
        self.tree_cache, self.page_size, self.server_args = Tree(page_size), page_size, None
        self.max_running_requests, self.max_total_num_tokens = 16, 10_000
        self.new_token_ratio_tracker = SimpleNamespace(current=0.5)
        self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 10_000)
        self.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: chr(ids[0]))
        self.sent: list[TriggerFired] = []
        sender = SimpleNamespace(send_output=self.sent.append)
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=sender)
        self.specgen: Any = None

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        self.waiting_queue.append(req)
        queued(None, self, req, is_retracted)


def extension_of(
    mock: Scheduler, trigger: str = "every:3", opened: bool = True, base_share: float = 1.0
) -> SchedulerExtension:
    extension = mock.specgen = SchedulerExtension(
        mock, SpecGenConfig.model_validate({"scheduler": {"base_share": base_share}})
    )
    extension.watch(WatchSearch(rid="base", trigger=trigger, open_mark="<think>", close_mark="</think>", opened=opened))
    return extension


def test_a_trigger_fires_at_the_token_that_completes_it_and_inserts_the_committed_prefix() -> None:
    base = Req("base", "abcd")
    base.kv_committed_len -= 1
    scheduler = Scheduler(base)
    extension_of(scheduler).observe([base])
    (fired,) = scheduler.sent
    assert (fired.trigger, fired.length, fired.reasoning_tokens) == ("every:3", len(PROMPT) + 3, 3)
    assert fired.inserted == len(PROMPT) + 3
    assert base.extend_range.end == len(PROMPT), "the request's own fill range must be put back"


def test_pages_round_down_and_nothing_is_inserted_twice() -> None:
    base = Req("base", "abcdefgh", prompt=list(range(16)))
    scheduler = Scheduler(base, page_size=16)
    extension = extension_of(scheduler, "every:4")
    extension.observe([base])
    assert [fired.inserted for fired in scheduler.sent] == [16, 16]
    extension.observe([base])
    assert len(scheduler.sent) == 2


def test_only_reasoning_tokens_count() -> None:
    base = Req("base", "<think>abc</think>defghi")
    scheduler = Scheduler(base)
    extension_of(scheduler, "every:3", opened=False).observe([base])
    assert scheduler.sent[0].length == len(PROMPT) + len("<think>abc")
    assert all(fired.length <= len(PROMPT) + len("<think>abc</think>") for fired in scheduler.sent)


def test_a_retracted_or_ended_search_fires_nothing() -> None:
    base = Req("base", "abcdef")
    base.is_retracted = True
    scheduler = Scheduler(base)
    extension = extension_of(scheduler)
    extension.observe([base])
    base.is_retracted = False
    extension.end(EndSearch(rid="base", scripts="x"))
    extension.observe([base])
    assert scheduler.sent == []


@pytest.mark.parametrize(
    ("place", "state", "inserted"),
    [("running", "running", 6), ("finished", "finished", 0), ("waiting", "waiting", 0), ("nowhere", "unknown", 0)],
)
def test_a_fork_point_answers_for_every_state_of_its_base(place: str, state: str, inserted: int) -> None:
    base = Req("base", "abcdef")
    scheduler = Scheduler()
    if place in ("running", "finished"):
        scheduler.running_batch.reqs.append(base)
        base.done = place == "finished"
    extension = extension_of(scheduler)
    if place == "waiting":
        scheduler.waiting_queue.append(base)
    if place == "nowhere":
        extension.end(EndSearch(rid="base", scripts="x"))
    done = extension.point(ForkPoint(rid="base", length=6))
    assert (done.state, done.inserted, done.asked) == (state, inserted, 6)


def test_a_fork_point_of_a_base_without_kv_is_made_once_it_has_it() -> None:
    base = Req("base", "abcdef")
    scheduler = Scheduler()
    scheduler.waiting_queue.append(base)
    extension = extension_of(scheduler, "none")
    extension.point(ForkPoint(rid="base", length=8))
    extension.observe([base])
    assert base.cache_protected_len == 8
    assert extension.watched["base"].wanted == []


def test_forks_wait_behind_ordinary_requests_and_give_way_to_them() -> None:
    fork, other = Req(fork_rid("base", 1)), Req("other")
    scheduler = Scheduler(Req("base", "abc"))
    extension = extension_of(scheduler)
    scheduler.waiting_queue = [fork, other]
    queue, held, _ = extension.split_waiting(scheduler.running_batch.reqs)
    assert (queue, held) == ([other], [fork])
    scheduler.waiting_queue = [fork]
    queue, held, _ = extension.split_waiting(scheduler.running_batch.reqs)
    assert (queue, held) == ([fork], [])

    scheduler.running_batch.reqs.append(fork)
    scheduler.waiting_queue = [other]
    _, _, load = extension.split_waiting(scheduler.running_batch.reqs)
    extension.make_room(scheduler.running_batch, load, ordinary_admitted=True)
    assert fork in scheduler.running_batch.reqs
    extension.make_room(scheduler.running_batch, load, ordinary_admitted=False)
    assert [req.rid for req in scheduler.running_batch.reqs] == ["base"]
    assert scheduler.waiting_queue == [other, fork]
    assert not scheduler.running_batch.batch_is_full


def test_the_forks_that_lose_least_are_retracted_first_and_counted() -> None:
    """By what every rank sees alike: output tokens, then the place in the batch."""
    old, young, twin = (Req(fork_rid("base", n), "x" * tokens) for n, tokens in ((1, 9), (2, 2), (3, 2)))
    scheduler = Scheduler(Req("base", "abc"), old, young, twin)
    extension = extension_of(scheduler)
    scheduler.waiting_queue = [Req("other")]
    _, _, load = extension.split_waiting(scheduler.running_batch.reqs)
    extension.make_room(scheduler.running_batch, load, ordinary_admitted=False)
    assert scheduler.waiting_queue[1:] == [twin, young, old]
    scheduler._add_request_to_queue(Req("new"))
    scheduler._add_request_to_queue(Req("pushed out"), is_retracted=True)
    info = internal_state(SimpleNamespace(internal_state={}), scheduler).internal_state["specgen"]
    assert (info["forks_retracted"], info["ordinary_retracted"]) == (3, 1)
    assert (info["free_tokens"], info["watched"], info["scripts"]) == (10_000, 1, 0)


@pytest.mark.parametrize(("max_new", "left"), [(100, ["base", "fork"]), (20_000, ["base"])])
def test_forks_leave_before_ordinary_requests_that_do_not_fit_beside_them(max_new: int, left: list[str]) -> None:
    fork = Req(fork_rid("base", 1), "xx")
    scheduler = Scheduler(Req("base", "abc"), fork)
    extension = extension_of(scheduler)
    scheduler.waiting_queue = [Req("other", max_new=max_new)]
    extension.give_way(scheduler.running_batch)
    assert [("fork" if req is fork else req.rid) for req in scheduler.running_batch.reqs] == left
    assert scheduler.waiting_queue[1:] == ([] if "fork" in left else [fork])


def test_forks_give_their_memory_back_before_sglang_retracts_anyone() -> None:
    base, plain = Req("base", "abc"), Req("plain", "a")
    forks = [Req(fork_rid("base", number), "x" * number) for number in (1, 2, 3)]
    scheduler = Scheduler(base, *forks, plain)
    extension_of(scheduler, base_share=1.0)
    batch = scheduler.running_batch
    batch.fits = 3
    seen: list[int] = []
    update_running_batch(lambda _scheduler, batch: seen.append(len(batch.reqs)), scheduler, batch)
    assert seen == [3], "SGLang looks at the pool once forks have made room"
    assert batch.reqs == [base, forks[2], plain]
    assert scheduler.waiting_queue == forks[:2]
    batch.fits = 1
    update_running_batch(lambda _scheduler, _batch: None, scheduler, batch)
    assert batch.reqs == [base, plain], "what forks cannot give is SGLang's to take"
    assert (scheduler.specgen.retracted.forks, scheduler.specgen.retracted.ordinary) == (3, 0)


def test_a_model_that_cannot_be_forked_stops_the_scheduler() -> None:
    scheduler = Scheduler()
    scheduler.server_args = SimpleNamespace(specgen=SpecGenConfig())
    scheduler.is_generation = True  # type: ignore[attr-defined]
    scheduler.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Gemma3"]))  # type: ignore[attr-defined]
    scheduler.tree_cache = SimpleNamespace(supports_swa=lambda: True, supports_mamba=lambda: False)  # type: ignore[assignment]
    with pytest.raises(HookError, match="full attention"):
        attach(None, scheduler)


class PairTree(Tree):
    """Its keys are pairs of tokens (EAGLE), so that the last token of a fill range has no entry."""

    is_eagle = True

    def cache_unfinished_req(self, req: Req) -> None:
        req.cache_protected_len = (req.extend_range.end - 1) // self.page_size * self.page_size

    def checkpoint(self, req: Req, up_to: int) -> None:
        req.cache_protected_len = (up_to - 1) // self.page_size * self.page_size


def test_several_tokens_of_one_step_fire_each_trigger_where_it_was() -> None:
    """Speculative decoding: the trigger's token may be followed by others, and only the last one has no KV yet."""
    base = Req("base", "a")
    scheduler = Scheduler(base)
    scheduler.tree_cache = PairTree()
    extension = extension_of(scheduler)
    extension.observe([base])
    base.output_ids += [ord(c) for c in "bcdefghi"]
    base.kv_committed_len = len(PROMPT) + len(base.output_ids) - 1
    extension.observe([base])
    fired = [(sent.reasoning_tokens, sent.length, sent.inserted) for sent in scheduler.sent]
    assert fired == [(3, 7, 6), (6, 10, 9), (9, 13, 11)]
    assert base.extend_range.end == len(PROMPT), "the request goes on as before"


def test_tokens_behind_a_closing_mark_in_the_same_step_fire_nothing() -> None:
    base = Req("base", "ab</think>cdefgh")
    scheduler = Scheduler(base)
    extension_of(scheduler, "every:4").observe([base])
    assert [sent.reasoning_tokens for sent in scheduler.sent] == [4, 8]


def test_a_fork_asks_for_the_drafts_that_are_allocated_ahead_of_it() -> None:
    fork = Req(fork_rid("base", 1), max_new=10)
    scheduler = Scheduler(Req("base", "abc"))
    plain = extension_of(scheduler)._fork(fork)
    scheduler.server_args = SimpleNamespace(
        speculative_algorithm="EAGLE", speculative_num_steps=3, speculative_eagle_topk=1, speculative_num_draft_tokens=4
    )
    assert extension_of(scheduler)._fork(fork).tokens == plain.tokens + 8


def test_replay_beside_speculative_decoding_stops_the_scheduler() -> None:
    """Drafts are verified without the sampler: a replay would go on with the model's own tokens, unnoticed."""
    scheduler = Scheduler()
    replaying = SpecGenConfig.model_validate({"replay": ["recorded"]})
    scheduler.server_args = SimpleNamespace(specgen=replaying, speculative_algorithm="EAGLE")
    scheduler.is_generation = True  # type: ignore[attr-defined]
    scheduler.model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Llama"]))  # type: ignore[attr-defined]
    scheduler.tree_cache = SimpleNamespace(supports_swa=lambda: False, supports_mamba=lambda: False)  # type: ignore[assignment]
    with pytest.raises(HookError, match="specgen-replay"):
        attach(None, scheduler)


def test_a_base_steps_aside_for_its_forks_and_returns() -> None:
    base, fork, other = Req("base", "abc"), Req(fork_rid("base", 1)), Req("other", "abc")
    scheduler = Scheduler(base, fork, other)
    extension = extension_of(scheduler, "none", base_share=0.25)
    present = []
    for _ in range(64):
        extension.step_aside(scheduler.running_batch)
        queue, _, _ = extension.split_waiting(scheduler.running_batch.reqs)
        if base in queue:
            scheduler.waiting_queue.remove(base)
            base.req_pool_idx, base.is_retracted = 0, False
            scheduler.running_batch.reqs.append(base)
        present.append(base in scheduler.running_batch.reqs)
    assert sum(present) == 16
    assert base.cache_protected_len == base.kv_committed_len, "its KV waits in the tree"
    assert base.retraction_count == 0
    assert extension.retracted.ordinary == 0, "stepping aside is no retraction"
    fork.done = True
    extension.step_aside(scheduler.running_batch)
    queue, _, _ = extension.split_waiting(scheduler.running_batch.reqs)
    assert base in queue or base in scheduler.running_batch.reqs
    assert other in scheduler.running_batch.reqs


def test_retraction_order_is_sglangs_own_without_forks() -> None:
    reqs = [Req("a"), Req("b")]
    assert retraction_order([1, 0], reqs, None) is None
    assert retraction_order([1, 0], [Req("a"), Req(fork_rid("s", 1))], None) == [0, 1]

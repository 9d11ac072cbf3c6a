"""What the engine knows of GLM-5 and DeepSeek-V4, against SGLang's parsers and the tokenizers that packages carry."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller.thinking import style_of
from specgen_engine.models import invariant, mhc, weights
from specgen_engine.models.base import MODELS, Facts, UnknownModel, facts_of, server_arguments
from specgen_engine.models.folders import write_folder
from specgen_engine.scheduler.boundary import Layout, key_tokens, publishable, round_down

ALL = pytest.mark.parametrize("facts", MODELS.values(), ids=MODELS)


@ALL
def test_marks_ends_and_template_are_the_tokenizers(facts: Facts, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_folder(facts, tmp_path))
    for mark, at in (facts.think_open, facts.think_close):
        assert tokenizer.convert_tokens_to_ids(mark) == at
        assert tokenizer.encode(f"a{mark}b", add_special_tokens=False)[1] == at
    assert facts.config["vocab_size"] > max(facts.eos)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False
    )
    assert ids[-1] == facts.think_open[1], "the prompt opens the reasoning"
    style = style_of((tmp_path / "chat_template.jinja").read_text(), facts.reasoning_parser)
    assert (style.open, style.close) == (facts.think_open[0], facts.think_close[0])


@ALL
def test_parsers_are_sglangs(facts: Facts) -> None:
    from sglang.srt.function_call.function_call_parser import FunctionCallParser
    from sglang.srt.parser.reasoning_parser import ReasoningParser

    assert facts.reasoning_parser in ReasoningParser.DetectorMap
    assert facts.tool_call_parser in FunctionCallParser.ToolCallParserEnum


def test_fp8_has_other_kernels_and_an_unknown_name_says_which_are_known() -> None:
    glm, v4 = facts_of("glm5-small"), facts_of("deepseek-v4-small")
    assert "flashmla_kv" in server_arguments(glm, "fp8_e4m3")
    assert "flashmla_kv" not in server_arguments(glm, "bfloat16")
    assert server_arguments(v4, "bfloat16") == ()
    with pytest.raises(UnknownModel, match="glm5-small, deepseek-v4-small"):
        facts_of("glm6")


LAYOUTS = st.builds(Layout, st.sampled_from([1, 16, 64, 256]), st.sampled_from([0, 128, 300]), st.booleans())
TOKENS = st.integers(0, 5_000)


@given(TOKENS, TOKENS, TOKENS, TOKENS, LAYOUTS)
def test_a_prefix_ends_on_a_boundary_that_is_computed_and_whose_window_is_there(
    asked: int, committed: int, published: int, released: int, layout: Layout
) -> None:
    published = published // layout.page * layout.page
    end = publishable(asked, committed, published, released, layout)
    assert end >= published
    if end > published:
        assert end % layout.page == 0
        assert key_tokens(end, layout) <= min(asked, committed)
        assert not layout.window or released <= published or end - released >= layout.window
    else:
        cut = round_down(min(asked, committed), layout)
        assert cut <= published or (layout.window and published < released and cut - released < layout.window)


@given(TOKENS, LAYOUTS)
def test_rounding_loses_less_than_a_page(tokens: int, layout: Layout) -> None:
    assert 0 <= tokens - round_down(tokens, layout) <= layout.page - 1 + layout.pairs


def test_a_window_that_has_moved_on_is_left_alone() -> None:
    v4 = Layout(256, 128)
    assert publishable(511, 511, 0, 0, v4) == 256
    assert publishable(511, 511, 0, 256, v4) == 0, "the last window before token 256 is gone"
    assert publishable(767, 767, 256, 256, v4) == 512
    assert publishable(1_030, 1_030, 256, 768, v4) == 1_024


def test_mixing_without_tilelang_is_doubly_stochastic_and_leaves_sglangs_kernel_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(1)
    mixes, base = torch.randn(2, 3, 24, generator=generator), torch.randn(24, generator=generator)
    scale = torch.tensor([0.5, 2.0, 0.5])
    mixing = mhc.mix(mixes, scale, base)
    assert [part.shape for part in mixing] == [(2, 3, 4), (2, 3, 4), (2, 3, 4, 4)]
    torch.testing.assert_close(mixing.comb.sum(-1), torch.ones(2, 3, 4), atol=1e-3, rtol=0)
    torch.testing.assert_close(mixing.comb.sum(-2), torch.ones(2, 3, 4), atol=1e-4, rtol=0)
    first = (mixes[..., :4] * 0.5 + base[:4]).sigmoid() + 1e-6
    torch.testing.assert_close(mixing.pre, first)
    torch.testing.assert_close(mixing.post, 2 * (mixes[..., 4:8] * 2.0 + base[4:8]).sigmoid())
    monkeypatch.setattr(mhc, "_has_tilelang", lambda: True)
    assert mhc.hc_split_sinkhorn(lambda *_args: "its own", mixes, scale, base) == "its own"


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8, bias=False)
        self.first, self.second = torch.nn.Linear(256, 64), torch.nn.Linear(256, 64)


def test_scaled_weights_differ_by_parameter_keep_activations_and_are_off_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, called = Small(), []  # type: ignore[var-annotated]
    weights.initialize(called.append, model)
    assert called == [model], "SGLang's own without the switch"
    monkeypatch.setenv(weights.SWITCH, weights.SCALED)
    weights.initialize(called.append, model)
    assert len(called) == 1
    assert not torch.equal(model.first.weight, model.second.weight)
    assert float(model.norm.weight.detach().min()) > 0.8
    out = model.first(torch.randn(512, 256, generator=torch.Generator().manual_seed(2)))
    assert 0.8 < float(out.std()) < 1.2
    again = Small()
    weights.initialize(called.append, again)
    assert torch.equal(model.first.weight, again.first.weight)


def test_a_fork_point_of_a_windowed_tree_is_published_by_whole_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from specgen_engine import versions
    from specgen_engine.scheduler.fork_point import insert_fork_point

    monkeypatch.setattr(versions, "current", lambda: versions.release_of("0.5.17"))  # Req below is of its shape
    published: list[int] = []

    class Req(SimpleNamespace):
        def _refresh_fill_ids(self) -> None: ...

        def set_extend_range(self, start: int, end: int) -> None:
            self.extend_range = SimpleNamespace(start=start, end=end)

    def cache(req: Req) -> None:
        published.append(req.extend_range.end)
        req.cache_protected_len = (req.extend_range.end - 1) // 256 * 256

    tree = SimpleNamespace(
        page_size=256, supports_swa=lambda: True, sliding_window_size=128, cache_unfinished_req=cache,
        tree_core=SimpleNamespace(is_eagle=True),
    )  # fmt: skip
    req = Req(
        origin_input_ids=[0] * 300, output_ids=[0] * 500, kv_committed_len=799, cache_protected_len=256,
        extend_range=SimpleNamespace(start=0, end=300), kv=SimpleNamespace(swa_evicted_seqlen=256),
    )  # fmt: skip
    assert insert_fork_point(req, 768, tree) == 512, "pairs: the last token of a key has no entry"
    assert insert_fork_point(req, 790, tree) == 768
    assert published == [513, 769]
    assert req.extend_range.end == 300
    req.kv.swa_evicted_seqlen = 1_024
    assert insert_fork_point(req, 799, tree) == 768
    assert len(published) == 2


def test_batch_invariant_operators_are_sglangs_switch_and_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend
    from sglang.srt.server_args import ServerArgs

    written: dict[str, bool] = {}
    context = SimpleNamespace(override=lambda _source, **fields: written.update(fields))
    monkeypatch.setattr(runtime_context, "get_context", lambda: context)
    own = DSATopKBackend.topk_transform
    monkeypatch.setattr(DSATopKBackend, "topk_transform", own)
    weights.initialize(lambda _model: None, Small())
    assert not written
    assert DSATopKBackend.topk_transform is own
    monkeypatch.setenv(invariant.SWITCH, "1")
    weights.initialize(lambda _model: None, Small())
    weights.initialize(lambda _model: None, Small())
    assert getattr(DSATopKBackend.topk_transform, "__wrapped__", None) is own, "once, also where a draft model follows"
    assert written.keys() == {"enable_deterministic_inference"} <= namespace_of(ServerArgs).keys()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_chosen_tokens_are_the_highest_ones_by_position_in_their_requests_slots(
    lengths: list[int], topk: int, seed: int, packed: bool
) -> None:
    """Requests whose last tokens are computed at once; scores of each lie behind the others' (packed) or in a table."""
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend, TopkTransformMethod

    generator = torch.Generator().manual_seed(seed)
    total, width, page = sum(lengths), 12, 4
    known = [torch.randint(length, width + 1, (), generator=generator).item() for length in lengths]
    seen = torch.tensor(
        [of - length + 1 + at for of, length in zip(known, lengths, strict=True) for at in range(length)]
    )
    request = [at for at, length in enumerate(lengths) for _ in range(length)]
    starts = torch.tensor([width * at for at in request]) if packed else torch.zeros(total, dtype=torch.long)
    score = torch.rand(total, width * (len(lengths) if packed else 1), generator=generator)
    table = torch.randperm(len(lengths) * 3, generator=generator).reshape(len(lengths), 3)
    wide = (table[:, :, None] * page + torch.arange(page)).reshape(len(lengths), width)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    asked = (DSATopKBackend.TORCH, score, seen.int(), topk, TopkTransformMethod.PAGED)
    for metadata in (SimpleNamespace(page_table_1=wide), SimpleNamespace(page_table_1=None, real_page_table=table)):
        metadata.page_size = page
        chosen = invariant.in_order(DSATopKBackend.topk_transform)(
            *asked, metadata, cu_seqlens_q_topk=ends, row_starts=starts.int() if packed else None
        )
        assert chosen.dtype == torch.int32
        for at, row in enumerate(chosen.tolist()):
            best = score[at, starts[at] : starts[at] + seen[at]].topk(min(topk, int(seen[at]))).indices.sort().values
            assert row == wide[request[at], best].tolist() + [-1] * (topk - len(best))


@pytest.mark.parametrize(
    ("tokens", "ends", "requests", "rows"),
    [
        (3, None, None, [0, 1, 2]),
        (2, [0, 1, 2], None, [0, 1]),
        (4, [0, 3, 4], None, [0, 0, 0, 1]),
        (3, None, torch.tensor([2, 2, 5]), [2, 2, 5]),
        (3, [0, 1, 3], [4, 6], [4, 6, 6]),
    ],
)
def test_a_token_reads_its_requests_row(tokens: int, ends: list[int] | None, requests: object, rows: list[int]) -> None:
    counted = None if ends is None else torch.tensor(ends)
    assert invariant.requests_of(tokens, counted, requests, torch.device("cpu")).tolist() == rows


def test_what_chooses_no_slots_of_a_page_table_is_sglangs() -> None:
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod

    def theirs(*args: object, **kwargs: object) -> str:
        return f"{len(args)} {sorted(name for name, value in kwargs.items() if value is not None)}"

    ours = invariant.in_order(theirs)  # type: ignore[arg-type]
    score = torch.zeros(1, 1)
    ragged = ours(None, score, score, 1, TopkTransformMethod.RAGGED, None, topk_indices_offset=score)
    assert ragged == "7 ['force_unfused_topk', 'topk_indices_offset']"
    assert ours(None, score, score, 1, TopkTransformMethod.PAGED, None, force_unfused_topk=True).startswith("7")

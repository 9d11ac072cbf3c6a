"""SGLang's own EAGLE worker on a machine without a GPU: torch in place of the kernels that it calls, for tests only.

SGLang 0.5.17 runs EAGLE on CPUs with AMX by kernels of sgl_kernel; here each of those it needs for a chain of drafts
(topk 1) is written in torch. Worker, batches, allocator, radix tree and scheduler are SGLang's. Importing this module
puts the kernels in place; a template process does so once (specgen_engine/serving/preload.py).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.ops.kvcache import cache_move
from sglang.kernels.ops.speculative import cache_locs, eagle
from sglang.srt.arg_groups import speculative_hook
from sglang.srt.layers.attention import intel_amx_backend, torch_native_backend
from sglang.srt.managers import overlap_utils
from sglang.srt.mem_cache import allocation
from sglang.srt.speculative import eagle_utils, eagle_worker_common

Tensor = torch.Tensor


def assign_req_to_token_pool(
    rows: Tensor, table: Tensor, start: Tensor, end: Tensor, slots: Tensor, _width: int
) -> None:
    """table[row, start:end] = the row's share of slots, which lie one after the other."""
    taken = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        table[row, first:last] = slots[taken : taken + last - first].to(table.dtype)
        taken += last - first


def assign_extend_cache_locs(
    rows: Tensor, table: Tensor, start: Tensor, end: Tensor, slots: Tensor, _width: int
) -> None:
    """slots = table[row, start:end] of one row after the other."""
    spans = zip(rows.tolist(), start.tolist(), end.tolist(), strict=True)
    found = torch.cat([table[row, first:last] for row, first, last in spans])
    slots[: len(found)] = found.to(slots.dtype)


def assign_draft_cache_locs(
    rows: Tensor, table: Tensor, lengths: Tensor, slots: Tensor, width: int, topk: int, steps: int
) -> None:
    assign_extend_cache_locs(rows, table, lengths, lengths + topk * steps, slots, width)


def build_chain(
    _parents: Tensor, _scores: Tensor, lengths: Tensor, mask: Tensor, positions: Tensor, index: Tensor,
    next_token: Tensor, next_sibling: Tensor, topk: int, _steps: int, tokens: int, _mode: int,
) -> None:  # fmt: skip
    """The tree of topk 1: every token's only child is the next one. index, next_*: [batch, tokens]."""
    assert topk == 1, f"topk={topk}: a chain of drafts is all that these kernels know"
    batch = len(lengths)
    mask.view(batch, tokens, tokens).copy_(torch.tril(torch.ones(tokens, tokens, dtype=torch.bool)))
    positions.copy_((lengths[:, None] + torch.arange(tokens)).flatten())
    index.copy_(torch.arange(batch * tokens).view(batch, tokens))
    next_token.copy_(torch.tensor([*range(1, tokens), -1]).expand(batch, tokens))
    next_sibling.fill_(-1)


def verify_chain(
    predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor, retrive_index: Tensor,
    target_predict: Tensor, **_tree: Any,
) -> None:  # fmt: skip
    """Drafts are accepted as far as the target would have said the same; its next token follows."""
    for row, (drafts, said) in enumerate(zip(candidates.tolist(), target_predict.tolist(), strict=True)):
        right = 0
        while right + 1 < min(len(drafts), accept_index.shape[1]) and drafts[right + 1] == said[right]:
            right += 1
        places = retrive_index[row, : right + 1]
        accept_index[row, : right + 1] = places.to(accept_index.dtype)
        predicts[places] = torch.tensor(said[: right + 1], dtype=predicts.dtype)
        accept_token_num[row] = right


def fill_bonus_tokens(accepted: Tensor, lengths: Tensor, bonus: Tensor, stride: int) -> None:
    bonus.copy_(accepted.flatten()[torch.arange(len(lengths)) * stride + lengths.long() - 1])


def gather_rows(indices: Tensor, *buffers: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if buffer is None else buffer[indices] for buffer in buffers)


def move_nothing(_pointers: Tensor, _strides: Tensor, target: Tensor, source: Tensor) -> None:
    """KV of accepted drafts moves in trees only; the pool's warm-up moves a slot onto itself."""
    assert torch.equal(target, source)


class ChainBackend(torch_native_backend.TorchNativeAttnBackend):  # type: ignore[misc]
    """torch's attention, for the batches of a verification too: each request is extended by its drafts."""

    step = 0

    def forward_extend(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *args: Any, **kw: Any) -> Tensor:
        if not batch.forward_mode.is_target_verify():
            return super().forward_extend(q, k, v, layer, batch, *args, **kw)
        return super().forward_extend(q, k, v, layer, Extended(batch, batch.spec_info.draft_token_num), *args, **kw)

    def forward_decode(self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, *args: Any, **kw: Any) -> Tensor:
        seen = Extended(batch, self.step) if self.step else batch
        return super().forward_decode(q, k, v, layer, seen, *args, **kw)


class Extended:
    """A ForwardBatch whose requests have some tokens more than its seq_lens say."""

    def __init__(self, batch: Any, tokens: int) -> None:
        self._batch = batch
        self.seq_lens = batch.seq_lens + tokens
        self.extend_prefix_lens = batch.seq_lens
        self.extend_seq_lens = torch.full_like(batch.seq_lens, tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)


class ChainDraftBackend:
    """One backend a drafting step; the drafts before it are part of what it attends to."""

    def __init__(self, model_runner: Any, topk: int, speculative_num_steps: int) -> None:
        assert topk == 1, f"topk={topk}: a chain of drafts is all that these kernels know"
        self.attn_backends = [ChainBackend(model_runner) for _ in range(speculative_num_steps - 1)]
        for step, backend in enumerate(self.attn_backends):
            backend.step = step + 1

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def install() -> None:
    allocation.assign_req_to_token_pool_cpu = assign_req_to_token_pool
    cache_locs.assign_extend_cache_locs_cpu = assign_extend_cache_locs
    eagle_worker_common.assign_draft_cache_locs_contiguous_cpu = assign_draft_cache_locs
    eagle_utils.sgl_build_tree_kernel_efficient_cpu = build_chain
    eagle_utils.sgl_verify_tree_greedy_cpu = verify_chain
    eagle.fill_bonus_tokens_cpu = fill_bonus_tokens
    cache_move.copy_all_layer_kv_cache_cpu = move_nothing
    torch_native_backend.TorchNativeAttnBackend = ChainBackend
    intel_amx_backend.IntelAMXAttnBackend = ChainBackend
    intel_amx_backend.IntelAMXMultiStepDraftBackend = ChainDraftBackend
    # What GPUs run: with it the scheduler reads a step's tokens while the next one runs.
    speculative_hook._disable_overlap_schedule_for_cpu = lambda server_args: None
    overlap_utils.gather_spec_extras = gather_rows
    torch.Tensor.record_stream = lambda self, stream: None


install()

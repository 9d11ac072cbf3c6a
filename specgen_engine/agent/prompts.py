"""Prompts of the loop: the task, then the best, the last and the last failed candidate, each with what is known of it.

Pure: the same attempts give the same prompt, so that a resumed run asks what an unbroken one would have asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from specgen_engine.agent.base import Attempt, Judgement, best_of, failed_of, last_of

PROFILE_LINES = 15
DIGEST_LINES = 15

TASK = """Write a faster replacement for the PyTorch module `Model` below.

```python
{task}
```

Answer with one complete Python module in a fenced block. It defines `ModelNew` with the same constructor arguments,
the same forward() signature and the same results as `Model`, within the tolerance of its dtype. It may use PyTorch,
Triton, or CUDA/C++ through torch.utils.cpp_extension.load_inline. It is compiled, checked on unseen inputs and timed
against `Model` on {device}.
"""


def messages_for(task: str, device: str, attempts: Sequence[Attempt], search: int) -> list[dict[str, str]]:
    """Chat messages of a search's next iteration."""
    parts = [TASK.format(task=task.strip(), device=device)]
    best, last, failed = best_of(attempts), last_of(attempts, search), failed_of(attempts, search)
    shown: set[str] = set()
    for title, one in (("The best so far", best), ("The last one", last), ("The last one that failed", failed)):
        if one is None or one.judgement is None or one.source is None or one.judgement.hash in shown:
            continue
        shown.add(one.judgement.hash)
        parts.append(_candidate(title, one.source, one.judgement))
    if last is not None and last.source is None:
        parts.append("The last answer held no fenced module that defines ModelNew; give a complete one this time.")
    if shown:
        parts.append("Find what bounds the best one, and write a faster one. Don't repeat a candidate shown above.")
    return [{"role": "user", "content": "\n\n".join(parts)}]


def _candidate(title: str, source: str, judgement: Judgement) -> str:
    lines = [f"{title}: {describe(judgement)}", "", "```python", source.strip(), "```"]
    if judgement.profile:
        lines += ["Profile:", *judgement.profile.splitlines()[:PROFILE_LINES]]
    elif judgement.digest:
        lines += ["Error:", *judgement.digest.splitlines()[:DIGEST_LINES]]
    return "\n".join(lines)


def describe(judgement: Judgement) -> str:
    """One line: what the verdict says."""
    if judgement.speedup is None:
        return f"{judgement.status}" + (f", {judgement.reason}" if judgement.reason else "")
    low, high = judgement.interval or (judgement.speedup, judgement.speedup)
    times = f"{judgement.candidate_ms:.4g} ms against {judgement.reference_ms:.4g} ms"
    return f"correct, {judgement.speedup:.2f}x (95 %: {low:.2f}-{high:.2f}), {times}"

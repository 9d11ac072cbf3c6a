"""Recorded iterations as token ids: which one a search plays, and what its base and its forks say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from specgen_engine.controller.thinking import ThinkingStyle, fork_suffix
from specgen_engine.replay.trace import EncodeWithOffsets, TokenisedIteration, Trace, TraceError, load_traces

NO_ANSWER = "No answer was recorded this early in the reasoning."


@dataclass(frozen=True, slots=True)
class Recording:
    """One iteration of a trace. Every script ends with the end-of-sequence id: the engine stops by itself."""

    trace: str
    number: int
    tokens: TokenisedIteration
    encode: Callable[[str], list[int]]
    style: ThinkingStyle
    eos: int

    @property
    def reasoning_tokens(self) -> int:
        return len(self.tokens.ids)

    def base_ids(self, opened: bool) -> list[int]:
        """The whole recorded output: reasoning (opened first when the prompt has not), closing mark, final answer."""
        opening = [] if opened or not self.style.open else self.encode(self.style.open)
        closing = self.encode(fork_suffix(self.style))
        return [*opening, *self.tokens.ids, *closing, *self.encode(self.tokens.iteration.final), self.eos]

    def fork_ids(self, at_token: int) -> tuple[str | None, list[int]]:
        """(name of the recorded answer, its ids) of a fork at some reasoning token; no name before the first."""
        found = self.tokens.answer_at(at_token)
        if found is None:
            return None, [*self.encode(NO_ANSWER), self.eos]
        number, answer = found
        return f"fork-{number}", [*self.encode(answer), self.eos]


class ReplayBook:
    """Traces by the hash of their task. Without a wish, the iterations of a task are played in turn."""

    def __init__(self, recordings: dict[str, list[Recording]]) -> None:
        self.recordings = recordings
        self._played: dict[str, int] = defaultdict(int)

    @classmethod
    def load(cls, paths: Iterable[Path], tokenizer: object, style: ThinkingStyle) -> ReplayBook:
        """Raises TraceError naming the file when a trace is not whole, or when two share a task."""
        encode_with_offsets, encode, eos = _functions_of(tokenizer)
        recordings: dict[str, list[Recording]] = {}
        names: dict[str, Trace] = {}
        for trace in load_traces(paths):
            if (other := names.setdefault(trace.task_hash, trace)) is not trace:
                raise TraceError(f"{trace.path}: has the same task as {other.path}; replay one of them at a time")
            recordings[trace.task_hash] = [
                Recording(trace.name, it.number, TokenisedIteration.of(it, encode_with_offsets), encode, style, eos)
                for it in trace.iterations
            ]
        return cls(recordings)

    def recording(self, task_hash: str, iteration: int | None) -> Recording | None:
        """The asked iteration of a task, else its next one (round and round); None when no trace has the task.

        Raises ValueError when the asked iteration was not recorded.
        """
        found = self.recordings.get(task_hash)
        if not found:
            return None
        if iteration is None:
            index = self._played[task_hash] % len(found)
            self._played[task_hash] += 1
            return found[index]
        for recording in found:
            if recording.number == iteration:
                return recording
        have = ", ".join(str(recording.number) for recording in found)
        raise ValueError(f"{iteration} is not recorded; use one of {have}")


def _functions_of(tokenizer: object) -> tuple[EncodeWithOffsets, Callable[[str], list[int]], int]:
    """What a Hugging Face fast tokenizer gives: ids with offsets, plain ids, the end-of-sequence id."""

    def encode_with_offsets(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)  # type: ignore[operator]
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))  # type: ignore[attr-defined]

    return encode_with_offsets, encode, int(tokenizer.eos_token_id)  # type: ignore[attr-defined]

"""Triggers: where in a running reasoning a fork is made.

A trigger is a pure state machine over decoded tokens: ``start()`` gives its first state, ``step(state, piece,
position)`` the next one and, when it fires at this token, the spec that fired. The scheduler runs it for every decoded
token on every tensor-parallel rank, the replay and the offline study on recorded text, so it looks at nothing but its
arguments.
States are immutable and may be kept, copied and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

from specgen_engine.controller.entropy import entropy_of
from specgen_engine.controller.spacing import Spacing, parse_spacing

ENTRY_POINT_GROUP = "specgen.triggers"
# Where the adaptive trigger looks; the controller decides at each of these points whether to fork (adaptive.py).
ADAPTIVE_POINTS = "paragraph+fence+every:400"
TRANSITION_WORDS = ("wait", "alternatively", "actually", "let me")

_HEAD_CHARS = 96
_LONGEST_WORD = max(map(len, TRANSITION_WORDS))
_SENTENCE_LEAD = "*_#>-\"'( \t"


class Trigger(Protocol):
    """Decides at which decoded tokens a fork is made.

    spec: the text that ``parse_trigger`` made it from; reported with every fork.
    """

    @property
    def spec(self) -> str: ...

    def start(self) -> Any:
        """State before the first reasoning token."""
        ...

    def step(self, state: Any, piece: str, position: int) -> tuple[Any, str | None]:
        """State after one token, and the spec that fires at it or None.

        piece: decoded text of the token; position: number of reasoning tokens including this one, from 1.
        Never raises, whatever the text is.
        """
        ...


@dataclass(frozen=True, slots=True)
class Never:
    """Spec ``none``: no fork at all."""

    spec: str = "none"

    def start(self) -> None:
        return None

    def step(self, state: None, piece: str, position: int) -> tuple[None, str | None]:
        return None, None


@dataclass(frozen=True, slots=True)
class EveryN:
    """Spec ``every:N``: at reasoning tokens N, 2N, 3N ..."""

    tokens: int

    @property
    def spec(self) -> str:
        return f"every:{self.tokens}"

    def start(self) -> None:
        return None

    def step(self, state: None, piece: str, position: int) -> tuple[None, str | None]:
        return None, None if position % self.tokens else self.spec


def fence_marker(line: str) -> str:
    """The run of three or more backticks or tildes that a line starts with after blanks, else ""."""
    text = line.lstrip()
    if not text.startswith(("```", "~~~")):
        return ""
    return text[: len(text) - len(text.lstrip(text[0]))]


def opens_fence(line: str) -> bool:
    """CommonMark's opening fence, at any indentation (models indent code in lists)."""
    marker = fence_marker(line)
    return bool(marker) and not (marker[0] == "`" and "`" in line.lstrip()[len(marker) :])


def closes_fence(line: str, opened_by: str) -> bool:
    """Whether a line closes the fence that ``opened_by`` opened: same character, at least as long, nothing after it."""
    marker = fence_marker(line)
    return len(marker) >= len(opened_by) and marker[:1] == opened_by[:1] and not line.strip()[len(marker) :]


class Lines(NamedTuple):
    """What is known of the text so far, line by line.

    head: start of the unfinished line; fence: marker of the open code fence or ""; text: a paragraph is open;
    defines: the open fence has a line that starts with ``class ModelNew``.
    """

    head: str = ""
    fence: str = ""
    text: bool = False
    defines: bool = False


class Ended(NamedTuple):
    """What the finished lines of one piece ended."""

    paragraph: bool = False
    fence: bool = False
    draft: bool = False


_NOTHING = Ended()
_FIRST = Lines()


def scan(state: Lines, piece: str) -> tuple[Lines, Ended]:
    """Feed one piece of text of any length; a blank line counts as a paragraph's end once, outside fences only."""
    if "\n" not in piece:
        head, fence, text, defines = state
        first = head[:1]
        if (first.isalnum() and first != "c") or len(head) >= _HEAD_CHARS:
            return state, _NOTHING  # neither blank, nor a fence, nor class ModelNew: the rest of the line can't matter
        return Lines(head + piece, fence, text, defines), _NOTHING
    head, fence, text, defines = state
    paragraph = closed = draft = False
    *finished, rest = (head + piece).split("\n")
    for line in finished:
        if fence:
            if closes_fence(line, fence):
                closed, draft = True, draft or defines
                fence, text, defines = "", True, False
            elif line.startswith("class ModelNew"):
                defines = True
        elif opens_fence(line):
            fence, text, defines = fence_marker(line), True, False
        elif line.strip():
            text = True
        elif text:
            paragraph, text = True, False
    return Lines(rest, fence, text, defines), Ended(paragraph, closed, draft)


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Spec ``paragraph``: the token that completes a blank line after a paragraph, outside code fences."""

    spec: str = "paragraph"

    def start(self) -> Lines:
        return _FIRST

    def step(self, state: Lines, piece: str, position: int) -> tuple[Lines, str | None]:
        state, ended = scan(state, piece)
        return state, self.spec if ended.paragraph else None


@dataclass(frozen=True, slots=True)
class Fence:
    """Spec ``fence``: the token that completes the line which closes a code fence."""

    spec: str = "fence"

    def start(self) -> Lines:
        return _FIRST

    def step(self, state: Lines, piece: str, position: int) -> tuple[Lines, str | None]:
        state, ended = scan(state, piece)
        return state, self.spec if ended.fence else None


@dataclass(frozen=True, slots=True)
class Draft:
    """Spec ``draft``: a closed code fence in which ModelNew is defined; it can be harvested without a generation."""

    spec: str = "draft"

    def start(self) -> Lines:
        return _FIRST

    def step(self, state: Lines, piece: str, position: int) -> tuple[Lines, str | None]:
        state, ended = scan(state, piece)
        return state, self.spec if ended.draft else None


class Sentence(NamedTuple):
    """head: the sentence's first characters, None once no transition word can follow; stop: a full stop came last."""

    head: str | None = ""
    stop: bool = False


@dataclass(frozen=True, slots=True)
class Transition:
    """Spec ``transition``: a sentence that starts with one of TRANSITION_WORDS (the model changes its mind)."""

    spec: str = "transition"

    def start(self) -> Sentence:
        return Sentence()

    def step(self, state: Sentence, piece: str, position: int) -> tuple[Sentence, str | None]:
        head, stop = state
        if head is None and not stop and not ("\n" in piece or "." in piece or "?" in piece or "!" in piece):
            return state, None
        fired = False
        for char in piece:
            if head is not None and not char.isalnum() and head.lstrip(_SENTENCE_LEAD).lower() in TRANSITION_WORDS:
                fired, head = True, None
            if char == "\n" or (stop and char.isspace()):
                head = ""
            elif head is not None:
                head = head + char if len(head) < _LONGEST_WORD + 8 else None
            stop = char in ".!?"
        return Sentence(head, stop), self.spec if fired else None


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Spec ``adaptive``: fires at each of ADAPTIVE_POINTS; which of them become forks is learnt (adaptive.py)."""

    spec: str = "adaptive"

    def start(self) -> Any:
        return _adaptive_points().start()

    def step(self, state: Any, piece: str, position: int) -> tuple[Any, str | None]:
        state, fired = _adaptive_points().step(state, piece, position)
        return state, self.spec if fired else None


@cache
def _adaptive_points() -> Trigger:
    return parse_trigger(ADAPTIVE_POINTS)


class Member(NamedTuple):
    """One of the joined triggers, with its own text and its distance to the firing before."""

    spec: str
    trigger: Trigger
    spacing: Spacing


class Joined(NamedTuple):
    """last: position of the last firing, 0 without one; inner: the members' states; lines: of the text so far;
    code: whether a code fence has closed since the last firing. Only kept where a member asks for new code."""

    last: int
    inner: tuple[Any, ...]
    lines: Lines = _FIRST
    code: bool = False


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Fires when any member does, the earlier in the spec first.

    A member's distance counts from the last firing of any member; the start of the reasoning counts as one.
    """

    spec: str
    members: tuple[Member, ...]
    reads_code: bool = False

    @property
    def top_k(self) -> int:
        return max(wanted_logprobs(member.trigger) for member in self.members)

    def weigh(self, state: Joined, entropy: float) -> Joined:
        pairs = zip(self.members, state.inner, strict=True)
        return state._replace(inner=tuple(weighed(member.trigger, before, entropy) for member, before in pairs))

    def start(self) -> Joined:
        return Joined(0, tuple(member.trigger.start() for member in self.members))

    def step(self, state: Joined, piece: str, position: int) -> tuple[Joined, str | None]:
        last, inner, lines, code = state
        if self.reads_code:
            lines, ended = scan(lines, piece)
            code = code or ended.fence
        fired: str | None = None
        after = []
        for (spec, trigger, spacing), before in zip(self.members, inner, strict=True):
            now, name = trigger.step(before, piece, position)
            after.append(now)
            if name is not None and fired is None and spacing.allows(position - last, code):
                fired = spec
        if fired is not None:
            last, code = position, False
        return Joined(last, tuple(after), lines, code), fired


def wanted_logprobs(trigger: Trigger) -> int:
    """How many log-probabilities of each token a trigger wants; 0 for all but ``entropy``."""
    return int(getattr(trigger, "top_k", 0))


def weighed(trigger: Trigger, state: Any, entropy: float) -> Any:
    """The state that knows the entropy (nats) of the distribution from which the next step's token came."""
    return trigger.weigh(state, entropy) if wanted_logprobs(trigger) else state  # type: ignore[attr-defined]


def _every(argument: str | None) -> Trigger:
    if argument is None or not argument.isascii() or not argument.isdigit() or not 1 <= int(argument) <= 10_000_000:
        raise ValueError("it needs a whole number of tokens from 1 to 10000000, as in every:400")
    return EveryN(int(argument))


def _plain(make: Callable[[], Trigger]) -> Callable[[str | None], Trigger]:
    def factory(argument: str | None) -> Trigger:
        if argument is not None:
            raise ValueError(f"{make().spec} takes no argument but min=N and new=code, as in {make().spec}:min=200")
        return make()

    return factory


_BUILT_IN: dict[str, Callable[[str | None], Trigger]] = {
    "adaptive": _plain(Adaptive),
    "entropy": entropy_of,
    "every": _every,
    "paragraph": _plain(Paragraph),
    "fence": _plain(Fence),
    "draft": _plain(Draft),
    "transition": _plain(Transition),
}


def name_of(spec: str) -> str:
    """The trigger's name in the spec that fired: ``draft`` of ``draft:min=200``."""
    return spec.partition(":")[0]


def trigger_names() -> list[str]:
    """Names that a spec may use: the built-in ones and those of installed plug-ins."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def _factory(name: str) -> Callable[[str | None], Trigger]:
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return point.load()
    raise ValueError(f"no trigger is called {name!r}; use one of {', '.join(trigger_names())}, or none")


def _member(text: str) -> Member:
    name, *parts = (part.strip() for part in text.split(":"))
    parts, spacing = parse_spacing(parts)
    trigger = _factory(name)(":".join(parts) if parts else None)
    if not all(hasattr(trigger, name) for name in ("spec", "start", "step")):
        raise ValueError(f"the plug-in {name!r} gave {type(trigger).__name__}, which has no spec, start and step")
    return Member(text, trigger, spacing)


def parse_trigger(spec: str, field: str = "trigger") -> Trigger:
    """Trigger of a spec such as ``every:400``, ``paragraph:min=800:new=code`` or ``every:800+fence``; ``none``: never.

    Raises ValueError with the field, the value and the remedy. Plug-ins are entry points of the group
    ``specgen.triggers``: name -> factory(argument: str | None) -> Trigger.
    """
    text = spec.strip() if isinstance(spec, str) else ""
    if text == "none":
        return Never()
    try:
        parts = [part.strip() for part in text.split("+")]
        if not all(parts):
            raise ValueError("it is empty or has an empty part; use e.g. every:400, paragraph, fence, or none")
        if "none" in parts:
            raise ValueError("none can't be joined with other triggers; use it alone")
        members = tuple(_member(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"{field}={spec!r}: {error}") from None
    if len(members) == 1 and members[0].spacing == Spacing():
        return members[0].trigger
    return AnyOf("+".join(parts), members, any(member.spacing.code for member in members))


def fire_points(trigger: Trigger, pieces: list[str]) -> list[tuple[int, str]]:
    """(position, spec that fired) of every firing over a whole recorded reasoning, given as one piece a token."""
    state, points = trigger.start(), []
    for position, piece in enumerate(pieces, 1):
        state, fired = trigger.step(state, piece, position)
        if fired is not None:
            points.append((position, fired))
    return points

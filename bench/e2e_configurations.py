"""What bench.end_to_end compares: one table of configurations, and the server that each needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from specgen_engine.errors import SpecGenError

DEFAULT_TRIGGER = "paragraph:min=800"


class Search(NamedTuple):
    """What one request asks for: SpecGen's fields of its custom parameters."""

    trigger: str
    termination: str
    fork: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Configuration:
    """server: a variant of server_arguments. share: of the tokens that sequential took, as a budget; 0: none.

    early_end: the reasoning may end at the criterion. Each stands at its best settings: paragraphs at least 800 tokens
    apart were the best fixed trigger of `bench.policies` (results/policies.md), which only every-* replaces.
    """

    name: str
    what: str
    trigger: str = DEFAULT_TRIGGER
    early_end: bool = True
    server: str = "tier"
    share: float = 0.0
    end_repeats: float | None = None

    def search(self, criterion: str, sequential_tokens: int | None = None) -> Search:
        """criterion: what ends a reasoning early. Raises SpecGenError when a budget lacks its sequential run."""
        if not self.early_end:
            return Search(self.trigger, "none", self._fork())
        termination = criterion
        if self.share:
            if not sequential_tokens:
                raise SpecGenError(
                    f"configuration {self.name}: its budget is a share of sequential's tokens; run that first"
                )
            termination += f"|budget:tokens={max(1, round(self.share * sequential_tokens))}"
        return Search(self.trigger, termination, self._fork())

    def _fork(self) -> dict[str, float] | None:
        return None if self.end_repeats is None else {"end_repeats": self.end_repeats}


SEQUENTIAL = "sequential"
CONFIGURATIONS = {
    one.name: one
    for one in (
        Configuration(SEQUENTIAL, "reason, answer, evaluate: one candidate", trigger="none", early_end=False),
        Configuration("specgen", "forks, evaluation beside the reasoning, early end"),
        Configuration("adaptive", "specgen with the trigger that learns", trigger="adaptive"),
        Configuration("no-early-end", "specgen, the reasoning runs to its end", early_end=False),
        # What of it a replay alone can gain, its forks being one recording's, is the second's share beyond the first's.
        Configuration("new-code", "specgen, forks only behind new code", trigger=f"{DEFAULT_TRIGGER}:new=code"),
        Configuration(
            "new-code-no-repeats",
            "the same, and forks that repeat an earlier one ended",
            trigger=f"{DEFAULT_TRIGGER}:new=code",
            end_repeats=0.0,
        ),
        Configuration("every-400", "specgen with a fixed trigger", trigger="every:400"),
        Configuration("every-1600", "specgen with a fixed trigger", trigger="every:1600"),
        # Dynasor's way: the stream stops, the model is asked, the stream goes on; verdicts are not waited for.
        Configuration("pause-and-probe", "the reasoning stops while a probe answers, one at a time", server="pause"),
        # KernelAgent's and CudaForge's way: an evaluator is one fixed worker that a candidate holds from compiling to
        # its verdict. The live server's jobs carry their profile along, so there are no roles to fix beside it.
        Configuration("static-pools", "specgen with one fixed worker an evaluator: no overlap in it", server="static"),
        Configuration("host-tier", "specgen with HiCache's host memory instead of the peer", server="host"),
        Configuration("no-tier", "specgen without a second level of the KV cache", server="off"),
        Configuration("budget-25", "specgen within a quarter of sequential's tokens", share=0.25),
        Configuration("budget-50", "specgen within half of sequential's tokens", share=0.5),
        Configuration("budget-100", "specgen within sequential's tokens", share=1.0),
    )
}


def server_arguments(variant: str, tier: str) -> list[str]:
    """SpecGen's flags of a server variant; `tier` is what those take that are not about it (peer, host or off)."""
    level = {"host": "host", "off": "off"}.get(variant, tier)
    words = [] if level == "off" else ["--specgen-kv", level]
    if variant == "pause":  # a base takes no step while a fork of its own decodes
        words += ["--specgen-scheduler-base-share", "0.001", "--specgen-fork-per-search", "1"]
    return words


def workers_of(variant: str, workers: int) -> int:
    """Evaluations at once on each evaluator."""
    return 1 if variant == "static" else workers


def chosen(names: list[str]) -> list[Configuration]:
    """In the table's order, those that share a server side by side. Raises SpecGenError for an unknown name."""
    for name in names:
        if name not in CONFIGURATIONS:
            raise SpecGenError(f"--configurations {name!r}: use some of {', '.join(CONFIGURATIONS)}")
    kept = [one for name, one in CONFIGURATIONS.items() if name in names]
    order = list(dict.fromkeys(one.server for one in kept))
    return sorted(kept, key=lambda one: order.index(one.server))

"""Trigger ``entropy:H``: a fork where the model is unsure how to go on (high entropy of the next token, in nats).

Live only: recorded text has no distribution, so a replay from text or the offline study never fires it. It makes SGLang
compute log-probabilities for every step in which the base takes part, for the whole batch: no default uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TOP_K = 8
MOST_NATS = math.log(TOP_K)


def top_k_entropy(logprobs: Sequence[float]) -> float:
    """Entropy in nats of the most likely tokens' distribution, normalised over them; 0 for none or one."""
    weights = [math.exp(value) for value in logprobs if value is not None]
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0) if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Entropy:
    """Its state is the entropy that the next step is about; ``weigh`` sets it before each step."""

    nats: float

    @property
    def spec(self) -> str:
        return f"entropy:{self.nats:g}"

    @property
    def top_k(self) -> int:
        """How many of each token's log-probabilities it wants."""
        return TOP_K

    def start(self) -> float:
        return 0.0

    def weigh(self, state: float, entropy: float) -> float:
        return entropy

    def step(self, state: float, piece: str, position: int) -> tuple[float, str | None]:
        return 0.0, self.spec if state >= self.nats else None


def entropy_of(argument: str | None) -> Entropy:
    """Raises ValueError unless it is a number of nats that TOP_K tokens can reach."""
    remedy = f"it needs nats above 0 and below {MOST_NATS:.2f}, as in entropy:1.5:min=200"
    try:
        nats = float(argument or "")
    except ValueError:
        raise ValueError(remedy) from None
    if not 0 < nats < MOST_NATS:
        raise ValueError(remedy)
    return Entropy(nats)

"""Choice of the next token: the likeliest, or one drawn from the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token always."""
    top_k: int | None = None
    """Tokens to draw from, the likeliest; None draws from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens whose probabilities first add up to this; None from all."""
    seed: int = 0

    def choose(self, logits: Tensor, *, text: int, place: int) -> int:
        """Return the next token.

        The choice depends on the arguments alone, so that a text is the same at every layout and
        beside whatever other texts.

        Args:
            logits: of the whole vocabulary, on the host, [vocab].
            text: number of the text.
            place: number of the token in the text.
        """
        if self.temperature == 0.0:
            return int(logits.argmax())
        ranked, tokens = (logits.double() / self.temperature).sort(descending=True, stable=True)
        chances = ranked.softmax(dim=0)
        if self.top_k is not None:
            chances = chances[: self.top_k]
        if self.top_p is not None:
            # a token is in if those before it do not suffice; the first is always
            before = chances.cumsum(dim=0) - chances
            chances = chances[: max(1, int((before < self.top_p * chances.sum()).sum()))]
        until = chances.cumsum(dim=0)
        draw = np.random.default_rng((self.seed, text, place)).random() * float(until[-1])
        return int(tokens[min(int((until <= draw).sum()), len(chances) - 1)])

"""How far a served checkpoint is from the model it was made of, and whether 4-bit keys and values are to blame."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from omniserve.evals.perplexity import Score, measure

if TYPE_CHECKING:
    from omniserve.llm import LLM

HURTS = 0.02
"""Nats that 4-bit KV may add to the KL divergence before it is advised against, if they are also half of it."""

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, predictions done, predictions)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What was measured.

    precision  what was served, for people; kv8_precision the word of the same weights with 8-bit KV
    reference  the 16-bit model alone
    served     the checkpoint, against it
    kv8        the checkpoint with 8-bit KV, against it; None unless it was served with 4-bit KV
    """

    precision: str
    kv8_precision: str
    reference: Score
    served: Score
    kv8: Score | None

    @property
    def kv4_costs(self) -> float | None:
        """Nats of KL that 4-bit KV adds to 8-bit KV; None if it was not compared."""
        if self.kv8 is None or self.kv8.kl is None or self.served.kl is None:
            return None
        return self.served.kl - self.kv8.kl

    @property
    def advice(self) -> str | None:
        """The warning that 4-bit KV hurts this model, or None."""
        cost, total = self.kv4_costs, self.served.kl
        if cost is None or total is None or (cost == cost and (cost < HURTS or cost < total / 2)):
            return None
        share = f"{cost:.3g} of its {total:.3g} nats of KL divergence" if cost == cost else "its output"
        return f"4-BIT KV HURTS THIS MODEL: {share} come from it; serve it with --precision {self.kv8_precision}"


def fidelity(
    load: Callable[[str], "LLM"],
    reference: "LLM",
    windows: Sequence[Sequence[int]],
    *,
    on_progress: Progress | None = None,
) -> Fidelity:
    """Return how far a checkpoint is from `reference` on windows of tokens, through the served path.

    load  returns the checkpoint's engine at a precision's word, "auto" for its own; each is closed after its turn
    """

    def told(phase: str) -> Callable[[int, int], None] | None:
        return None if on_progress is None else lambda done, total: on_progress(phase, done, total)

    alone = measure(reference, windows, on_progress=told("16 bit"))
    with load("auto") as llm:
        precision = llm.config.precision
        served = measure(llm, windows, reference=reference, on_progress=told(precision.name))
    wide = f"{precision.weight}kv8"
    kv8 = None
    if precision.kv == "kv4":
        with load(wide) as llm:
            kv8 = measure(llm, windows, reference=reference, on_progress=told(wide))
    return Fidelity(precision=precision.label, kv8_precision=wide, reference=alone, served=served, kv8=kv8)

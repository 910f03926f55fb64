"""Which pages a future query can still see. Plain Python: no torch here."""

from dataclasses import dataclass

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRule:
    """Key j stays while some query i at a position >= next sees it: j < sink, or j > i - local.

    prompt_local, local  the windows of queries at prompt positions and at produced ones, token-exact; a page is only
                         the unit that is kept
    """

    sink: int
    prompt_local: int
    local: int

    @property
    def sink_pages(self) -> int:
        """Leading pages that are always kept."""
        return ceil_div(self.sink, PAGE)

    def dead(self, next: int, prompt: int) -> range:
        """Return the logical pages that no query at a position >= `next` of a request with this prompt sees.

        Page t is dead when its first token is no sink and its last one, 64 t + 63, lies at or before i - local for the
        first query i to come: that at `next`, and while the prompt lasts also the first produced one.
        """
        seen_from = next - self.local + 1
        if next < prompt:
            seen_from = min(next - self.prompt_local, prompt - self.local) + 1
        return range(self.sink_pages, max(seen_from // PAGE, self.sink_pages))

    def most(self, *, prompt: int, total: int, known: int, computed: int, unlanded: int) -> int:
        """Return the most pages that a request can hold from now on.

        total  tokens it may grow to; known: tokens it has, of which `computed` have landed
        unlanded  tokens that may be issued before the first of them lands
        """
        ahead = max(known - computed, 1)
        steady = self._window(self.local, 3, total)  # of an ordinary decode step and the one planned behind it
        if computed >= prompt and ahead <= 3:
            return steady
        local = max(self.local, self.prompt_local) if computed < prompt else self.local
        return max(steady, self._window(local, min(ahead, unlanded), known))

    def _window(self, local: int, ahead: int, tokens: int) -> int:
        """Pages of the sink, of the window of the next query and of `ahead` tokens from it on."""
        spans = ceil_div(local + ahead - 2, PAGE) + 1
        return min(self.sink_pages + spans, ceil_div(tokens, PAGE))

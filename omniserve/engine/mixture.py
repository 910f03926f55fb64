"""Steps that a GPU replays: rows of produced positions, beside them chunks of prompts."""

from dataclasses import dataclass
from itertools import accumulate

from omniserve.base.numbers import ceil_div
from omniserve.base.types import PAGE, Work


def decodes(work: Work) -> bool:
    """Return whether a work is one produced position whose token lies on the device."""
    return work.draws and not work.new_tokens and work.count == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A step of produced positions whose tokens lie on the device, and of chunks of prompts; plain numbers.

    produced  works of the former, in their order; chunks: of the latter, at least one
    """

    works: tuple[Work, ...]
    produced: tuple[Work, ...]
    chunks: tuple[Work, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the chunks."""
        return sum(work.count for work in self.chunks)

    @property
    def pages(self) -> int:
        """Pages of their sequences, up to the chunks' ends."""
        return sum(ceil_div(work.start + work.count, PAGE) for work in self.chunks)

    @staticmethod
    def of(works: tuple[Work, ...], tiles_from: int | None) -> "Mixture | None":
        """Return a step as a mixture; None if it holds anything else, or no chunk.

        tiles_from  first prompt position whose queries choose their pages by tiles, if there is one: none of these
        """
        produced = tuple(work for work in works if decodes(work))
        chunks = tuple(work for work in works if not decodes(work))
        for work in chunks:
            if work.start + work.count > (work.prompt if tiles_from is None else min(work.prompt, tiles_from)):
                return None
        return Mixture(works=works, produced=produced, chunks=chunks) if chunks else None

    def lists(self, size: tuple[int, int, int], idle: int) -> list[list[int]]:
        """Return the step padded to so many produced positions, tokens of chunks and chunks, for `Assembler.mix`.

        Rows and tokens that pad belong to the slot `idle`; chunks that pad are empty.
        """
        rows, tokens, chunks = size
        more, fill, none = rows - len(self.produced), tokens - self.tokens, chunks - len(self.chunks)
        assert min(more, fill, none) >= 0, size
        ends = list(accumulate((work.count for work in self.chunks), initial=0))
        return [
            [*(work.slot for work in self.produced), *[idle] * more],
            [*(work.start for work in self.produced), *[0] * more],
            [*(work.prompt for work in self.produced), *[0] * more],
            [*(token for work in self.chunks for token in work.new_tokens), *[0] * fill],
            [*(p for work in self.chunks for p in range(work.start, work.start + work.count)), *[0] * fill],
            [*(work.slot for work in self.chunks for _ in range(work.count)), *[idle] * fill],
            [*ends, *[ends[-1]] * none],
            [*(work.start + work.count for work in self.chunks), *[0] * none],
            [*(work.slot for work in self.chunks), *[idle] * none],
            [*(work.prompt for work in self.chunks), *[0] * none],
        ]

    def spans(self, rows: int) -> tuple[slice, ...]:
        """Return per work where its tokens are, when produced positions are padded to so many rows."""
        spans, single, token = [], 0, rows
        for work in self.works:
            if decodes(work):
                spans.append(slice(single, single + 1))
                single += 1
            else:
                spans.append(slice(token, token + work.count))
                token += work.count
        return tuple(spans)

"""The tensors of one step. Data only."""

from dataclasses import dataclass

from torch import Tensor

PIECE = 2
"""Pages of one part of a produced position's row; more in long rows. Part of the result's bits: it never depends on
the batch."""

FEW = 8
"""Such pieces that a row has at most: in a longer one they are twice as large."""

RUN = 8
"""Pieces that are added up in page order before runs of them are."""

MOST_PIECES = 128
"""Parts of a row at most: the pages of a part double until there are no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageList:
    """Pages to read.

    ids    int32 [X, P], or [X, H, P] when key heads differ: physical page
    index  int32, same shape, or None: logical page, whose first key is at position index * 64; None means 0, 1, 2, ...
    count  int32 [R]: entries in use
    slots  int64 [R] or None: row r reads ids[slots[r]] and index[slots[r]]; None: X = R
    """

    ids: Tensor
    index: Tensor | None
    count: Tensor
    slots: Tensor | None


@dataclass(frozen=True, slots=True)
class Visible:
    """Key j is visible to query i when j <= i and (j < sink or j > i - local). Dense: local = None."""

    sink: int = 0
    local: int | None = None

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return bool [..., queries, keys] from positions [..., queries] and [..., keys]."""
        i, j = queries[..., :, None], keys[..., None, :]
        seen = j <= i
        return seen if self.local is None else seen & ((j < self.sink) | (j > i - self.local))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the heads of one kind read in a run of adjacent rows; `pages` counts from the first of these rows.

    Lists of prompt rows are ascending. With a window (`visible.local`) they hold the pages of the sink and all from the
    first that the window shows the row's first query; without, they end with the row's own pages, those of its queries.

    every  of lists that were chosen: the table int32 [slots, max_pages] and slots int64 [R] of all pages of the rows,
           if they are known; nothing more is seen by them
    """

    rows: range
    pages: PageList
    visible: Visible
    every: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Most:
    """What the rows behind the produced ones take at most, where the host does not know them: in captured steps.

    tokens  their queries; pages: those of their whole sequences, each sequence rounded up
    """

    tokens: int
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Runs of adjacent tokens that share a page list; rows of produced positions come first, tiles last.

    cu_q     int32 [R + 1]: where each row's tokens begin
    seq_len  int32 [R]: position of a row's last token + 1
    singles  leading rows of produced positions, one token each; a prompt chunk of one token is not among them
    tiles    trailing rows of prompt positions that choose their pages: each begins at a multiple of the tile
    tiled    how many of them each request has, which are adjacent
    longest  largest seq_len
    cuts     int32 [2, singles + 1] or None: `cut_rows` of the pages of all leading rows; None: `attend` makes it
             itself, in every layer anew
    chunks   positions of the queries of each row behind the produced ones, as the host knows them
    most     None, or what these take at most: any of them may be empty then, with seq_len 0, and at least one is not
    """

    cu_q: Tensor
    seq_len: Tensor
    singles: int
    longest: int
    tiles: int = 0
    tiled: tuple[int, ...] = ()
    cuts: Tensor | None = None
    chunks: tuple[range, ...] = ()
    most: Most | None = None

    @property
    def count(self) -> int:
        """R."""
        return int(self.seq_len.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Scratch of one runner, sized once. out: [max step tokens, Hq, D], what attention writes."""

    out: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step as tensors.

    tokens       int64 [T]; positions int64 [T]
    write_slots  per kind int64 [T]: physical page * 64 + offset of each token's key and value
    slots        int64 [R]: request slot of each row; prompts int64 [R]: prompt length of its request
    tables       per kind int32 [slots, max_pages]: physical page by request slot and logical page
    windows      per kind what its heads read alike in all layers: lists that lengths alone decide, made once per step
    memo         int32 [slots, N, P]: logical pages that each slot's request chose at its last refresh, for the N
                 heads of all layers that choose; None without selection
    kept         what rows of produced positions read if none of them chooses, made once per step: lists of these N
                 heads; None: `select_pages` makes them, layer by layer
    """

    tokens: Tensor
    positions: Tensor
    write_slots: tuple[Tensor, ...]
    slots: Tensor
    prompts: Tensor
    tables: tuple[Tensor, ...]
    windows: tuple[tuple[Reading, ...], ...]
    memo: Tensor | None
    kept: PageList | None
    rows: Rows
    work: Workspace

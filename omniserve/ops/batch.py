"""The tensors of one step. Data only."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Runs of adjacent tokens that share a page list; rows of produced positions come first.

    cu_q     int32 [R + 1]: where each row's tokens begin
    seq_len  int32 [R]: position of a row's last token + 1
    singles  leading rows of produced positions, one token each; a prompt chunk of one token is not among them
    longest  largest seq_len
    """

    cu_q: Tensor
    seq_len: Tensor
    singles: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Scratch of one runner, sized once. out: [max step tokens, Hq, D], what attention writes."""

    out: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step as tensors.

    tokens       int64 [T]; positions int64 [T]
    write_slots  per kind int64 [T]: physical page * 64 + offset of each token's key and value
    slots        int64 [R]: request slot of each row
    tables       per kind int32 [slots, max_pages]: physical page by request slot and logical page
    """

    tokens: Tensor
    positions: Tensor
    write_slots: tuple[Tensor, ...]
    slots: Tensor
    tables: tuple[Tensor, ...]
    rows: Rows
    work: Workspace

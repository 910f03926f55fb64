"""Policies: what sparsity means. A policy hands out page lists and holds no state of any request."""

from typing import Protocol

from omniserve.base.numbers import ceil_div
from omniserve.base.spec import ModelSpec
from omniserve.base.types import PAGE, Kind
from omniserve.ops.batch import Batch
from omniserve.ops.pages import HeadGroup, PageList, PageStore, Visible


class Policy(Protocol):
    """Decides which keys are kept in memory and which are read."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of heads that have pages of their own, in the order of the head groups."""

    def groups(self, layer: int, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return what each kind of heads reads in a layer this step."""


class Dense:
    """Every head sees every key, or those of the model's own sliding window."""

    kinds: tuple[Kind, ...] = (Kind.RETRIEVAL,)

    def __init__(self, spec: ModelSpec) -> None:
        self._heads = slice(0, spec.heads)
        self._visible = [Visible(local=window) for window in spec.windows or (None,) * spec.layers]

    def groups(self, layer: int, stores: tuple[PageStore, ...], batch: Batch) -> tuple[HeadGroup, ...]:
        """Return one group whose list is the device table itself, by request slot."""
        count = (batch.rows.seq_len + PAGE - 1) // PAGE
        assert batch.rows.longest <= batch.tables[0].shape[1] * PAGE, ceil_div(batch.rows.longest, PAGE)
        pages = PageList(ids=batch.tables[0], index=None, count=count, slots=batch.slots)
        return (HeadGroup(heads=self._heads, pages=pages, visible=self._visible[layer], store=stores[0]),)

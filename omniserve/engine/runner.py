"""One rank: the model, its pages, and the state of its request slots."""

from collections.abc import Sequence

import torch
from torch import Tensor

from omniserve.base.types import Step, StepResult, Work
from omniserve.engine.assemble import Assembled, Assembler
from omniserve.models.decoder import Decoder, LayerStores
from omniserve.ops.batch import Workspace
from omniserve.ops.sample import SampleState, sample

SCORE_TILE = 128
"""Positions whose logits a reducer gets at once; bounds the memory of large vocabularies."""


class Drawn:
    """Tokens of one step that still lie on the device."""

    def __init__(self, requests: tuple[str, ...], tokens: Tensor | None) -> None:
        self._requests = requests
        self._tokens = tokens

    def result(self) -> StepResult:
        """Wait for the step and return what it drew."""
        values = [] if self._tokens is None else self._tokens.tolist()
        return StepResult(tokens=dict(zip(self._requests, values, strict=True)))


class Runner:
    """Runs steps in order. Mutable: pages, page tables, last tokens and sampling parameters by slot."""

    def __init__(
        self,
        model: Decoder,
        stores: LayerStores,
        *,
        slots: int,
        max_len: int,
        max_step_tokens: int,
        kinds: int,
    ) -> None:
        device, dtype = model.embedding.device, model.embedding.dtype
        spec = model.spec
        self.model = model
        self.stores = stores
        self.assembler = Assembler(slots=slots, max_len=max_len, kinds=kinds, device=device)
        self._sampling = SampleState(slots, device)
        self._work = Workspace(out=torch.empty(max_step_tokens, spec.heads, spec.head_dim, dtype=dtype, device=device))
        self._reducers: dict[int, Work] = {}

    @torch.inference_mode()
    def run(self, step: Step) -> Drawn:
        """Run one step; what it drew stays on the device until the result is asked for."""
        for work in step.works:
            if work.admission is not None:
                self._sampling.set(work.slot, work.admission.sampling, work.admission.seed)
                self._reducers[work.slot] = work
        assembled = self.assembler.assemble(step, self._work)
        hidden = self.model.hidden(assembled.batch, self.stores)
        for number, work in enumerate(step.works):
            if work.logits == "all":
                self._reduce(work, hidden, assembled, number)
        return self._draw(step.works, hidden, assembled)

    def _reduce(self, work: Work, hidden: Tensor, assembled: Assembled, number: int) -> None:
        admission = self._reducers[work.slot].admission
        assert admission is not None and admission.reduce is not None, work
        position = work.start
        for span in assembled.spans[number]:
            for begin in range(span.start, span.stop, SCORE_TILE):
                end = min(begin + SCORE_TILE, span.stop)
                positions = torch.arange(position, position + end - begin, device=hidden.device)
                admission.reduce(positions, self.model.logits(hidden[begin:end]))
                position += end - begin

    def _draw(self, works: Sequence[Work], hidden: Tensor, assembled: Assembled) -> Drawn:
        drawing = [(work, end) for work, end in zip(works, assembled.ends, strict=True) if work.draws]
        if not drawing:
            return Drawn((), None)
        ends = torch.tensor([end for _, end in drawing], device=hidden.device)
        slots = [work.slot for work, _ in drawing]
        positions = torch.tensor([work.start + work.count for work, _ in drawing], device=hidden.device)
        tokens = sample(self.model.logits(hidden[ends]), self._sampling.rows(slots, positions))
        self.assembler.last_token[torch.tensor(slots, device=hidden.device)] = tokens
        return Drawn(tuple(work.request for work, _ in drawing), tokens)

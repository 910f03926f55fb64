"""Runs samples through a model whose policy is the probe of sparsity/identify.py."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from omniserve.base.config import Options
from omniserve.base.errors import ConfigError
from omniserve.base.spec import ModelSpec
from omniserve.base.types import Request, SamplingParams
from omniserve.engine.build import Built, LoadProgress, build
from omniserve.sparsity.identify import Probe, Prose, Sample


def identify(
    model: str | Path,
    options: Options,
    samples: Callable[[Built], Sequence[Sample | Prose]],
    *,
    on_load: LoadProgress | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Probe, Built]:
    """Return what each key head of a model looks at, and the engine that was asked.

    samples  called with the loaded engine, for its tokenizer and context
    Raises OmniserveError.
    """
    if options.sparsity != "off":
        raise ConfigError(f"sparsity={options.sparsity}: heads are identified under dense attention; leave it off")
    probes: list[Probe] = []

    def policy(spec: ModelSpec, device: torch.device) -> Probe:
        probes.append(Probe(spec))
        return probes[0]

    built = build(
        model, replace(options, max_num_seqs=1, enable_prefix_caching=False), on_load=on_load, make_policy=policy
    )
    todo = samples(built)
    for number, sample in enumerate(todo):
        probes[0].expect(sample)
        ask = Request(
            id=str(number),
            tokens=list(sample.ids),
            prompt=len(sample.ids),
            sampling=SamplingParams(temperature=0.0, seed=0, max_tokens=1),
            limit=1,
        )
        built.engine.add(ask)
        built.engine.drain()
        if on_progress is not None:
            on_progress(number + 1, len(todo))
    return probes[0], built

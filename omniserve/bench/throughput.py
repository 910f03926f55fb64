"""Tokens per second of whole batches, and of transformers on the same prompts in the same run.

Every runner gets the same prompts (random token ids, nothing shared between them), decodes greedily and ignores the
end of sequence. One token each gives the time of the prompts; what all tokens take beyond that is decoding.
"""

import contextlib
import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from omniserve.base.errors import ConfigError
from omniserve.base.types import SamplingParams

if TYPE_CHECKING:
    from omniserve.llm import LLM

Prompts = Sequence[Sequence[int]]
Runner = Callable[[Prompts, int], list[list[int]]]
"""runner(prompts, count) returns `count` tokens for each prompt, computed as one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over the repeats of one runner.

    prompt_seconds  until every prompt has its first token
    total_seconds   until every prompt has its last token
    tokens          what the last repeat produced, for comparison
    """

    batch: int
    input_len: int
    output_len: int
    prompt_seconds: float
    total_seconds: float
    tokens: list[list[int]]

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first ones, divided by the time they took; None for a single token."""
        seconds = self.total_seconds - self.prompt_seconds
        return self.batch * (self.output_len - 1) / seconds if self.output_len > 1 and seconds > 0 else None

    @property
    def output_tokens_per_second(self) -> float:
        """All produced tokens divided by the time from the first submit to the last token."""
        return self.batch * self.output_len / self.total_seconds

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens divided by the time until every prompt has its first token."""
        return self.batch * self.input_len / self.prompt_seconds


def random_prompts(batch: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Return prompts of random token ids."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(length)] for _ in range(batch)]


def measure(
    runners: Sequence[Runner],
    prompts: Prompts,
    output_len: int,
    *,
    repeats: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Return the speed of each runner; they take turns within each repeat, after one warm-up that is not counted."""
    times: list[list[tuple[float, float]]] = [[] for _ in runners]
    tokens: list[list[list[int]]] = [[] for _ in runners]
    steps = 1 + repeats
    for step in range(steps):
        for place, runner in enumerate(runners):
            if step == 0:
                runner(prompts, min(output_len, 4))
            else:
                began = time.perf_counter()
                runner(prompts, 1)
                between = time.perf_counter()
                tokens[place] = runner(prompts, output_len)
                times[place].append((between - began, time.perf_counter() - between))
            if on_progress is not None:
                on_progress(step * len(runners) + place + 1, steps * len(runners))
    return [
        Speed(
            batch=len(prompts),
            input_len=len(prompts[0]),
            output_len=output_len,
            prompt_seconds=statistics.median(first for first, _ in times[place]),
            total_seconds=statistics.median(total for _, total in times[place]),
            tokens=tokens[place],
        )
        for place in range(len(runners))
    ]


def engine_runner(llm: "LLM") -> Runner:
    """Return a runner that submits all prompts at once to an engine."""

    def run(prompts: Prompts, count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    return run


def transformers_runner(model: str, *, dtype: str) -> Runner:
    """Return a runner around `generate` of transformers with the same weights, in the engine's own dtype.

    Raises ConfigError if transformers is not installed or cannot read the model.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("--peer transformers: pip install transformers accelerate gguf") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = Path(model)
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar of its own, terminal or not
            network = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), local_files_only=True, **where
            ).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"--peer transformers: it cannot read {model}: {' '.join(str(error).split())}") from error
    network.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def run(prompts: Prompts, count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens

    return run

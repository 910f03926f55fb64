"""Tokens per second of whole batches, and of transformers on the same prompts in the same run.

Every runner gets the same prompts (random token ids, nothing shared between them) at once, decodes greedily and ignores
the end of sequence; no text is made, which a server does in another process. The clock runs from before the first
prompt is submitted until the last token is there: prompts and decoding are told apart by when each token came.
"""

import contextlib
import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from omniserve.base.errors import ConfigError, OmniserveError
from omniserve.base.numbers import ceil_div
from omniserve.base.types import SamplingParams

if TYPE_CHECKING:
    from omniserve.llm import LLM

Prompts = Sequence[Sequence[int]]

WARM_UP = 8
"""Most tokens that each prompt of a warm-up produces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One run of a whole batch, in seconds from the moment before the first prompt was submitted.

    first  when the first token of each prompt had come; total: when the last token had
    late   tokens that came after every prompt had its first one
    """

    tokens: list[list[int]]
    first: list[float]
    total: float
    late: int


Runner = Callable[[Prompts, int], Ran]
"""runner(prompts, count) produces `count` tokens for each prompt, computed as one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Medians over the repeats of one runner.

    prompt_seconds  until every prompt has its first token
    first_seconds   until a prompt has its first token, on average
    total_seconds   until every prompt has its last token
    late            tokens that came after `prompt_seconds`
    tokens          what the last repeat produced, for comparison
    """

    batch: int
    input_len: int
    output_len: int
    prompt_seconds: float
    first_seconds: float
    total_seconds: float
    late: float
    tokens: list[list[int]]

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens that came after every prompt had its first one, divided by the time they took; None if none did."""
        seconds = self.total_seconds - self.prompt_seconds
        return self.late / seconds if self.late and seconds > 0 else None

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
    step_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Return the speed of each runner; they take turns within each repeat, after a warm-up that is not counted.

    step_tokens  the engine's largest step: the warm-up fills about two of them
    """
    runs: list[list[Ran]] = [[] for _ in runners]
    steps = 1 + repeats
    for step in range(steps):
        for place, runner in enumerate(runners):
            if step == 0:
                _warm_up(runner, prompts, output_len, step_tokens)
            else:
                runs[place].append(runner(prompts, output_len))
            if on_progress is not None:
                on_progress(step * len(runners) + place + 1, steps * len(runners))
    return [_median(found, len(prompts[0]), output_len) for found in runs]


def _warm_up(runner: Runner, prompts: Prompts, output_len: int, step_tokens: int) -> None:
    """Run the batch at its full width with short prompts, then a step's worth of whole prompts."""
    short = ceil_div(2 * step_tokens, len(prompts))
    runner([prompt[:short] for prompt in prompts], min(output_len, WARM_UP))
    if short < len(prompts[0]):
        runner(prompts[: ceil_div(step_tokens, len(prompts[0]))], min(output_len, 2))


def _median(runs: Sequence[Ran], input_len: int, output_len: int) -> Speed:
    return Speed(
        batch=len(runs[0].first),
        input_len=input_len,
        output_len=output_len,
        prompt_seconds=statistics.median(max(run.first) for run in runs),
        first_seconds=statistics.median(statistics.fmean(run.first) for run in runs),
        total_seconds=statistics.median(run.total for run in runs),
        late=statistics.median(run.late for run in runs),
        tokens=runs[-1].tokens,
    )


def engine_runner(llm: "LLM") -> Runner:
    """Return a runner that submits all prompts at once to an engine. It raises OmniserveError if one of them fails."""

    def run(prompts: Prompts, count: int) -> Ran:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        for output in outputs:
            if output.error is not None:
                raise OmniserveError(f"a request of the benchmark failed: {output.error}")
        first = [output.times[0] for output in outputs]
        everyone = max(first)
        return Ran(
            tokens=[list(output.token_ids) for output in outputs],
            first=[moment - began for moment in first],
            total=max(output.times[-1] for output in outputs) - began,
            late=sum(moment > everyone for output in outputs for moment in output.times),
        )

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

    def run(prompts: Prompts, count: int) -> Ran:
        clock = _Clock()
        ids = torch.tensor(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            out = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, stopping_criteria=[clock]
            )
        total = time.perf_counter() - began
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return Ran(
            tokens=tokens, first=[clock.times[0] - began] * len(tokens), total=total, late=len(tokens) * (count - 1)
        )

    return run


class _Clock:
    """Asked after every step of `generate` of transformers whether to stop: never; remembers when it was asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

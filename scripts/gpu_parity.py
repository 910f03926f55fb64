"""Kernels against torch references on one GPU: the whole model, and every operation on the same inputs.

    python scripts/gpu_parity.py MODEL TEXT [--dtype bfloat16] [WORD ...]

MODEL is a 16-bit model, served at each precision WORD, or a quantized checkpoint, served as it is. Prints two tables:
for each precision the KL divergence and perplexity of the kernels against the references, and as floors the divergence
of references in smaller steps and of references whose attention alone computes in fp64; then how far each operation is
from its reference, over all layers, on the same inputs. Exits with 1 if a divergence is above twice its floor, or a
perplexity off by more than half a percent.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniserve import LLM
from omniserve.evals.perplexity import cut
from omniserve.ops.act import Both, Int8, Plain
from omniserve.ops.dispatch import TABLE, force_reference, implements, load_kernels
from omniserve.ops.pages import attend, rope_write

PRECISIONS = "w16a16kv16", "w8a8kv8", "w4a8kv4"
LENGTH = 2048
WINDOWS = range(16)
STEP = 300
"""Tokens per step of the second reference run: no multiple of what the references take at once."""

KL_FACTOR, PERPLEXITY = 2.0, 0.005
TINY = 1e-9
ROWS = 256
"""Positions whose distributions are compared at once."""


class Switch:
    """Stands before every kernel: runs it, or its reference, or both on the same inputs.

    mode   "kernels"; "references"; "fp64": references, attention in fp64; "both": notes how far kernels are
    found  operation -> what -> a number for each call of it in mode "both"
    """

    def __init__(self) -> None:
        self.mode = "kernels"
        self.found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        load_kernels("cuda")
        for name, operation in TABLE.items():
            for one in [one for one in operation.implementations if one.device == "cuda"]:
                implements(operation, device="cuda", rank=100)(self._before(name, one.function))

    @contextmanager
    def to(self, mode: str) -> Iterator[None]:
        """Run in another mode within the block."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def _before(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        compared = {attend.name: self._attend, rope_write.name: self._rope_write}.get(name, partial(self._any, name))

        def run(*args: Any, **more: Any) -> Any:
            if self.mode == "kernels":
                return kernel(*args, **more)
            if self.mode == "both":
                return compared(kernel, *args, **more)
            if self.mode == "fp64" and name == attend.name:
                args[3].copy_(exact_attention(*args, **more))
                return None
            with force_reference():
                return TABLE[name].reference(*args, **more)

        return run

    def _any(self, name: str, kernel: Callable[..., Any], *args: Any, **more: Any) -> Any:
        with force_reference():
            expected = numbers(TABLE[name].reference(*args, **more))
        result = kernel(*args, **more)
        for part, have in numbers(result).items():
            self._note(name, part, have, expected[part])
        return result

    def _attend(self, kernel: Callable[..., Any], *args: Any, **more: Any) -> None:
        exact, out = exact_attention(*args, **more), args[3]
        with force_reference():
            attend.reference(*args, **more)
        self._note("attend", "reference against fp64", out, exact)
        kernel(*args, **more)
        self._note("attend", "kernel against fp64", out, exact)

    def _rope_write(
        self, kernel: Callable[..., Any], qkv: Tensor, positions: Tensor, slots: Any, stores: Any, *more: Any
    ) -> Tensor:
        pages = [torch.unique(slot[slot >= 0] >> 6) for slot in slots]
        with force_reference():
            expected = rope_write.reference(qkv, positions, slots, stores, *more)
        written = [store.pages[of] for store, of in zip(stores, pages, strict=True)]
        result: Tensor = kernel(qkv, positions, slots, stores, *more)
        self._note("rope_write", "queries", result, expected)
        for store, of, before in zip(stores, pages, written, strict=True):
            self._note("rope_write", "bytes of pages", store.pages[of], before)
        return result

    def _note(self, name: str, part: str, have: Tensor, expected: Tensor) -> None:
        exact = expected.double()
        norm = float(exact.norm())
        off = float((have.double() - exact).norm()) / norm if norm else 0.0
        self.found[name][f"{part}: relative error"].append(off)
        self.found[name][f"{part}: share that differs"].append(float((have != exact.to(have.dtype)).double().mean()))


def exact_attention(q: Tensor, groups: Any, rows: Any, out: Tensor, work: Any, *, scale: float) -> Tensor:
    """Return what `attend` would write, in fp64."""
    exact = torch.empty_like(out, dtype=torch.float64)
    with force_reference():
        attend.reference(q.double(), groups, rows, exact, work, scale=scale)
    return exact


def numbers(result: Any) -> dict[str, Tensor]:
    """Return the tensors of an operation's result by name."""
    match result:
        case Tensor():
            return {"result": result}
        case Plain():
            return {"values": result.x}
        case Int8():
            return {"codes": result.codes, "scales": result.scale}
        case Both():
            return numbers(result.plain) | numbers(result.int8)
        case tuple():
            return {name: t for one in result for name, t in numbers(one).items()}
    return {}


def log_probabilities(llm: LLM, window: list[int]) -> Tensor:
    """Return the log-probabilities [t, V] of what follows each token but the last."""
    parts: list[Tensor] = []
    llm.score(window, lambda positions, logits: parts.append(logits.clone()))
    return torch.log_softmax(torch.cat(parts)[:-1], -1)


def divergence(p: Tensor, q: Tensor) -> float:
    """Return the mean over positions of the KL divergence of q from p, both log-probabilities [t, V]."""
    parts = (
        (a.exp() * (a - b)).sum(1).double().sum().item() for a, b in zip(p.split(ROWS), q.split(ROWS), strict=True)
    )
    return sum(parts) / len(p)


def surprise(q: Tensor, window: list[int]) -> float:
    """Return the mean negative log-likelihood of a window."""
    return -q.gather(1, torch.tensor(window[1:], device=q.device)[:, None]).double().mean().item()


@torch.inference_mode()
def compare(load: Callable[..., LLM], text: str, switch: Switch) -> bool:
    """Print a row about a precision; return whether it keeps the rules."""
    kl: defaultdict[str, list[float]] = defaultdict(list)
    nll: defaultdict[str, list[float]] = defaultdict(list)
    with load(max_num_batched_tokens=LENGTH) as llm:
        ids = llm.tokenizer.encode(text, special=False)
        windows = list(cut(ids, length=LENGTH, stride=LENGTH, which=WINDOWS).values())
        with switch.to("both"):
            llm.score(windows[0], lambda positions, logits: None)
        for number, window in enumerate(windows):
            with switch.to("references"):
                p = log_probabilities(llm, window)
            nll["references"].append(surprise(p, window))
            for mode in ("fp64", "kernels"):
                with switch.to(mode):
                    q = log_probabilities(llm, window)
                kl[mode].append(divergence(p, q))
                nll[mode].append(surprise(q, window))
            if number == 0:
                with load(max_num_batched_tokens=STEP, backend="reference") as steps:
                    kl["steps"].append(divergence(p, log_probabilities(steps, window)))
        label = f"{llm.config.precision.label}, {llm.config.dtype}"
    changes = [served - alone for served, alone in zip(nll["kernels"], nll["references"], strict=True)]
    change, error = math.expm1(statistics.mean(changes)), statistics.stdev(changes) / math.sqrt(len(changes))
    floor, served = statistics.mean(kl["fp64"]), statistics.mean(kl["kernels"])
    cells = (
        label,
        f"{kl['steps'][0]:.2g}",
        f"{floor:.3g} ({kl['fp64'][0]:.3g})",
        f"{served:.3g} ({kl['kernels'][0]:.3g})",
        f"{served / max(floor, TINY):.2f} ({kl['kernels'][0] / max(kl['fp64'][0], TINY):.2f})",
        f"{math.exp(statistics.mean(nll['references'])):.3f}",
        f"{change:+.2%} ± {error:.2%}",
    )
    print(f"| {' | '.join(cells)} |", flush=True)
    return served <= KL_FACTOR * floor and abs(change) <= PERPLEXITY


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    switch = Switch()
    load = partial(
        LLM, given.model, dtype=given.dtype, max_num_seqs=1, max_model_len=LENGTH, device="cuda",
        kv_cache_memory_bytes=1 << 28, enable_prefix_caching=False,
    )  # fmt: skip
    print(
        f"| precision | KL (first window), references in steps of {STEP} | attention in fp64 | kernels | ratio "
        "| perplexity, references | kernels |\n|---|---|---|---|---|---|---|"
    )
    text = given.text.read_text(encoding="utf-8")
    kept = [
        compare(partial(load, precision=word), text, switch)
        for word in given.words or (["auto"] if Path(given.model).is_dir() else PRECISIONS)
    ]
    print("\n| operation | what | mean | largest |\n|---|---|---|---|")
    for name, parts in switch.found.items():
        for part, values in parts.items():
            print(f"| {name} | {part} | {statistics.mean(values):.2g} | {max(values):.2g} |")
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()

"""Noise of the served dtype: the same model, precision and text, cut into steps of different sizes.

In float64 the results are equal, token for token (tests/engine); in fp32 sums depend on the shape of a step, and
quantized activations and pages amplify that. This prints by how much, for docs/accuracy.md:

    python scripts/noise.py MODEL TEXT [WORD ...]
"""

import sys
from pathlib import Path

from omniserve import LLM
from omniserve.evals.perplexity import measure

LENGTH = 512
SIZES = 512, 300
PRECISIONS = "w16a16kv16", "w8a8kv8", "w8a8kv4", "w4a8kv8", "w4a8kv4"


def main() -> None:
    model, text, *words = sys.argv[1:]
    print("| precision | predictions | argmax that differ | KL |\n|---|---|---|---|")
    for word in words or PRECISIONS:
        whole, cut = (LLM(model, precision=word, max_num_seqs=1, max_num_batched_tokens=size) for size in SIZES)
        ids = whole.tokenizer.encode(Path(text).read_text(encoding="utf-8"), special=False)
        score = measure(cut, [ids[start : start + LENGTH] for start in (0, LENGTH, 2 * LENGTH)], reference=whole)
        assert score.agreement is not None, "there is a reference"
        flips = round(score.predictions * (1 - score.agreement))
        print(f"| {word} | {score.predictions} | {flips} | {score.kl:.2g} |", flush=True)


if __name__ == "__main__":
    main()

"""Real models beside SmolLM2, from GGUF: Qwen2.5-Coder 0.5B and 1.5B answer, with the logits of transformers. Long.

The files are looked for in the folder $OMNISERVE_TEST_MODELS, or else in .models.
"""

import ast
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniserve import LLM, SamplingParams
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.text import Tokenizer
from tests.cli.commands import ROOT, environment
from tests.model.test_transformers import exact, score

pytestmark = pytest.mark.long

MODELS = {
    "0.5b": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "1.5b": "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
}
LIMIT = 1e-2
"""Largest difference of a logit, in fp32 with fp32 pages."""
TOKENS = 256
THEIRS = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
path = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["ids"][None]).logits[0].contiguous()}, sys.argv[3])
"""
"""What transformers computes, in a process that gives its memory back."""


def find(size: str) -> Path:
    folder = Path(os.environ.get("OMNISERVE_TEST_MODELS", ROOT / ".models"))
    path = folder / MODELS[size]
    if not path.is_file():
        pytest.fail(f"{path} is missing: run `python scripts/fetch_real_models.py qwen-coder-{size} --to {folder}`")
    return path


def tell(text: str) -> None:
    """Print a figure; `pytest -s` shows it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    sys.stdout.write(f"\n{text}; peak RSS {peak:.2f} GiB, of transformers {theirs:.2f} GiB\n")


@pytest.mark.parametrize("size", MODELS)
def test_logits_equal_transformers(size: str, tmp_path: Path) -> None:
    path = find(size)
    prose = (ROOT / "tests" / "data" / "prose.txt").read_text()
    ids = Tokenizer.load(open_checkpoint(path)).encode(prose)[:TOKENS]
    assert len(ids) == TOKENS
    save_file({"ids": torch.tensor(ids)}, tmp_path / "ids.safetensors")
    command = [sys.executable, "-c", THEIRS, str(path), str(tmp_path / "ids.safetensors"), str(tmp_path / "logits")]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    wanted = load_file(tmp_path / "logits")["logits"]
    began = time.perf_counter()
    built = exact(path, max_num_batched_tokens=128, max_model_len=512)
    loaded = time.perf_counter()
    found = score(built, ids)
    apart = float((found - wanted).abs().max())
    same = float((found.argmax(1) == wanted.argmax(1)).float().mean())
    tell(
        f"{size}: {TOKENS} tokens, largest difference of a logit {apart:.1e}, same likeliest token {same:.1%}, "
        f"loaded in {loaded - began:.1f} s, scored in {time.perf_counter() - loaded:.1f} s"
    )
    assert apart < LIMIT


@pytest.mark.parametrize("size", MODELS)
def test_it_answers(size: str) -> None:
    began = time.perf_counter()
    with LLM(find(size), precision="w8a8kv8", max_model_len=1024, max_num_seqs=1) as llm:
        loaded = time.perf_counter()
        question = "Write a Python function fib(n) that returns the n-th Fibonacci number. Only the code, no words."
        output = llm.chat([{"role": "user", "content": question}], SamplingParams(temperature=0, max_tokens=160))[0]
        took = time.perf_counter() - loaded
        answer = output.outputs[0]
        fact = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=6))[0].outputs[0].text
    tell(
        f"{size} at w8a8kv8: loaded in {loaded - began:.1f} s, {len(answer.token_ids)} tokens in {took:.1f} s, "
        f"ended by {answer.finish_reason}:\n{answer.text}\nThe capital of France is{fact}\n"
    )
    assert "Paris" in fact
    assert answer.finish_reason == "stop"
    (function,) = ast.parse(answer.text.split("```python")[-1].split("```")[0]).body
    assert isinstance(function, ast.FunctionDef)
    assert function.name == "fib"
    assert any(isinstance(node, ast.Return) for node in ast.walk(function))

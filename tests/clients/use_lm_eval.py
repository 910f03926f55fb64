"""lm-eval's local-completions against a server that has a model, and the same scores from the offline API.

`python use_lm_eval.py http://127.0.0.1:8000 MODEL FOLDER`: MODEL is what the server serves at precision w8a8kv8,
FOLDER holds lm-eval's executables. Runs where omniserve is installed; lm-eval stays in its own environment.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import checks
import torch
from torch import Tensor

from omniserve import LLM

HERE = Path(__file__).resolve().parent
TASK = """\
task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
EXACT = 1e-4
"""One prompt at a time is computed in the same way by both."""
NOISE = 0.5
"""Several prompts in a pass are summed in another order, and 8-bit activations amplify that (docs/design.md 2.6)."""


def served(url: str, model: str, tokenizer: Path, bin_folder: Path, work: Path, *, at_once: int) -> tuple[float, Any]:
    """Run lm-eval with `at_once` prompts in a request. Return its accuracy, and log-likelihood of (context, choice)."""
    tasks, out = work / "tasks", work / f"out-{at_once}"
    tasks.mkdir(exist_ok=True)
    (tasks / "facts.yaml").write_text(TASK.format(data=HERE / "tasks" / "facts.jsonl"))
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tokenizer),
        "num_concurrent": 1 if at_once == 1 else 2,
        "max_length": 512,
    }
    command = [bin_folder / "lm-eval", "run", "--model", "local-completions", "--tasks", "facts"]
    command += [
        "--include_path",
        tasks,
        "--model_args",
        ",".join(f"{name}={value}" for name, value in arguments.items()),
    ]
    command += ["--batch_size", at_once, "--log_samples", "--output_path", out]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "cache"), "OPENAI_API_KEY": "x"}
    said = checks.command(command, environment, cwd=str(work))
    print("\n".join(line for line in said.splitlines() if line.startswith("|")))
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    found = {}
    for sample in map(json.loads, samples.read_text().splitlines()):
        for argument, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            found[argument["arg_0"], argument["arg_1"]] = float(response[0][0])
    return json.loads(results.read_text())["results"]["facts"]["acc,none"], found


def facts() -> list[dict[str, Any]]:
    """The questions, each with four choices and the place of the right one."""
    return [json.loads(line) for line in (HERE / "tasks" / "facts.jsonl").read_text().splitlines()]


def offline(path: str) -> tuple[float, dict[tuple[str, str], float]]:
    """Return the same from logits of the offline API."""
    llm = LLM(path, precision="w8a8kv8", max_model_len=2048)
    right, found = [], {}
    for fact in facts():
        context = fact["question"]
        values = [log_likelihood(llm, context, f" {choice}") for choice in fact["choices"]]
        found |= {(context, f" {choice}"): value for choice, value in zip(fact["choices"], values, strict=True)}
        right.append(values.index(max(values)) == fact["answer"])
    return sum(right) / len(right), found


def log_likelihood(llm: LLM, context: str, choice: str) -> float:
    ids = llm.tokenizer.encode(context + choice)
    first = len(llm.tokenizer.encode(context))
    total = 0.0

    def add(positions: Tensor, logits: Tensor) -> None:
        nonlocal total
        rows = torch.log_softmax(logits.double(), dim=-1)
        for place, row in zip(positions.tolist(), rows, strict=True):
            if first <= place + 1 < len(ids):
                total += float(row[ids[place + 1]])

    llm.score(ids, add)
    return total


def main(url: str, path: str, bin_folder: str) -> None:
    model = checks.model(url)
    score, expected = offline(path)
    print(f"offline API: accuracy {score:.6f} of {len(expected)} log-likelihoods")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = work / "tokenizer"
        checks.export_tokenizer(path, tokenizer)
        for at_once, bound in ((1, EXACT), (4, NOISE)):
            accuracy, found = served(url, model, tokenizer, Path(bin_folder), work, at_once=at_once)
            assert found.keys() == expected.keys()
            apart = max(abs(found[key] - expected[key]) for key in expected)
            print(f"lm-eval, {at_once} in a request: accuracy {accuracy:.6f}; largest difference {apart:.2e}")
            assert apart <= bound
            assert abs(accuracy - score) <= (0 if at_once == 1 else 1 / len(facts()))


if __name__ == "__main__":
    main(*sys.argv[1:])

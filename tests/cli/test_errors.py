"""Bad input: one sentence on standard error, exit code 2, nothing on standard output, nothing left behind."""

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniserve.cli import answer, main
from tests.cli.commands import CONTEXT, Ran, check_refusal, environment

Run = Callable[..., Ran]


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


USAGE = {
    "unknown command": (["genrate"], ["'genrate'", "did you mean generate?"]),
    "unknown subcommand": (["eval", "perplexty", "x"], ["did you mean perplexity?"]),
    "unknown option": (["generate", "x", "--prompt", "a", "--max-model-lenn", "5"], ["did you mean --max-model-len?"]),
    "unknown short option": (["generate", "x", "--prompt", "a", "-x"], ["-x"]),
    "option of another command": (["generate", "x", "--prompt", "a", "--stats"], ["--stats"]),
    "later option": (["chat", "x", "--url", "http://127.0.0.1"], ["unknown option --url"]),
    "no model": (["generate", "--prompt", "a"], ["MODEL"]),
    "no prompt": (["generate", "x"], ["--prompt"]),
    "option without value": (["generate", "x", "--prompt"], ["--prompt"]),
    "two models": (["generate", "x", "y", "--prompt", "a"], ["unexpected argument 'y'"]),
    "twice": (["generate", "x", "--prompt", "a", "--seed", "1", "--seed", "2"], ["--seed"]),
    "not a number": (["generate", "x", "--prompt", "a", "--top-p", "much"], ["--top-p", "much"]),
    "not a whole number": (["generate", "x", "--prompt", "a", "--max-tokens", "1.5"], ["--max-tokens", "1.5"]),
    "log level": (["doctor", "--log-level", "loud"], ["loud", "warning"]),
    "unknown precision": (["generate", "x", "--prompt", "a", "--precision", "w8a8kv9"], ["w8a8kv9", "w8a8kv8"]),
    "group size": (["generate", "x", "--prompt", "a", "--group-size", "64"], ["64", "-1, 128"]),
    "choice": (["generate", "x", "--prompt", "a", "--dtype", "flot16"], ["did you mean float16?"]),
    "empty prompt": (["generate", "x", "--prompt", ""], ["the prompt is empty"]),
    "empty question": (["chat", "x", "-q", ""], ["the question is empty"]),
    "surrogate": (["generate", "x", "--prompt", "a\udcffb"], ["the prompt is not valid UTF-8"]),
    "hot": (["generate", "x", "--prompt", "a", "--temperature", "3"], ["temperature=3.0", "0 to 2"]),
    "nan": (["generate", "x", "--prompt", "a", "--temperature", "nan"], ["temperature=nan", "0 to 2"]),
    "top-p": (["generate", "x", "--prompt", "a", "--top-p", "0"], ["top_p=0.0"]),
    "min-p": (["generate", "x", "--prompt", "a", "--min-p", "2"], ["min_p=2.0"]),
    "top-k": (["generate", "x", "--prompt", "a", "--top-k", "-2"], ["top_k=-2"]),
    "no tokens": (["generate", "x", "--prompt", "a", "--max-tokens", "0"], ["max_tokens=0", "1 or more"]),
    "empty stop": (["generate", "x", "--prompt", "a", "--stop", ""], ["stop"]),
    "seed": (["generate", "x", "--prompt", "a", "--seed", str(2**63)], [str(2**63), "64-bit"]),
    "no text": (["eval", "perplexity", "x", "--text", "no.txt"], ["no.txt", "no such text file"]),
    "windows": (["eval", "perplexity", "x", "--text", "ok.txt", "--windows", "4-1"], ["4-1", "0-19"]),
    "window length": (["eval", "perplexity", "x", "--text", "ok.txt", "--length", "1"], ["--length=1", "2 or more"]),
    "stride": (["eval", "perplexity", "x", "--text", "ok.txt", "--stride", "0"], ["--stride=0"]),
    "precisions": (["eval", "perplexity", "x", "--text", "ok.txt", "--precisions", "w8a8,w9"], ["w9"]),
    "two precisions": (
        ["eval", "perplexity", "x", "--text", "ok.txt", "--precision", "w8a8", "--precisions", "w4a8"],
        ["give one of the two"],
    ),
    "reference": (["eval", "perplexity", "x", "--text", "ok.txt", "--reference", "w16"], ["w16", "w16a16kv16"]),
    "text is no text": (["eval", "perplexity", "x", "--text", "latin.txt"], ["latin.txt", "not UTF-8"]),
    "text is a folder": (["eval", "perplexity", "x", "--text", "."], ["cannot read"]),
    "batch": (["bench", "throughput", "x", "--batch", "0"], ["--num-prompts=0"]),
    "repeats": (["bench", "throughput", "x", "--repeats", "0"], ["--repeats=0"]),
    "input length": (["bench", "throughput", "x", "--input-len", "0"], ["--input-len=0"]),
    "peer": (["bench", "throughput", "x", "--peer", "vllm"], ["vllm", "transformers"]),
    "no config": (["doctor", "--config", "no.yaml"], ["no.yaml", "no such config file"]),
    "bad YAML": (["doctor", "--config", "bad.yaml"], ["bad.yaml", "not valid YAML"]),
    "YAML list": (["doctor", "--config", "list.yaml"], ["list.yaml", "name: value"]),
    "YAML key": (["doctor", "--config", "key.yaml"], ["key.yaml", "did you mean max_model_len?"]),
    "YAML type": (["doctor", "--config", "type.yaml"], ["type.yaml", "max_model_len='long'", "int"]),
    "YAML twice": (["doctor", "--config", "twice.yaml"], ["twice.yaml", "given twice"]),
    "YAML number key": (["doctor", "--config", "number.yaml"], ["number.yaml", "a flag's name"]),
    "YAML object": (["doctor", "--config", "object.yaml"], ["object.yaml", "not valid YAML"]),
}  # fmt: skip
FILES = {
    "ok.txt": b"some words",
    "latin.txt": b"caf\xe9",
    "bad.yaml": b"a: [1",
    "list.yaml": b"- a\n",
    "key.yaml": b"max-model-len-: 3\n",
    "type.yaml": b"max-model-len: long\n",
    "twice.yaml": b"max-model-len: 3\nmax_model_len: 4\n",
    "number.yaml": b"3: 4\n",
    "object.yaml": b"a: !!python/object/apply:os.system ['true']\n",
}


@pytest.mark.parametrize("case", USAGE)
def test_command_line(case: str, run: Run, tmp_path: Path) -> None:
    """What is wrong with the command line itself is told before any model is looked at."""
    arguments, words = USAGE[case]
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    before = listing(tmp_path)
    check_refusal(run(*arguments), *words)
    assert listing(tmp_path) == before


def test_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_PRECISON", "w8a8kv8")
    check_refusal(run("generate", "x", "--prompt", "a"), "OMNISERVE_PRECISON", "did you mean precision?")
    monkeypatch.delenv("OMNISERVE_PRECISON")
    monkeypatch.setenv("OMNISERVE_MAX_MODEL_LEN", "many")
    check_refusal(run("doctor"), "OMNISERVE_MAX_MODEL_LEN='many'", "number")


def header(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def broken(name: str, folder: Path, tiny: Path, smollm2: Path) -> Path:
    """Make a model that cannot be loaded."""
    match name:
        case "missing":
            return folder / "nowhere.gguf"
        case "empty file":
            (folder / "m.gguf").write_bytes(b"")
        case "not a GGUF":
            (folder / "m.gguf").write_text("hello, I am text\n" * 100)
        case "GGUF cut in its header" | "GGUF cut in its tensors":
            with smollm2.open("rb") as whole:
                (folder / "m.gguf").write_bytes(whole.read(50_000 if "header" in name else 4_000_000))
        case "GGUF of 2^60 tensors":
            (folder / "m.gguf").write_bytes(header(2**60, 0))
        case "GGUF of 2^60 keys":
            (folder / "m.gguf").write_bytes(header(1, 2**60))
        case _:
            return broken_folder(name, folder, tiny)
    return folder / "m.gguf"


def broken_folder(name: str, folder: Path, tiny: Path) -> Path:
    made = folder / "model"
    if name == "empty folder":
        made.mkdir()
        return made
    shutil.copytree(tiny, made)
    weights = made / "model.safetensors"
    match name:
        case "no config":
            (made / "config.json").unlink()
        case "config is no JSON":
            (made / "config.json").write_text("{")
        case "unknown architecture":
            text = (made / "config.json").read_text()
            (made / "config.json").write_text(text.replace("LlamaForCausalLM", "XForCausalLM").replace("llama", "x"))
        case "no weights":
            weights.unlink()
        case "weights cut":
            os.truncate(weights, weights.stat().st_size - 100)
        case "weights cut in their header":
            os.truncate(weights, 20)
        case "pickle":
            weights.unlink()
            (made / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        case "other shapes":
            text = (made / "config.json").read_text()
            (made / "config.json").write_text(text.replace('"intermediate_size": 160', '"intermediate_size": 192'))
        case "no tokenizer":
            (made / "tokenizer.json").unlink()
        case _:
            raise AssertionError(name)
    return made


MODELS = {
    "missing": ["nowhere.gguf"],
    "empty file": ["m.gguf"],
    "not a GGUF": ["m.gguf"],
    "GGUF cut in its header": ["m.gguf"],
    "GGUF cut in its tensors": ["m.gguf"],
    "GGUF of 2^60 tensors": ["m.gguf"],
    "GGUF of 2^60 keys": ["m.gguf"],
    "empty folder": ["model"],
    "no config": ["config.json"],
    "config is no JSON": ["config.json"],
    "unknown architecture": ["model_type='x'", "llama"],
    "no weights": ["safetensors"],
    "weights cut": ["model.safetensors"],
    "weights cut in their header": ["model.safetensors"],
    "pickle": ["omniserve convert ", " -o "],
    "other shapes": ["192"],
    "no tokenizer": ["tokenizer.json"],
}


@pytest.mark.parametrize("case", MODELS)
def test_model_files(case: str, run: Run, tmp_path: Path, tiny: Path, smollm2: Path) -> None:
    model = broken(case, tmp_path, tiny, smollm2)
    before = listing(tmp_path)
    check_refusal(run("generate", model, "--prompt", "a", "--max-tokens", "1"), *MODELS[case])
    assert listing(tmp_path) == before


ENGINE = {
    "context": (["--max-model-len", "100000"], ["100000", str(CONTEXT)]),
    "no context": (["--max-model-len", "0"], ["max_model_len=0", "1 or more"]),
    "pool": (["--kv-cache-memory-bytes", "1000"], [str(CONTEXT), "--kv-cache-memory-bytes", "--max-model-len"]),
    "step": (["--max-num-batched-tokens", "4", "--max-num-seqs", "8"], ["max_num_batched_tokens=4", "max_num_seqs=8"]),
    "no requests": (["--max-num-seqs", "0"], ["max_num_seqs=0"]),
    "cuda": (["--device", "cuda"], ["cuda"]),
    "format": (["--load-format", "gguf"], ["gguf"]),
    "template": (["--chat-template", "none.jinja"], ["none.jinja"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ENGINE)
def test_engine_flags(case: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    if case == "cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    flags, words = ENGINE[case]
    check_refusal(run("generate", tiny, "--prompt", "a", *flags), *words)
    assert listing(tmp_path) == set()


def test_prompt_longer_than_the_context(run: Run, tiny: Path) -> None:
    ran = run("generate", tiny, "--prompt", "Zq" * 600, "--max-tokens", "1")
    check_refusal(ran, "1200", str(CONTEXT))


def test_text_and_windows(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The quick brown fox " * 20)
    (tmp_path / "empty.txt").write_text("")
    check_refusal(run("eval", "perplexity", tiny, "--text", "empty.txt", "--length", "64"), "0 tokens")
    check_refusal(
        run("eval", "perplexity", tiny, "--text", "short.txt", "--windows", "7", "--length", "64"), "window 7"
    )
    check_refusal(run("eval", "perplexity", tiny, "--text", "short.txt", "--length", "1024"), "1024", str(CONTEXT))
    assert {path.name for path in listing(tmp_path)} == {"short.txt", "empty.txt"}


def test_the_peer_cannot_read_it(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    check_refusal(
        run("bench", "throughput", tiny, "--peer", "transformers", "--output-len", "2"), "pip install transformers"
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Loading a model raises what the list holds."""
    errors: list[BaseException] = []

    def load(*_: Any, **__: Any) -> None:
        raise errors[0]

    monkeypatch.setattr(answer, "load", load)
    return errors


def test_internal_error(run: Run, failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("one\nand two"))
    ran = run("generate", "x", "--prompt", "a")
    assert (ran.code, ran.out) == (main.INTERNAL, "")
    assert ran.err.count("\n") == 1
    assert "ZeroDivisionError: one and two; run `omniserve doctor`" in ran.err
    ran = run("generate", "x", "--prompt", "a", "--log-level", "debug")
    assert ran.code == main.INTERNAL
    assert "Traceback" in ran.err


def test_interrupt(run: Run, failing: list[BaseException]) -> None:
    failing.append(KeyboardInterrupt())
    ran = run("generate", "x", "--prompt", "a")
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "")


def test_without_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, word in ((None, "not installed"), ("2.4.1+cpu", "2.4.1+cpu is too old")):
        monkeypatch.setattr("omniserve.cli.machine.version", lambda package, found=found: found)
        check_refusal(run("generate", "x", "--prompt", "a"), word, "pip install 'torch>=2.11'")


def test_as_a_program(tmp_path: Path) -> None:
    """Through a real process: exit code, empty standard output, one line."""
    command = [sys.executable, "-m", "omniserve", "generate", "nowhere.gguf", "--prompt", "a", "--precisio", "w8a8"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=60)
    check_refusal(Ran(ran.returncode, ran.stdout, ran.stderr), "--precisio", "did you mean --precision?")
    assert ran.stderr.count("\n") == 1

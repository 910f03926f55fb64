"""Bad input: one sentence on standard error, exit code 2, nothing on standard output, nothing left behind."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file

from omniserve.cli import answer, main
from tests.cli.commands import CONTEXT, Ran, check_refusal, environment
from tests.fuzz.files import as_gguf
from tests.fuzz.mutations import ARRAY, STRING, Info, Pair, Parts, put, take
from tests.tiny import tiny_model

Run = Callable[..., Ran]


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


USAGE = {
    "unknown command": (["genrate"], ["'genrate'", "did you mean generate?"]),
    "unknown subcommand": (["eval", "perplexty", "x"], ["did you mean perplexity?"]),
    "unknown option": (["generate", "x", "--prompt", "a", "--max-model-lenn", "5"], ["did you mean --max-model-len?"]),
    "unknown short option": (["generate", "x", "--prompt", "a", "-x"], ["-x"]),
    "option of another command": (["generate", "x", "--prompt", "a", "--stats"], ["--stats"]),
    "model and url": (["chat", "x", "--url", "http://127.0.0.1"], ["MODEL and --url: give one of the two"]),
    "dummy and url": (
        ["chat", "--dummy-weights", "--shape", "tiny", "--url", "http://127.0.0.1"],
        ["MODEL and --url: give one of the two"],
    ),
    "key and no server": (["chat", "x", "--api-key", "k"], ["--api-key goes with --url"]),
    "precision of a server": (["chat", "--precision", "w8a8"], ["--precision goes with MODEL"]),
    "url": (["chat", "--url", "localhost:8000"], ["url='localhost:8000'", "http://127.0.0.1:8000/v1"]),
    "url without host": (["chat", "--url", "http://"], ["url='http://'"]),
    "port": (["chat", "--url", "http://a:b"], ["url='http://a:b'"]),
    "key with a line end": (["chat", "--api-key", "a\nb"], ["API key must be printable"]),
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
    "repetition": (["generate", "x", "--prompt", "a", "--repetition-penalty", "0"], ["repetition_penalty=0.0"]),
    "presence": (["generate", "x", "--prompt", "a", "--presence-penalty", "5"], ["presence_penalty=5.0", "-2 to 2"]),
    "frequency": (["generate", "x", "--prompt", "a", "--frequency-penalty", "nan"], ["frequency_penalty=nan"]),
    "two prompts": (["generate", "x", "--prompt", "a", "--prompt-file", "ok.txt"], ["give one of the two"]),
    "nowhere to write": (["generate", "x", "--prompt-file", "ok.txt"], ["--output OUT.jsonl"]),
    "nothing to write": (["generate", "x", "--prompt", "a", "--output", "o"], ["--output goes with --prompt-file"]),
    "no order": (["generate", "x", "--prompt", "a", "--ordered"], ["--ordered goes with --prompt-file"]),
    "no prompt file": (["generate", "x", "--prompt-file", "no.jsonl", "--output", "o"], ["no such prompt file"]),
    "prompts in a folder": (["generate", "x", "--prompt-file", ".", "--output", "o"], ["no regular file"]),
    "no folder": (["generate", "x", "--prompt-file", "ok.txt", "--output", "no/o"], ["no/o: there is no folder no"]),
    "onto itself": (["generate", "x", "--prompt-file", "ok.txt", "--output", "ok.txt"], ["is the prompt file itself"]),
    "load format": (["generate", "x", "--prompt", "a", "--load-format", "ggfu"], ["ggfu", "did you mean gguf?"]),
    "shape": (["generate", "x", "--prompt", "a", "--shape", "llama-8b"], ["did you mean llama-3-8b"]),
    "no config": (["doctor", "--config", "no.yaml"], ["no.yaml", "no such config file"]),
    "bad YAML": (["doctor", "--config", "bad.yaml"], ["bad.yaml", "not valid YAML"]),
    "YAML list": (["doctor", "--config", "list.yaml"], ["list.yaml", "name: value"]),
    "YAML key": (["doctor", "--config", "key.yaml"], ["key.yaml", "did you mean max_model_len?"]),
    "YAML type": (["doctor", "--config", "type.yaml"], ["type.yaml", "max_model_len='long'", "int"]),
    "YAML twice": (["doctor", "--config", "twice.yaml"], ["twice.yaml", "given twice"]),
    "YAML number key": (["doctor", "--config", "number.yaml"], ["number.yaml", "a flag's name"]),
    "YAML choice": (["doctor", "--config", "choice.yaml"], ["choice.yaml", "shape='x'", "tiny, llama-3-8b"]),
    "YAML nested": (["doctor", "--config", "nested.yaml"], ["nested.yaml", "not valid YAML"]),
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
    "choice.yaml": b"load-format: dummy\nshape: x\n",
    "nested.yaml": b"[" * 5000,
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
    monkeypatch.delenv("OMNISERVE_MAX_MODEL_LEN")
    monkeypatch.setenv("OMNISERVE_OFFLINE", "perhaps")
    check_refusal(run("doctor"), "OMNISERVE_OFFLINE='perhaps'", "true or false")


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


# What is in the files: `tiny`, or the same as GGUF, with one thing changed

Json = dict[str, Any]


def config(**values: object) -> Callable[[Path], object]:
    """Change keys of config.json; None removes one."""

    def change(model: Path) -> None:
        read = json.loads((model / "config.json").read_text()) | values
        (model / "config.json").write_text(json.dumps({key: v for key, v in read.items() if v is not None}))

    return change


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(model: Path) -> None:
        held = load_file(model / "model.safetensors")
        change(held)
        save_file(held, model / "model.safetensors")

    return rewrite


def header_json(change: Callable[[Json], object]) -> Callable[[Path], object]:
    """Change the header of model.safetensors and leave the data as they are."""

    def rewrite(model: Path) -> None:
        raw = (model / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8:end])
        change(head)
        written = json.dumps(head).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + raw[end:])

    return rewrite


def shards(change: Callable[[Path, Json], object]) -> Callable[[Path], object]:
    """Spread the tensors over two files with an index, and change that."""

    def rewrite(model: Path) -> None:
        held = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        index: Json = {"weight_map": {}}
        for part in range(2):
            file = f"model-0000{part + 1}-of-00002.safetensors"
            mine = {name: held[name] for name in sorted(held)[part::2]}
            save_file(mine, model / file)
            index["weight_map"] |= dict.fromkeys(mine, file)
        change(model, index["weight_map"])
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return rewrite


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
ROPE = {"rope_type": "yarn", "factor": 2.0}
FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "model type missing": (config(model_type=None), ["model_type=None", "llama, mistral, mixtral, qwen2"]),
    "model type misspelt": (config(model_type="lama"), ["did you mean llama?"]),
    "activation": (config(hidden_act="gelu"), ["hidden_act='gelu'", "silu"]),
    "no layers": (config(num_hidden_layers=0), ["num_hidden_layers=0", "a whole number from 1 to"]),
    "layers are text": (config(num_hidden_layers="two"), ["num_hidden_layers='two'"]),
    "absurd vocabulary": (config(vocab_size=1 << 40), ["vocab_size=1099511627776"]),
    "no context": (config(max_position_embeddings=None), ["max_position_embeddings is missing"]),
    "odd heads": (config(head_dim=15), ["head_dim=15", "even"]),
    "key heads": (config(num_key_value_heads=3), ["num_key_value_heads=3", "a divisor of num_attention_heads=4"]),
    "epsilon": (config(rms_norm_eps="small"), ["rms_norm_eps='small'", "a finite number"]),
    "truth": (config(tie_word_embeddings=1), ["tie_word_embeddings=1", "true or false"]),
    "rotation": (config(rope_scaling={"rope_type": "longrope"}), ["rope_type='longrope'", "yarn"]),
    "rotation without factor": (config(rope_scaling={"rope_type": "linear"}), ["factor is missing"]),
    "rotation with another key": (config(rope_scaling=ROPE | {"power": 2}), ["rope_scaling='power'", "does not know"]),
    "window": (config(model_type="mistral", sliding_window=0), ["sliding_window=0"]),
    "experts": (
        config(model_type="mixtral", num_local_experts=2, num_experts_per_tok=3),
        ["num_experts_per_tok=3", "at most num_local_experts=2"],
    ),
    "experts that are not there": (config(model_type="mixtral"), ["block_sparse_moe", "missing"]),
    "another quantizer": (config(quantization_config={"quant_method": "aqlm"}), ["aqlm"]),
    "a key twice": (text("config.json", '{"model_type": "llama", "model_type": "qwen2"}'), ["is there twice"]),
    "config is a list": (text("config.json", "[]"), ["config.json", "not a JSON object"]),
    "config is nested": (text("config.json", "[" * 100_000), ["config.json", "not valid JSON"]),
    "a tensor is missing": (tensors(lambda t: t.pop(UP)), [UP, "is missing"]),
    "a tensor too many": (tensors(lambda t: t.update(x=torch.ones(1))), ["'x'", "no part of a llama model"]),
    "whole numbers": (tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), [UP, "int8"]),
    "another shape": (tensors(lambda t: t.update({UP: t[UP][:-1]})), [UP, "[159, 64]", "[160, 64]"]),
    "transposed": (tensors(lambda t: t.update({UP: t[UP].T.contiguous()})), [UP, "[64, 160]", "[160, 64]"]),
    "not a number": (tensors(lambda t: t[UP].fill_(float("nan"))), [UP, "NaN or infinity"]),
    "infinity": (tensors(lambda t: t[NORM].fill_(float("inf"))), [NORM, "NaN or infinity"]),
    "type": (header_json(lambda h: h[UP].update(dtype="F8_E4M3")), [UP, "F8_E4M3", "F32, F16, BF16"]),
    "type of other size": (header_json(lambda h: h[UP].update(dtype="F16")), [UP, "needs 20480 bytes"]),
    "absurd shape": (header_json(lambda h: h[UP].update(shape=[1 << 40, 1 << 40])), [UP, "needs"]),
    "negative shape": (header_json(lambda h: h[UP].update(shape=[-160, -64])), [UP, "invalid shape"]),
    "overlap": (header_json(lambda h: h[UP].update(h["model.layers.0.mlp.gate_proj.weight"])), ["overlap at byte"]),
    "gap": (header_json(lambda h: h.pop(UP)), ["belong to no tensor"]),
    "header is a list": (text("model.safetensors", struct.pack("<Q", 2) + b"[]"), ["not a JSON object"]),
    "header of 2^60 bytes": (text("model.safetensors", struct.pack("<Q", 1 << 60)), ["1152921504606846976 bytes"]),
    "empty weights": (text("model.safetensors", b""), ["truncated, 0 bytes"]),
    "a shard is missing": (shards(lambda m, i: (m / i[UP]).unlink()), ["-of-00002.safetensors is missing"]),
    "a shard elsewhere": (shards(lambda m, i: i.update({UP: "/etc/x.safetensors"})), ["no *.safetensors file name"]),
    "a tensor in another shard": (
        shards(lambda m, i: i.update({UP: i["model.layers.1.mlp.up_proj.weight"]})), ["index.json puts in"],
    ),
    "a tensor not in the index": (shards(lambda m, i: i.pop(UP)), [UP, "index.json puts nowhere"]),
    "tokenizer is no JSON": (text("tokenizer.json", "{"), ["tokenizer.json", "is no tokenizer"]),
    "tokenizer without its end": (
        text("tokenizer_config.json", '{"eos_token": "<gone>"}'), ["eos_token='<gone>'", "not in the vocabulary"],
    ),
    "KV scales of one layer": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.kv_scale": torch.ones(2, 2)})), ["layers.1.self_attn"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, run: Run, tmp_path: Path, tiny: Path) -> None:
    change, words = FOLDERS[case]
    change(Path(shutil.copytree(tiny, tmp_path / "model")))
    before = listing(tmp_path)
    check_refusal(run("generate", "model", "--prompt", "a", "--max-tokens", "1", "--json"), *words)
    assert listing(tmp_path) == before


def info(parts: Parts, name: str) -> Info:
    return next(one for one in parts.infos if one.name == name.encode())


def key(name: str, kind: int, value: object) -> Callable[[Parts], object]:
    """Put a metadata value in, in place of the one that is there."""

    def change(parts: Parts) -> None:
        parts.pairs = [pair for pair in parts.pairs if pair.key != name.encode()]
        parts.pairs.append(Pair(name.encode(), kind, value))

    return change


def tensor(which: str, /, **values: object) -> Callable[[Parts], object]:
    def change(parts: Parts) -> None:
        for field, value in values.items():
            setattr(info(parts, which), field, value)

    return change


def without(name: str) -> Callable[[Parts], object]:
    def change(parts: Parts) -> None:
        parts.infos = [one for one in parts.infos if one.name != name.encode()]
        parts.pairs = [pair for pair in parts.pairs if pair.key != name.encode()]

    return change


EMBEDDING, GGUF_UP = "token_embd.weight", "blk.0.ffn_up.weight"
GGUFS: dict[str, tuple[Callable[[Parts], object], list[str]]] = {
    "version": (lambda parts: setattr(parts, "version", 1), ["GGUF version 1, versions 2 and 3"]),
    "big-endian": (lambda parts: setattr(parts, "version", 3 << 24), ["big-endian"]),
    "architecture": (key("general.architecture", STRING, b"mamba"), ["'mamba'", "llama, qwen2, qwen2moe, qwen3"]),
    "no architecture": (without("general.architecture"), ["general.architecture is None"]),
    "architecture is a number": (key("general.architecture", 4, 7), ["general.architecture is 7"]),
    "alignment": (key("general.alignment", 4, 48), ["general.alignment is 48", "a power of two"]),
    "one of several files": (key("split.count", 2, 3), ["one of 3 files", "llama-gguf-split --merge"]),
    "a number is missing": (without("llama.block_count"), ["llama.block_count is missing"]),
    "a number is text": (key("llama.block_count", STRING, b"two"), ["llama.block_count is 'two'"]),
    "absurd layers": (key("llama.block_count", 4, 1 << 30), ["config: num_hidden_layers=1073741824"]),
    "a number per layer": (key("llama.attention.head_count", ARRAY, (4, [4, 4])), ["head_count is an array of 2"]),
    "head sizes": (key("llama.rope.dimension_count", 4, 8), ["rope.dimension_count is 8", "the head size 16"]),
    "rotation": (key("llama.rope.scaling.type", STRING, b"longrope"), ["'longrope'", "none, linear and yarn"]),
    "softcap": (key("llama.attn_logit_softcapping", 6, 30.0), ["attn_logit_softcapping is 30.0", "does not compute"]),
    "experts": (key("llama.expert_count", 4, 8), ["llama.expert_used_count is missing"]),
    "overlap": (tensor(GGUF_UP, offset=0), ["overlap at byte"]),
    "beyond the end": (tensor(GGUF_UP, offset=1 << 40), ["truncated", "blk.0.ffn_up.weight"]),
    "absurd shape": (tensor(GGUF_UP, dims=[1 << 40, 1 << 20]), ["truncated"]),
    "no rank": (tensor(GGUF_UP, dims=[]), ["0 dimensions"]),
    "another shape": (tensor(GGUF_UP, dims=[160, 64]), ["mlp.up_proj.weight", "[64, 160]", "[160, 64]"]),
    "unknown type": (tensor(GGUF_UP, kind=99), ["the unknown type 99"]),
    "type that is not read": (tensor(GGUF_UP, kind=15, dims=[256, 8]), ["type Q8_K", "cannot be de-quantized"]),
    "row no whole blocks": (tensor(GGUF_UP, kind=8, dims=[33, 8]), ["rows of 33, Q8_0 needs a multiple of 32"]),
    "a tensor is missing": (without(GGUF_UP), ["mlp.up_proj.weight", "is missing"]),
    "a tensor of another kind": (tensor(GGUF_UP, name=b"blk.0.ssm_a"), ["is missing"]),
    "the same tensor twice": (tensor(GGUF_UP, name=b"blk.0.ffn_gate.weight"), ["is there twice"]),
    "no tokenizer": (without("tokenizer.ggml.model"), ["tokenizer.ggml.model is None", "gpt2", "llama"]),
    "another tokenizer": (key("tokenizer.ggml.model", STRING, b"rwkv"), ["tokenizer.ggml.model is 'rwkv'"]),
    "another splitter": (key("tokenizer.ggml.pre", STRING, b"new"), ["tokenizer.ggml.pre is 'new'", "qwen2"]),
    "token twice": (key("tokenizer.ggml.tokens", ARRAY, (STRING, [b"a", b"a"])), ["tokens holds 'a' twice"]),
    "not UTF-8": (key("tokenizer.ggml.tokens", ARRAY, (STRING, [b"\xff"])), ["not valid UTF-8"]),
    "merges": (key("tokenizer.ggml.merges", ARRAY, (STRING, [b"ab"])), ["merges holds no pair of tokens"]),
    "end of text": (key("tokenizer.ggml.eos_token_id", 4, 1 << 20), ["eos_token_id is 1048576"]),
}  # fmt: skip


@pytest.fixture(scope="session")
def gguf_parts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return take(as_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf", words=True).read_bytes())


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_files(case: str, run: Run, tmp_path: Path, gguf_parts: Parts) -> None:
    change, words = GGUFS[case]
    parts = deepcopy(gguf_parts)
    change(parts)
    (tmp_path / "m.gguf").write_bytes(put(parts))
    place = [] if words[0].startswith("config: ") else ["m.gguf: "]  # families know no file
    check_refusal(run("generate", "m.gguf", "--prompt", "a", "--max-tokens", "1", "--json"), *place, *words)
    assert listing(tmp_path) == {tmp_path / "m.gguf"}


def test_the_gguf_file_itself_is_sound(run: Run, tmp_path: Path, gguf_parts: Parts) -> None:
    (tmp_path / "m.gguf").write_bytes(put(deepcopy(gguf_parts)))
    assert run("generate", "m.gguf", "--prompt", "a", "--max-tokens", "1").code == 0


COMMANDS = {
    "generate": ["--prompt", "a"],
    "chat": ["-q", "a"],
    "eval perplexity": ["--text", "t.txt"],
    "bench throughput": ["--batch", "1", "--input-len", "4", "--output-len", "2"],
    "bench latency": ["--input-len", "4", "--output-len", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", ["nowhere.gguf", "cut.gguf", "folder", "org/name"])
def test_every_command_refuses_alike(command: str, model: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one two three")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    check_refusal(run(*command.split(), model, *COMMANDS[command], "--offline"), model)
    assert listing(tmp_path) == before


# Models of huggingface.co


def refused(kind: type[hub.HfHubHTTPError]) -> Exception:
    return kind("403 Client Error.\n\nTraceback: no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]


HUB: dict[str, tuple[Exception, list[str]]] = {
    "gated": (refused(hub.GatedRepoError), ["org/name is gated", "https://huggingface.co/org/name", "hf auth login"]),
    "not there": (refused(hub.RepositoryNotFoundError), ["no file or folder here", "no such model", "HF_TOKEN"]),
    "no such revision": (refused(hub.RevisionNotFoundError), ["org/name has no revision 'v9'"]),
    "no network": (hub.LocalEntryNotFoundError("x"), ["huggingface.co cannot be reached"]),
    "disk full": (OSError(28, "No space left on device"), ["org/name", "No space left on device"]),
}


@pytest.mark.parametrize("case", HUB)
def test_hub(case: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, words = HUB[case]

    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    check_refusal(run("generate", "org/name", "--prompt", "a", "--revision", "v9"), *words)
    assert listing(tmp_path) == set()


def test_hub_pickles(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: ["pytorch_model.bin"])
    check_refusal(run("chat", "org/name", "-q", "a"), "omniserve convert name -o name-st", "pytorch_model.bin")


SOURCES = {
    "revision of a folder": (["--revision", "v2"], ["revision=v2", "huggingface.co"]),
    "shape of a model": (["--shape", "tiny"], ["shape=tiny", "load_format=dummy"]),
    "dummy without shape": (["--dummy-weights"], ["load_format=dummy", "give the shape", "llama-3-8b"]),
    "dummy and a model": (["--load-format", "dummy", "--shape", "tiny"], ["shape=tiny instead of the model"]),
    "two load formats": (["--dummy-weights", "--load-format", "gguf"], ["--load-format"]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources(case: str, run: Run, tiny: Path, tmp_path: Path) -> None:
    flags, words = SOURCES[case]
    check_refusal(run("generate", tiny, "--prompt", "a", *flags), *words)
    assert listing(tmp_path) == set()


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
    if case == "cuda" and torch.cuda.is_available():
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


def test_reference_of_another_vocabulary(run: Run, tiny: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", vocab=400, context=CONTEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, other / name)
    (tmp_path / "t.txt").write_text("The quick brown fox")
    ran = run("eval", "perplexity", tiny, "--text", "t.txt", "--length", "64", "--reference", other)
    check_refusal(ran, "--reference", "other tokens")


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

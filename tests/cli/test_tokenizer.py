"""Tokenizer folders: what transformers makes of them is what the server says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniserve.text import Tokenizer
from tests.cli.commands import Ran, check_refusal

Run = Callable[..., Ran]
TEXTS = (
    "The quick brown fox, 1905 and 42.",
    "  two  spaces\n\n\ttab\r\n",
    "naïve façade 日本語 🦊 \u0301",
    "<|im_start|>user\nhi<|im_end|><|end|>",
    "x" * 300,
    "",
)
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Is water wet?\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why? <b>"},
]


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def check_equal(folder: Path, mine: Tokenizer) -> Any:
    """AutoTokenizer reads the folder, and agrees in ids, texts and conversations."""
    other = theirs(folder)
    for text in TEXTS:
        assert other(text)["input_ids"] == mine.encode(text), text
        assert other(text, add_special_tokens=False)["input_ids"] == mine.encode(text, special=False), text
        ids = mine.encode(text)
        assert other.decode(ids) == mine.decode(ids, skip_special=False)
        assert other.decode(ids, skip_special_tokens=True) == mine.decode(ids)
    for messages in (CHAT, CHAT[:2], CHAT[1:2]):
        for more in (True, False):
            rendered = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
            assert rendered == mine.render(messages, add_generation_prompt=more)
        ids = other.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == mine.chat(messages)
    return other


def test_the_real_model(run: Run, smollm2: Path, tmp_path: Path) -> None:
    ran = run("export-tokenizer", smollm2, "-o", "tok")
    assert ran.code == 0, ran
    assert "tok: 49,152 tokens, with its chat template; config.json, generation_config.json, " in ran.out
    other = check_equal(tmp_path / "tok", Tokenizer.load(smollm2))
    assert len(other) == 49152
    assert (other.bos_token, other.eos_token, other.model_max_length) == ("<|im_start|>", "<|im_end|>", 8192)
    config = json.loads((tmp_path / "tok" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 8192)


@pytest.mark.parametrize("bos", [False, True])
def test_a_folder(run: Run, tiny: Path, tmp_path: Path, bos: bool) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    if bos:  # what transformers' own file would say with a post-processor is said by a setting here
        told = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(
            json.dumps(told | {"add_bos_token": True, "bos_token": told["eos_token"]})
        )
    mine = Tokenizer.load(model)
    assert mine.add_bos == bos
    ran = run("export-tokenizer", model, "--output", tmp_path / "tok")
    assert ran.code == 0, ran
    other = check_equal(tmp_path / "tok", mine)
    assert other.model_max_length == 256


def test_what_is_refused(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    check_refusal(run("export-tokenizer", tiny, "-o", "full"), "full exists already")
    check_refusal(run("export-tokenizer", tiny), "--output")
    check_refusal(run("export-tokenizer", tmp_path / "none", "-o", "tok"), "none")
    check_refusal(run("export-tokenizer", tiny, "-o", "tok", "--precision", "w8a8"), "unknown option --precision")
    assert not (tmp_path / "tok").exists()

"""Text: the real tokenizer and template against transformers, streams against whole texts, hostile vocabularies."""

import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.base.errors import CheckpointError, ConfigError, RequestError
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.text import Detokenizer, StopFinder, TextStream, Tokenizer

CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 2+2?\n  <b>&</b> 'quoted' 🙂"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]
TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world!",
    "  leading and trailing  ",
    "It's we'll I'VE they'd",
    "tabs\tand\r\nline ends\n\n\n   indented",
    "def f(x: int) -> str:\n    return f'{x:>10}' if x != 0 else \"\"\n",
    "for (int i = 0; i < 10; ++i) { a[i] += 0x1F; }",
    "2024-01-31 12:34:56.789 costs 1,234,567.89 or 3.14e-10",
    "ünïcödé ÀÉÎ ß ñ ø łódź",
    "Привет, мир! Γειά σου Κόσμε",
    "漢字とかな、カタカナ。你好，世界！한국어",
    "العربية עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 ✓ ∑∫√ ½ ² Ⅷ ٣",
    "e\u0301 vs \u00e9, zero\u200bwidth, nbsp\u00a0x, \ufeffbom, \u2028line",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start <|im_end|> >",
    "a" * 300 + "!" * 50 + " " * 40 + "\n" * 20,
    "null\0byte and \x1b[31mescape\x7f",
]


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="session")
def theirs(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


# The real tokenizer


def test_facts(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab, tokenizer.bos, tokenizer.add_bos, tokenizer.eos_ids) == (49152, 1, False, {2})
    assert tokenizer.special_ids == set(range(17))


@pytest.mark.parametrize("text", TEXTS)
def test_equals_transformers(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    # transformers' GGUF reader does not know the pre-tokenizer `smollm`, which cuts out digits first: see below.
    if not re.search(r"\s\s\d|[½²Ⅷ٣]", text):
        assert ids == theirs.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


MISSING = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, *range(0xF1, 0x100)}
"""Bytes for which this vocabulary has no token; they vanish, here and in transformers."""


@given(
    text=st.text(st.sampled_from("aeё漢é🙂 \t\n'.,<|>012 ٣½ßABcd\u0301") | st.characters(codec="utf-8"), max_size=60)
)
def test_digits_are_cut_out_first(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    import regex  # transformers brings it; only it knows \p{N}

    pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
    assert tokenizer.encode(text) == [
        token for piece in pieces for token in theirs.encode(piece, add_special_tokens=False)
    ]
    if not MISSING & set(text.encode()):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="half a surrogate pair"):
        tokenizer.encode("a\ud83d")


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:2], CHAT[1:]])
def test_chat_equals_transformers(
    tokenizer: Tokenizer, theirs: Any, messages: list[dict[str, object]], generation_prompt: bool
) -> None:
    rendered = tokenizer.render(messages, add_generation_prompt=generation_prompt)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    if generation_prompt:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.chat(messages) == ids


# Templates


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    words = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return Tokenizer(tokenizer._core, words=words, add_bos=True, eos_ids=frozenset(), template=template)


RICH = """
{%- set ns = namespace(n=0) -%}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- if m.role == 'stop' %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {% generation %}
{{ ns.n }}:{{ m | tojson }}{{ m['content'] | trim }}
    {% endgeneration %}
{%- endfor %}
{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token }}|{{ tools is none }}|{{ dict(a=1) | tojson(indent=2) }}
{%- if add_generation_prompt %}<{{ strftime_now('%Y') | length }}>{% endif %}
"""


def test_templates_may_use_what_transformers_offers(tokenizer: Tokenizer, theirs: Any) -> None:
    messages = [{"role": "skip"}, {"role": "user", "content": " é<'> "}, {"role": "stop"}, {"role": "user"}]
    rendered = with_template(tokenizer, RICH).render(messages)
    assert rendered == theirs.apply_chat_template(
        messages, chat_template=RICH, tokenize=False, add_generation_prompt=True
    )
    assert rendered.startswith('1:{"role": "user", "content": " é<\'> "}é<\'>')


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages[0].content + messages[0].missing.x }}", "refuses the conversation: 'dict object' has no"),
        ("{{ 1 + 'a' }}", "refuses the conversation: unsupported operand"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{% if %}", "refuses the conversation: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refuses the conversation: access to attribute 'append'"),
        ("{{ namespace(__init__=1) }}", "refuses the conversation: '__init__' must not begin with an underscore"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "refuses the conversation: '_x' must not begin"),
        ("{{ range(10 ** 9) | list }}", "refuses the conversation: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the conversation: maximum recursion depth"),
        ("{{ strftime_now(3) }}", "refuses the conversation: "),
        (None, "the model has no chat template: give one with --chat-template FILE"),
    ],
)
def test_templates_that_fail(tokenizer: Tokenizer, template: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        with_template(tokenizer, template).render(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("messages", [[], "hello", [1], [{"content": "x"}], [{"role": 3}]])
def test_messages_that_are_none(tokenizer: Tokenizer, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        tokenizer.render(messages)


def test_bos_is_never_there_twice(tokenizer: Tokenizer) -> None:
    mine = with_template(tokenizer, "{{ bos_token }}{{ messages[0].content }}")
    assert mine.encode("hi") == [1, *tokenizer.encode("hi")]
    assert mine.encode("hi", special=False) == tokenizer.encode("hi")
    assert mine.chat([{"role": "user", "content": "hi"}]) == [1, *tokenizer.encode("hi")]


def test_a_template_from_a_file(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages | length }} é", encoding="utf-8")
    assert Tokenizer.load(smollm2, str(file)).render(CHAT) == "4 é"
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        Tokenizer.load(smollm2, str(file))
    with pytest.raises(ConfigError, match=r"chat_template='.*none': cannot be read \(No such file"):
        Tokenizer.load(smollm2, str(tmp_path / "none"))


# Hugging Face folders


def folder(tmp_path: Path, tokenizer: Tokenizer, **files: object) -> Path:
    """A folder with SmolLM2's tokenizer.json and the given files (dots as double underscores)."""
    tokenizer._core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name.replace("__", ".")).write_text(text)
    return tmp_path


SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": {"content": "<|im_start|>", "__type": "AddedToken"},
    "eos_token": "<|im_end|>",
    "chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}",
}


def test_a_folder_equals_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    path = folder(tmp_path, tokenizer, tokenizer_config__json=SETTINGS)
    mine, reference = Tokenizer.load(path), AutoTokenizer.from_pretrained(path)
    assert (mine.bos, mine.add_bos, mine.vocab) == (1, False, 49152)
    assert mine.eos_ids == {0, 2}  # config.json's and the tokenizer's
    for text in TEXTS:
        assert mine.encode(text) == reference.encode(text), text
    assert mine.render(CHAT) == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_which_file_says_what(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder(
        tmp_path,
        tokenizer,
        tokenizer_config__json={**SETTINGS, "add_bos_token": True},
        generation_config__json={"eos_token_id": [3, 4]},
        chat_template__jinja="from the file",
    )
    mine = Tokenizer.load(path)
    assert mine.encode("hi") == [1, *tokenizer.encode("hi")]
    assert mine.eos_ids == {2, 3, 4}
    assert mine.render(CHAT) == "from the file"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    (path / "chat_template.jinja").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    mine = Tokenizer.load(path)
    assert (mine.render(CHAT), mine.bos, mine.add_bos) == ("named", None, False)
    (path / "tokenizer_config.json").unlink()
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    assert Tokenizer.load(path).bos == 1


def test_bos_from_the_post_processor(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder(tmp_path, tokenizer, tokenizer_config__json=SETTINGS)
    content = json.loads((path / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (path / "tokenizer.json").write_text(json.dumps(content))
    mine = Tokenizer.load(path)
    assert mine.add_bos
    assert mine.encode("one two three four five six") == [1, *tokenizer.encode("one two three four five six")]


def test_broken_folders(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = folder(tmp_path, tokenizer, tokenizer_config__json={"bos_token": "<nowhere>"})
    with pytest.raises(CheckpointError, match="bos_token='<nowhere>' is not in the vocabulary"):
        Tokenizer.load(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: the file is not valid JSON"):
        Tokenizer.load(path)
    (path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is no tokenizer"):
        Tokenizer.load(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        Tokenizer.load(path)


# Vocabularies of GGUF files

BASE = {"block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8, "vocab_size": 8}


def vocabulary(path: Path, **keys: object) -> Path:
    """A GGUF file without tensors that holds the given tokenizer.ggml keys."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in BASE.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            assert isinstance(value, list)
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


BYTES = {"model": "gpt2", "tokens": ["<s>", "a", "b", "ab", "<tool>", "<|eot_id|>", *"0123", "Ġ", "Ċ"]}
TYPES = [3, 1, 1, 1, 4, 3, 1, 1, 1, 1, 1, 1]


def test_added_tokens_by_type(tmp_path: Path) -> None:
    path = vocabulary(
        tmp_path / "v.gguf", **BYTES, token_type=TYPES, merges=["a b"], bos_token_id=0, add_bos_token=True
    )
    mine = Tokenizer.load(path)
    assert mine.encode("ab<tool>a<s>") == [0, 3, 4, 1, 0]
    assert mine.special_ids == {0, 5}
    assert mine.eos_ids == {5}  # a control token that ends turns, though no key names it
    assert mine.decode([0, 3, 4, 1, 5]) == "ab<tool>a"
    assert mine.decode([0, 3, 4, 1, 99], skip_special=False) == "<s>ab<tool>a"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a  123 b", ["a", "  ", "1", "2", "3", " b"]),
        ("gpt-2", "a  123 b's", ["a", " ", " 123", " b", "'s"]),
        ("qwen2", "Ab  123\n\n x.\n", ["Ab", " ", " ", "1", "2", "3", "\n\n", " x", ".\n"]),
        ("llama-bpe", "Ab'S 12345\n x", ["Ab", "'S", " ", "123", "45", "\n", " x"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    mine = Tokenizer.load(vocabulary(tmp_path / "v.gguf", **BYTES, merges=["a b"], pre=pre))
    core = mine._core
    assert core.pre_tokenizer is not None
    cut = [text[start:end] for _, (start, end) in core.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_what_pre_tokenizers_imply(tmp_path: Path) -> None:
    keys = BYTES | {"tokens": [*BYTES["tokens"], "01"], "merges": ["0 1"], "pre": "llama-bpe", "bos_token_id": 0}
    llama = Tokenizer.load(vocabulary(tmp_path / "l.gguf", **keys))
    assert llama.encode("ab") == [0, 3]  # BOS by default; a whole piece needs no merge
    qwen = {"model": "gpt2", "tokens": ["ÃĠ", "Ã", "©", "e", "Ì", "Ģ", "ģ", "Ã©"], "merges": ["Ã ©"], "pre": "qwen2"}
    assert Tokenizer.load(vocabulary(tmp_path / "q.gguf", **qwen)).encode("e\u0301") == [7]  # composed first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model is None, this version reads gpt2 (byte-level BPE) and llama (Sent"),
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'"),
        (
            {"pre": "brand-new"},
            "tokenizer.ggml.pre is 'brand-new', this version knows deepseek-r1-qwen, default, gpt-2",
        ),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or no list of strings"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or no list of strings"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens holds 'a' twice"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type must hold one number for each of the 12 tokens"),
        ({"token_type": [1.0] * 12}, "tokenizer.ggml.token_type must hold one number for each"),
        ({"merges": None}, "tokenizer.ggml.merges is missing or no list of strings"),
        ({"merges": ["a b", "ab"]}, "tokenizer.ggml.merges holds no pair of tokens at 1"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges holds no pair of tokens at 0"),
        ({"merges": ["a z"]}, "tokenizer.ggml.tokens and merges do not fit together"),
        ({"merges": ["b a"]}, "tokenizer.ggml.tokens and merges do not fit together"),
        ({"bos_token_id": 12}, "tokenizer.ggml.bos_token_id is 12, it must be 0 to 11"),
        ({"eos_token_id": "two"}, "tokenizer.ggml.eos_token_id is 'two', it must be 0 to 11"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing or holds values that are not finite"),
        ({"model": "llama", "scores": [float("nan")] * 12}, "tokenizer.ggml.scores is missing or holds values that"),
        ({"model": "llama", "scores": [0.0]}, "tokenizer.ggml.scores must hold one number for each of the 12 tokens"),
    ],
)
def test_broken_vocabularies(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    path = vocabulary(tmp_path / "v.gguf", **(BYTES | {"merges": ["a b"]} | keys))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


# SentencePiece

WORDS = [
    "▁t",
    "he",
    "▁the",
    "▁a",
    "an",
    "▁an",
    "in",
    "ing",
    "th",
    "▁th",
    "at",
    "▁that",
    "hat",
    "▁▁",
    "▁▁▁",
    "aa",
    "aaa",
]
LETTERS = [*"▁abdeghint.", "é"]


def spm(path: Path, **keys: object) -> Path:
    """A SentencePiece vocabulary in which a longer word's score does not always beat its parts'."""
    shuffled = random.Random(3).sample(WORDS, len(WORDS))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *shuffled, *LETTERS]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(WORDS) + len(LETTERS))
    scores = [0.0] * 259 + [-float(i) for i in range(len(WORDS) + len(LETTERS))]
    return vocabulary(
        path, model="llama", tokens=tokens, token_type=types, scores=scores, bos_token_id=1, eos_token_id=2, **keys
    )


def merge_greedily(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """SentencePiece's BPE by its definition: always the adjacent pair with the best score, the leftmost of equals."""
    ids = {token: i for i, token in enumerate(tokens)}
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ids]
        if not pairs:
            break
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    fallen = [[ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()] for p in pieces]
    return [token for piece in fallen for token in piece]


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(spm(tmp_path_factory.mktemp("spm") / "spm.gguf"))


@given(text=st.text(st.sampled_from("abdeghint. é漢🙂\n"), min_size=1, max_size=40))
def test_sentence_piece(sentence: Tokenizer, text: str) -> None:
    core = sentence._core
    tokens = [core.id_to_token(i) or "" for i in range(sentence.vocab)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(WORDS) + len(LETTERS))]
    ids = sentence.encode(text)
    assert ids == [1, *merge_greedily(text, tokens, scores)]
    assert sentence.decode(ids) == text


def test_sentence_piece_without_prefix(tmp_path: Path) -> None:
    mine = Tokenizer.load(spm(tmp_path / "bare.gguf", add_space_prefix=False, add_bos_token=False))
    assert mine.decode(mine.encode(" the 漢")) == " the 漢"
    assert mine.encode("a") == [mine._core.token_to_id("a")]


# Streams


def chunks(ids: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """`ids` in pieces of the given sizes, cyclically."""
    found, at = [], 0
    for i in range(len(ids)):
        if at >= len(ids):
            break
        size = cuts[i % len(cuts)]
        found.append(list(ids[at : at + size]))
        at += size
    return found


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str, size: int) -> None:
    stream = Detokenizer(tokenizer, skip_special=False)
    pieces = [stream.push(chunk) for chunk in chunks(tokenizer.encode(text), [size])]
    assert "".join(pieces) == text  # nothing is left for flush
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_emoji_and_cjk_wait_for_their_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂漢")
    assert len(ids) > 4
    stream = Detokenizer(tokenizer)
    pieces = [stream.push([token]) for token in ids]
    assert [piece for piece in pieces if piece] == ["🙂", "漢"]
    assert pieces.count("") == len(ids) - 2


@given(
    ids=st.lists(st.integers(0, 400) | st.integers(0, 49151), max_size=40),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    skip=st.booleans(),
)
def test_pieces_joined_are_the_text(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    stream = Detokenizer(tokenizer, skip_special=skip)
    pieces = [stream.push(chunk) for chunk in chunks(ids, cuts)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


@given(
    text=st.text(st.sampled_from("abdeghint. é漢🙂"), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
)
def test_pieces_of_sentence_piece_joined_are_the_text(sentence: Tokenizer, text: str, cuts: list[int]) -> None:
    stream = Detokenizer(sentence)
    pieces = [stream.push(chunk) for chunk in chunks(sentence.encode(text), cuts)]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_never_becomes_a_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🙂")[:-1]
    stream = Detokenizer(tokenizer)
    assert stream.push(half) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("again")) == "again"  # and the next text starts afresh


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that ends first, the longest of those: by trying every end."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts), end
    return None


@given(
    pieces=st.lists(st.text("ab<|>", max_size=6), max_size=8),
    stops=st.lists(st.text("ab<|>", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_wherever_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    finder = StopFinder(stops, include_stop=include)
    text = "".join(pieces)
    shown = "".join(finder.push(piece) for piece in pieces)
    place = first_stop(text, stops)
    if place is None:
        assert finder.found is None
        assert text.startswith(shown)
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)  # no more than may begin one
        assert shown + finder.flush() == text
    else:
        start, end = place
        assert finder.found == text[start:end]
        assert shown == text[: end if include else start]
        assert finder.flush() == ""
        assert finder.push("more") == ""


def test_a_stop_string_across_pieces() -> None:
    finder = StopFinder(["</end>", "STOP"])
    assert [finder.push(piece) for piece in ("a <", "/e", "nds </", "end", "> b")] == ["a ", "", "</ends ", "", ""]
    assert finder.found == "</end>"


@pytest.mark.parametrize("size", [1, 2, 100])
def test_text_stream(tokenizer: Tokenizer, size: int) -> None:
    ids = [*tokenizer.encode("Answer: 漢字 🙂 then\n\nUser: more"), 2]
    stream = TextStream(tokenizer, ("\n\nUser:",))
    pieces = [stream.push(chunk) for chunk in chunks(ids, [size])]
    assert stream.stopped
    assert "".join(pieces) == stream.text == "Answer: 漢字 🙂 then"
    plain = TextStream(tokenizer, ("\n\nNobody:",))
    parts = chunks(ids, [size])
    shown = "".join(plain.push(part, part is parts[-1]) for part in parts)
    assert not plain.stopped
    assert shown == plain.text == "Answer: 漢字 🙂 then\n\nUser: more"
    kept = TextStream(tokenizer, ("then",), include_stop=True)
    assert kept.push(ids, finished=True) == "Answer: 漢字 🙂 then"


def test_what_is_held_back_comes_when_the_request_ends(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ("END",))
    assert stream.push(tokenizer.encode("the E")) == "the "
    assert stream.push(tokenizer.encode("N")) == ""
    assert stream.push(tokenizer.encode("🙂")[:-1], True) == "EN\ufffd"
    assert stream.text == "the EN\ufffd"


def test_long_streams_cost_the_same_per_token(tokenizer: Tokenizer) -> None:
    class Counting(Tokenizer):
        tokens = 0

        def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
            Counting.tokens += len(ids)
            return super().decode(ids, skip_special=skip_special)

    mine = Counting(tokenizer._core, words={}, add_bos=False, eos_ids=frozenset(), template=None)
    ids = np.random.default_rng(0).integers(20, 40000, 2000).tolist()
    stream = TextStream(mine)
    for token in ids:
        stream.push([token])
    assert Counting.tokens < 20 * len(ids)


def test_dummy_weights_have_words() -> None:
    """Texts are encoded byte by byte; whatever such a model draws has a text, so that streams can be measured."""
    made = Tokenizer.load(DummySource("llama-3-8b", CONFIGS["llama-3-8b"], {}))
    assert made.vocab == 128256
    ids = made.encode("Grüße, dog")
    assert max(ids) < 256
    assert made.decode(ids) == "Grüße, dog"
    assert (made.decode([256]), made.decode([128255])) == (" aaaa", " hhjb")
    stream = Detokenizer(made)
    assert [stream.push([token]) for token in (256, 257, 3000)] == [" aaaa", " aaab", " aebo"]


def test_unknown_ids_cost_nothing(tokenizer: Tokenizer) -> None:
    """They have no text, and are not decoded again with every token that follows."""
    stream = Detokenizer(tokenizer)
    assert stream.push([tokenizer.vocab] * 1000) == ""
    assert stream._fresh == []
    assert stream.push(tokenizer.encode("dog", special=False)) == "dog"

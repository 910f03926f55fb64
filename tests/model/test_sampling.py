"""Sampling parameters through the offline API, on a tiny model with a tokenizer."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from omniserve import LLM, SamplingParams
from omniserve.base.errors import RequestError
from omniserve.base.types import Logprob
from omniserve.generation import bad_word
from omniserve.llm import Delta, RequestOutput
from tests.cli.conftest import tiny  # noqa: F401  # a fixture

TEXT = "The quick brown fox jumps over the lazy dog, and a page holds sixty-four tokens of it. "


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:  # noqa: F811  # the fixture
    with LLM(tiny, precision="w16a16kv16", max_num_batched_tokens=64) as one:
        yield one


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 12, "ignore_eos": True} | values)


# n


def test_n_answers_are_those_of_single_requests(llm: LLM) -> None:
    (found,) = llm.generate(TEXT, params(n=5))
    assert [one.index for one in found.outputs] == list(range(5))
    assert len({one.token_ids for one in found.outputs}) == 5
    assert found.outputs[0] == llm.generate(TEXT, params())[0].outputs[0]
    assert found.outputs == llm.generate([TEXT, "a"], [params(n=5), params(n=2)])[0].outputs
    assert found.usage.prompt_tokens == len(found.prompt_token_ids)
    assert found.usage.completion_tokens == 60


def test_n_without_a_seed_draws_seeds(llm: LLM) -> None:
    (found,) = llm.generate("a", params(n=3, seed=None))
    assert len({one.token_ids for one in found.outputs}) == 3


def test_n_answers_stream_side_by_side(llm: LLM) -> None:
    expected = llm.generate(TEXT, params(n=3, logprobs=1))[0].outputs
    deltas = list(llm.stream(TEXT, params(n=3, logprobs=1)))
    for one in expected:
        mine = [delta for delta in deltas if delta.index == one.index]
        assert "".join(delta.text for delta in mine) == one.text
        assert tuple(token for delta in mine for token in delta.token_ids) == one.token_ids
        assert [list(options) for delta in mine for options in delta.logprobs or ()] == list(
            map(list, one.logprobs or ())
        )
        assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
        assert mine[-1].usage is not None
        assert mine[-1].usage.completion_tokens == 12


def test_a_closed_stream_leaves_nothing(llm: LLM) -> None:
    stream: Iterator[Delta] = llm.stream(TEXT, params(n=3, max_tokens=None))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not llm._engine.scheduler.has_work
    assert llm._streams == {}


def test_a_seeded_request_draws_the_same_in_any_batch(llm: LLM) -> None:
    """In the served precision, with room between the candidates: the laws in float64 are in tests/engine."""
    mine = params(top_k=3, logit_bias={65: 90.0, 66: 90.3, 67: 89.7}, presence_penalty=0.5)
    alone = llm.generate(TEXT, mine)[0].outputs
    others = [params(seed=n, repetition_penalty=1.5, min_p=0.1) for n in range(6)]
    assert llm.generate([TEXT] * 7, [*others[:3], mine, *others[3:]])[3].outputs == alone


# Log-probabilities


def scores(llm: LLM, ids: tuple[int, ...]) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    llm.score(ids, lambda positions, logits: parts.append(logits.clone()))
    return torch.log_softmax(torch.cat(parts).float(), -1)


def test_logprobs_equal_the_scores(llm: LLM) -> None:
    more = {"temperature": 0.5, "repetition_penalty": 1.4, "logit_bias": {80: 5.0}}
    (found,) = llm.generate(TEXT * 3, params(logprobs=3, prompt_logprobs=2, **more))
    (one,) = found.outputs
    prompt = found.prompt_token_ids
    expected = scores(llm, prompt + one.token_ids)
    assert found.prompt_logprobs is not None
    assert one.logprobs is not None
    assert found.prompt_logprobs[0] is None
    assert (len(found.prompt_logprobs), len(one.logprobs)) == (len(prompt), len(one.token_ids))
    for position, options in enumerate([*found.prompt_logprobs[1:], *one.logprobs], 1):
        assert options is not None
        token, row = (prompt + one.token_ids)[position], expected[position - 1]
        count = 2 if position < len(prompt) else 3
        assert next(iter(options)) == token
        assert count <= len(options) <= count + 1
        assert set(options) == {token, *row.topk(count).indices.tolist()}
        for other, value in options.items():
            assert value.logprob == pytest.approx(row[other].item(), abs=1e-4)
            assert value.rank == 1 + (row > row[other]).sum()
            assert value.decoded_token == llm.tokenizer.decode([other], skip_special=False)


def test_a_count_of_0_lists_the_token_alone(llm: LLM) -> None:
    (found,) = llm.generate("a b", params(logprobs=0, n=2))
    for one in found.outputs:
        assert one.logprobs is not None
        assert [list(options) for options in one.logprobs] == [[token] for token in one.token_ids]
        assert all(isinstance(value, Logprob) for options in one.logprobs for value in options.values())
    assert found.prompt_logprobs is None
    assert llm.generate("a b", params())[0].outputs[0].logprobs is None


def test_prompt_logprobs_with_n_come_once(llm: LLM) -> None:
    (found,) = llm.generate(TEXT, params(n=2, prompt_logprobs=0, temperature=0))
    assert found.prompt_logprobs is not None
    assert len(found.prompt_logprobs) == len(found.prompt_token_ids)
    assert found.outputs[0].token_ids == found.outputs[1].token_ids


# Ends


def test_stop_strings_are_found_across_tokens(llm: LLM) -> None:
    (whole,) = llm.generate(TEXT, params(max_tokens=24))[0].outputs
    text = whole.text
    for begin in range(len(text) - 3):
        stop = text[begin : begin + 3]
        if "\ufffd" in stop:
            continue
        at = text.index(stop)
        (cut,) = llm.generate(TEXT, params(max_tokens=24, stop=stop))[0].outputs
        assert (cut.text, cut.finish_reason) == (text[:at], "stop")
        (kept,) = llm.generate(TEXT, params(max_tokens=24, stop=stop, include_stop_str_in_output=True))[0].outputs
        assert kept.text == text[: at + 3]
        deltas = list(llm.stream(TEXT, params(max_tokens=24, stop=stop)))
        assert "".join(delta.text for delta in deltas) == text[:at]


def test_min_tokens_hold_back_every_end(llm: LLM) -> None:
    (free,) = llm.generate(TEXT, params(max_tokens=24))[0].outputs
    ends = params(max_tokens=24, stop_token_ids=(free.token_ids[2],))
    (early,) = llm.generate(TEXT, ends)[0].outputs
    assert (len(early.token_ids), early.finish_reason) == (free.token_ids.index(free.token_ids[2]) + 1, "stop")
    eos = params(max_tokens=24, ignore_eos=False, logit_bias={0: 100.0})
    assert llm.generate(TEXT, eos)[0].outputs[0].token_ids == (0,)
    (late,) = llm.generate(TEXT, params(max_tokens=24, ignore_eos=False, logit_bias={0: 100.0}, min_tokens=7))[
        0
    ].outputs
    assert late.token_ids.index(0) == 7
    assert late.finish_reason == "stop"
    letters = params(max_tokens=24, allowed_token_ids=(65, 66), stop=llm.tokenizer.decode([65]), min_tokens=9)
    (text,) = llm.generate(TEXT, letters)[0].outputs
    assert 65 in text.token_ids[:9]
    assert len(text.token_ids) > 9
    assert text.token_ids[-1] == 65


def test_what_ends_a_request_is_no_text_unless_asked_for(llm: LLM) -> None:
    def text(**more: Any) -> str:
        return llm.generate(TEXT, params(allowed_token_ids=(0, 70), min_tokens=2, **more))[0].outputs[0].text

    letter = llm.tokenizer.decode([70])
    end = llm.tokenizer.decode([0], skip_special=False)
    ends = {"ignore_eos": False, "logit_bias": {0: 100.0}}
    assert text(**ends) == letter * 2
    assert text(**ends, skip_special_tokens=False) == letter * 2
    assert text(**ends, skip_special_tokens=False, include_stop_str_in_output=True) == letter * 2 + end
    assert text(logit_bias={0: 100.0}) == ""  # the end of sequence goes on, and is hidden
    assert text(logit_bias={0: 100.0}, skip_special_tokens=False) == end * 12


# Bad words


def test_bad_words_are_not_written(llm: LLM) -> None:
    (free,) = llm.generate(TEXT, params(max_tokens=40))[0].outputs
    checked = 0
    for begin in range(2, 30):
        word = llm.tokenizer.decode(free.token_ids[begin : begin + 2])
        ids = tuple(llm.tokenizer.encode(word.lstrip()))
        if "\ufffd" in word or not word.strip() or ids != free.token_ids[begin : begin + 2]:
            continue
        checked += 1
        (found,) = llm.generate(TEXT, params(max_tokens=40, bad_words=(word,)))[0].outputs
        assert word in free.text
        assert ids not in zip(found.token_ids, found.token_ids[1:], strict=False)
    assert checked > 3


def test_bad_words_are_banned_at_the_start_and_behind_a_space(llm: LLM) -> None:
    assert bad_word("T", llm.tokenizer, llm.spec.vocab) == bad_word("  T", llm.tokenizer, llm.spec.vocab)
    assert bad_word("T", llm.tokenizer, llm.spec.vocab)[0] == tuple(llm.tokenizer.encode("T"))
    for word in ("the", "fox", "zebra"):
        spaced = tuple(llm.tokenizer.encode(f" {word}"))
        expected = [tuple(llm.tokenizer.encode(word))]
        if len(spaced) == len(expected[0]) and spaced[0] != expected[0][0]:
            expected.append(spaced)
        assert bad_word(word, llm.tokenizer, llm.spec.vocab) == expected


# Refusals and defaults


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"logit_bias": {5000: 1.0}}, ["5000", "logit_bias"]),
        ({"allowed_token_ids": (3, 4000)}, ["4000", "allowed_token_ids"]),
        ({"stop_token_ids": (9999,)}, ["9999", "stop_token_ids"]),
        ({"bad_words": ("  ",)}, ["bad_words", "spaces"]),
        ({"allowed_token_ids": (0,), "ignore_eos": False, "min_tokens": 1}, ["leave no token"]),
    ],
)
def test_refusals_that_need_the_model(llm: LLM, values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate("a", params(**values))
    for word in words:
        assert word in str(caught.value)
    if "leave" not in str(caught.value) and "bad_words" not in values:
        assert f"{llm.spec.vocab - 1}" in str(caught.value)
    assert not llm._engine.has_work


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 2.1}, "temperature=2.1: must be 0 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: must be above 0 and at most 2"),
        ({"repetition_penalty": 2.5}, "repetition_penalty=2.5"),
        ({"presence_penalty": -2.1}, "presence_penalty=-2.1: must be -2 to 2"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty=inf"),
        ({"n": 129}, "n=129: must be a whole number from 1 to 128"),
        ({"n": True}, "n=True"),
        ({"logprobs": 21}, "logprobs=21: must be a whole number from 0 to 20 or None"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"min_tokens": 17}, "min_tokens=17: must be at most max_tokens=16"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"stop": ["x"] * 17}, "at most 16 strings, not 17"),
        ({"stop": "x" * 257}, "at most 256 characters, not 257"),
        ({"stop": 5}, "stop=5"),
        ({"stop_token_ids": range(129)}, "at most 128 ids, not 129"),
        ({"bad_words": ["x"] * 129}, "at most 128 strings, not 129"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "numbers from -100 to 100"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "at most 1024 ids, not 1025"),
        ({"allowed_token_ids": []}, "at least one token id"),
        ({"allowed_token_ids": range(4097)}, "at most 4096 ids, not 4097"),
        ({"ignore_eos": 1}, "ignore_eos=1: must be true or false"),
    ],
)
def test_refusals_that_need_no_model(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 250


def test_parameters_are_normalized_and_hashable() -> None:
    bias = {3: 1.0}
    one = SamplingParams(logit_bias=bias, stop_token_ids=[1, 2], bad_words=["a"], stop=None)  # type: ignore[arg-type]
    bias[4] = 2.0
    assert (one.logit_bias, one.stop_token_ids, one.bad_words, one.stop) == ({3: 1.0}, (1, 2), ("a",), ())
    assert len({one, SamplingParams()}) == 2


def with_generation_config(tiny: Path, folder: Path, values: dict[str, Any]) -> LLM:  # noqa: F811  # no fixture here
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return LLM(folder, precision="w16a16kv16")


def test_defaults_come_from_generation_config(tiny: Path, tmp_path: Path) -> None:  # noqa: F811  # the fixture
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}
    with with_generation_config(tiny, tmp_path / "one", values | {"eos_token_id": [0, 5], "min_p": None}) as llm:
        assert llm.default_params() == SamplingParams(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05)
        assert llm.tokenizer.eos_ids == {0, 5}
        calls: list[RequestOutput] = [llm.generate("a")[0], llm.generate("a", llm.default_params())[0]]
        assert all(len(call.outputs[0].token_ids) <= 16 for call in calls)
    with with_generation_config(tiny, tmp_path / "two", {"temperature": 0}) as llm:
        greedy = SamplingParams(temperature=0)
        assert llm.generate("a")[0].outputs == llm.generate("a", greedy)[0].outputs
        assert next(llm.stream("a")).token_ids == llm.generate("a")[0].outputs[0].token_ids[:1]
    with with_generation_config(tiny, tmp_path / "three", {"temperature": 7}) as llm:
        with pytest.raises(RequestError, match=r"generation_config.json: temperature=7: must be 0 to 2"):
            llm.generate("a")
        assert llm.generate("a", greedy)


def test_a_model_without_generation_config_has_the_usual_defaults(llm: LLM) -> None:
    assert llm.default_params() == SamplingParams()


def test_the_flags_of_generate_and_chat_reach_the_request() -> None:
    from omniserve.cli.answer import AnswerFlags

    flags = AnswerFlags(temperature=0.5, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.4, top_k=7)
    assert flags.params(max_tokens=9, seed=3) == SamplingParams(
        temperature=0.5,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        top_k=7,
        max_tokens=9,
        seed=3,
    )

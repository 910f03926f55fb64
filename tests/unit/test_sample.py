"""Sampling: frequencies match the distribution; a row never depends on the others, nor on how its state came about."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from omniserve.base.types import Admission, SamplingParams
from omniserve.ops.sample import (
    CORRUPTED,
    EXHAUSTED,
    NARROW,
    SampleRows,
    SampleState,
    adjust,
    logprobs,
    sample,
    uniform,
    warm,
)

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -8.0])
PROMPT = (0, 2, 2, 6)
PRODUCED = (1, 2, 5, 1)


def admission(
    params: SamplingParams,
    history: Sequence[int] = (*PROMPT, *PRODUCED),
    *,
    prompt: int = len(PROMPT),
    seed: int = 7,
    stop_ids: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
) -> Admission:
    return Admission(
        sampling=params,
        seed=seed,
        prompt=prompt,
        history=tuple(history),
        stop_ids=tuple(stop_ids),
        bad_words=tuple(map(tuple, bad_words)),
    )


def state_of(*admissions: Admission, vocab: int = len(LOGITS)) -> SampleState:
    state = SampleState(len(admissions), vocab, CPU)
    for slot, one in enumerate(admissions):
        state.set(slot, one)
    return state


# Frequencies


def changed(one: Admission, logits: Sequence[float], position: int) -> list[float]:
    """The same changes of the logits, one token after the other, as plain numbers."""
    params, produced = one.sampling, one.history[one.prompt :]
    result = []
    for token, logit in enumerate(logits):
        x = logit + params.logit_bias.get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x = -math.inf
        if position < one.prompt + params.min_tokens and token in one.stop_ids:
            x = -math.inf
        for word in one.bad_words:
            begin = tuple(word[:-1])
            if token == word[-1] and produced[len(produced) - len(begin) :] == begin:
                x = -math.inf
        if token in one.history:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.frequency_penalty * produced.count(token)
        x -= params.presence_penalty * (token in produced)
        result.append(x)
    return result


def distribution(one: Admission, logits: Sequence[float], position: int) -> list[float]:
    """The same filters, written as loops over a sorted list."""
    params = one.sampling
    xs = changed(one, logits, position)
    p = [math.exp((x - max(xs)) / params.temperature) for x in xs]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=lambda t: -p[t])
    kept = [t for t in order if p[t] >= params.min_p * p[order[0]]]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total = sum(p[t] for t in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass < params.top_p:
            nucleus.append(token)
        mass += p[token] / total
    total = sum(p[t] for t in nucleus)
    return [p[t] / total if t in nucleus else 0.0 for t in range(len(p))]


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"top_k": 4, "top_p": 0.7},
    {"top_k": 6, "min_p": 0.2},
    {"top_p": 0.8, "min_p": 0.15},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
]
CHANGES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.2},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.9},
    {"logit_bias": {7: 8.5, 0: -100, 3: 0.5}},
    {"allowed_token_ids": (1, 3, 4)},
    {"bad_words": ((3,), (5, 1, 0), (2, 5, 1, 4), (5, 2))},
    {"min_tokens": 5, "stop_ids": (0, 4)},
    {
        "min_tokens": 20,
        "stop_ids": (2,),
        "bad_words": ((1, 3),),
        "allowed_token_ids": (0, 2, 3, 4, 5, 6, 7),
        "logit_bias": {6: 2.0},
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
    },
]


def admitted(**kind: Any) -> Admission:
    words, stops = kind.pop("bad_words", ()), kind.pop("stop_ids", ())
    return admission(SamplingParams(max_tokens=None, **kind), bad_words=words, stop_ids=stops)


COMBINED = [change | FILTERS[number % len(FILTERS)] for number, change in enumerate(CHANGES, 3)]


@pytest.mark.parametrize("kind", [*FILTERS, *CHANGES, *COMBINED], ids=str)
def test_frequencies_match_the_distribution(kind: dict[str, Any]) -> None:
    """20,000 draws, at two of every three rows among rows that ask for other things."""
    one, other = admitted(**kind), admitted(temperature=0.7, top_k=2, presence_penalty=1.0, logit_bias={1: 3.0})
    state = state_of(one, other)
    count = 20_000
    position = 8  # the seeds differ
    seeds = torch.arange(count)
    mine = [row for row in range(count + count // 2) if row % 3 != 2]
    slots = [1] * (count + count // 2)
    for row in mine:
        slots[row] = 0
    rows = state.rows(slots, [position] * len(slots))
    part = rows.narrow if "top_k" in kind else rows.filtered if kind.keys() & {"top_p", "min_p"} else rows.whole
    assert part is not None
    part.seed[torch.isin(part.rows, torch.tensor(mine))] = seeds
    drawn = sample(LOGITS.expand(len(slots), -1), rows)[mine]
    seen = torch.bincount(drawn, minlength=len(LOGITS)).double()
    expected = torch.tensor(distribution(one, LOGITS.tolist(), position), dtype=torch.float64) * count
    assert seen[expected == 0].sum() == 0
    used = expected > 0
    chi_square = ((seen - expected)[used] ** 2 / expected[used]).sum()
    assert chi_square < 29.9  # the 0.9999 quantile for 7 degrees of freedom


def test_narrow_and_wide_rows_draw_the_same() -> None:
    """A top_k that is just small enough to look at few tokens, and one just above, when nothing lies between them."""
    logits = torch.cat([random_logits(1, NARROW - 3, torch.float32), torch.full((1, 300), -200.0)], 1).expand(500, -1)
    drawn = []
    for top_k in (NARROW, NARROW + 1):
        state = state_of(admission(SamplingParams(top_k=top_k, top_p=0.9, min_p=0.001)), vocab=logits.shape[1])
        rows = state.rows([0] * 500, range(500))
        assert (rows.narrow is None) == (top_k > NARROW)
        drawn.append(sample(logits, rows))
    assert torch.equal(*drawn)


def test_positions_draw_as_evenly_as_seeds() -> None:
    state, count = state_of(admitted(top_p=0.9)), 20_000
    rows = state.rows([0] * count, range(100, 100 + count))
    seen = torch.bincount(sample(LOGITS.expand(count, -1), rows), minlength=len(LOGITS)).double()
    expected = torch.tensor(distribution(admitted(top_p=0.9), LOGITS.tolist(), 100), dtype=torch.float64) * count
    used = expected > 0
    assert ((seen - expected)[used] ** 2 / expected[used]).sum() < 29.9


@pytest.mark.parametrize("kind", FILTERS, ids=str)
def test_the_loops_above_filter_as_transformers_does(kind: dict[str, Any]) -> None:
    from transformers import generation

    x = LOGITS.double()[None]
    params = SamplingParams(**kind)
    warpers = [generation.TemperatureLogitsWarper(params.temperature)]
    if params.min_p:
        warpers.append(generation.MinPLogitsWarper(params.min_p))
    if params.top_k:
        warpers.append(generation.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(generation.TopPLogitsWarper(params.top_p))
    for warper in warpers:
        x = warper(torch.zeros(1, 0, dtype=torch.int64), x)
    expected = torch.softmax(x, -1)[0]
    found = torch.tensor(distribution(admission(params), LOGITS.tolist(), 8), dtype=torch.float64)
    torch.testing.assert_close(found, expected)


# Changes of the logits


def random_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows + vocab), dtype=dtype)


def random_history(size: int, vocab: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(vocab, (size,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("penalty", [0.3, 1.1, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    logits, history = random_logits(1, 300), random_history(200, 300, 0)
    state = state_of(
        admission(SamplingParams(temperature=0, repetition_penalty=penalty), history, prompt=150), vocab=300
    )
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits.clone())
    assert torch.equal(adjust(logits, state.rows([0], [200])), expected)


def test_bias_bans_and_least_length_equal_transformers() -> None:
    from transformers import generation

    logits, history = random_logits(1, 40), random_history(30, 40, 1)
    ids = torch.tensor([history])
    bias = {3: 5.0, 7: -100.0, 39: 0.25}
    words = [(4,), (history[-1], 9), (history[-2], history[-1], 11), (history[-3], history[-1], 12), (39, 13)]
    processors = {
        "logit_bias": generation.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
        "bad_words": generation.NoBadWordsLogitsProcessor([list(word) for word in words]),
        "min_tokens": generation.MinNewTokensLengthLogitsProcessor(0, 31, [5, 17], device="cpu"),
    }
    kinds: dict[str, dict[str, Any]] = {
        "logit_bias": {"logit_bias": bias},
        "bad_words": {"bad_words": words},
        "min_tokens": {"min_tokens": 31, "stop_ids": (5, 17)},
    }
    for name, processor in processors.items():
        kind = dict(kinds[name])
        extra = {key: kind.pop(key) for key in ("bad_words", "stop_ids") if key in kind}
        one = admission(SamplingParams(max_tokens=None, **kind), history, prompt=0, **extra)
        found = adjust(logits, state_of(one, vocab=40).rows([0], [30]))
        assert torch.equal(found, processor(ids, logits.clone())), name
        assert not torch.equal(found, logits), name


def test_bad_words_look_at_produced_tokens_only() -> None:
    logits = torch.zeros(1, 8)
    words = ((2, 3), (6, 4), (1, 5, 7))
    one = admission(SamplingParams(), (2, 6, 1), prompt=3, bad_words=words)  # all of it prompt
    assert torch.equal(adjust(logits, state_of(one).rows([0], [3])), logits)
    one = admission(SamplingParams(), (2, 6, 1, 5), prompt=3, bad_words=words)  # the 1 is prompt
    assert torch.equal(adjust(logits, state_of(one).rows([0], [4])), logits)
    one = admission(SamplingParams(), (2, 6, 1, 5), prompt=2, bad_words=words)
    assert adjust(logits, state_of(one).rows([0], [4])).isinf().tolist() == [[False] * 7 + [True]]


def test_bad_words_that_would_leave_nothing_forbid_nothing() -> None:
    params = SamplingParams(temperature=0, allowed_token_ids=(3, 5))
    one = admission(params, (0, 3), prompt=1, bad_words=((3, 3), (3, 5)))
    assert sample(LOGITS[None], state_of(one).rows([0], [2])).tolist() == [3]


def test_a_row_that_is_left_nothing_says_so_and_others_do_not_notice() -> None:
    none = admission(SamplingParams(temperature=0, allowed_token_ids=(3,), min_tokens=9), (9, 9), stop_ids=(3,))
    state = state_of(none, admission(SamplingParams(temperature=0)))
    assert sample(torch.stack([LOGITS, LOGITS]), state.rows([0, 1], [3, 3])).tolist() == [EXHAUSTED, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_logits_are_told_and_other_rows_do_not_notice(dtype: torch.dtype, value: float) -> None:
    kinds = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_k": 3},
        {"seed": 3, "top_p": 0.9},
        {"seed": 4, "repetition_penalty": 1.5},
        {"temperature": 0.0, "logit_bias": {3: 5.0}},
    ]
    for kind in kinds:
        one = admission(SamplingParams(**kind), (9, 2), prompt=1)
        logits = random_logits(3, 40).to(dtype)
        rows = state_of(one, one, one, vocab=40).rows([0, 1, 2], [5, 6, 7])
        expected = sample(logits, rows).tolist()
        for broken in (slice(None), slice(7, 8)):
            poisoned = logits.clone()
            poisoned[1, broken] = value
            assert sample(poisoned, rows).tolist() == [expected[0], CORRUPTED, expected[2]], (kind, broken)
    nothing = torch.full((2, 40), -torch.inf, dtype=dtype)
    nothing[1, 4] = 0.0
    assert sample(nothing, SampleRows()).tolist() == [CORRUPTED, 4]


def test_min_tokens_end_at_their_position() -> None:
    one = admission(SamplingParams(temperature=0, min_tokens=3), (9, 9), prompt=2, stop_ids=(0, 1))
    state = state_of(one)
    drawn = [sample(LOGITS[None], state.rows([0], [position])).item() for position in range(2, 7)]
    assert drawn == [2, 2, 2, 0, 0]


def test_what_no_row_asks_for_is_not_computed() -> None:
    """A greedy batch is an argmax, whatever other slots ask for."""
    state = state_of(admission(SamplingParams(temperature=0)), admitted(**CHANGES[-1]), admitted(top_k=2))
    rows = state.rows([0, 0], [5, 6])
    assert rows == SampleRows()
    logits = random_logits(2, 8)
    assert adjust(logits, rows) is logits
    state.set(2, admission(SamplingParams(temperature=0.0)))
    assert state.rows([2], [0]) == SampleRows()
    assert state.rows([0, 1], [9, 9]).filtered is None
    short = state_of(admission(SamplingParams(temperature=0, min_tokens=2), prompt=4, stop_ids=(1,)))
    assert short.rows([0], [5]).muted is not None
    assert short.rows([0], [6]) == SampleRows()


# State


KINDS: list[dict[str, Any]] = [{"temperature": 0}, *FILTERS, *CHANGES, *COMBINED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_a_mixed_batch_draw_as_if_alone(dtype: torch.dtype) -> None:
    logits = random_logits(len(KINDS), 300, dtype)
    slots = torch.randperm(len(KINDS), generator=torch.Generator().manual_seed(3)).tolist()
    state = state_of(*(admitted(**kind) for kind in KINDS), vocab=300)
    positions = [8 + slot % 5 for slot in slots]
    together = sample(logits, state.rows(slots, positions))
    for row, slot in enumerate(slots):
        alone = state_of(admitted(**KINDS[slot]), vocab=300)
        assert sample(logits[row : row + 1], alone.rows([0], positions[row : row + 1])).item() == together[row]


def test_noted_draws_equal_a_fresh_start() -> None:
    """What was counted draw by draw on the device is what a resumed request's history gives."""
    vocab, prompt = 12, 5
    kinds = [*CHANGES, {"temperature": 0}, {"bad_words": tuple(random_history(n, vocab, n) for n in (1, 2, 2, 3))}]
    first = [random_history(prompt, vocab, slot) for slot in range(len(kinds))]
    histories = [list(tokens) for tokens in first]

    def fresh(tokens: Sequence[Sequence[int]]) -> SampleState:
        made = []
        for kind, history in zip(kinds, tokens, strict=True):
            rest = dict(kind)
            extra = {key: rest.pop(key) for key in ("bad_words", "stop_ids") if key in rest}
            made.append(admission(SamplingParams(max_tokens=None, **rest), history, prompt=prompt, **extra))
        return state_of(*made, vocab=vocab)

    state = fresh(first)
    slots = list(range(len(kinds)))
    for position in range(prompt, prompt + 30):
        logits = random_logits(len(kinds), vocab) + position % 7
        rows = state.rows(slots, [position] * len(slots))
        assert torch.equal(adjust(logits, rows), adjust(logits, fresh(histories).rows(slots, [position] * len(slots))))
        drawn = sample(logits, rows)
        state.note(rows, drawn)
        for history, token in zip(histories, drawn.tolist(), strict=True):
            history.append(token)


def test_a_slot_forgets_the_request_before() -> None:
    logits = random_logits(1, 8)
    state = state_of(admitted(**CHANGES[-1]))
    for kind in [{"presence_penalty": 1.0}, {"logit_bias": {2: 1.0}}, {"bad_words": ((1, 2, 3),)}, {"min_tokens": 9}]:
        one = admitted(**kind, **({"stop_ids": (3,)} if "min_tokens" in kind else {}))
        state.set(0, one)
        rows = state.rows([0], [8])
        assert torch.equal(adjust(logits, rows), adjust(logits, state_of(one).rows([0], [8])))


def test_tables_grow_without_losing_what_they_hold() -> None:
    logits = torch.zeros(1, 8)
    state = SampleState(3, 8, CPU)
    state.set(0, admission(SamplingParams(min_tokens=9), stop_ids=(4,), bad_words=((5, 1, 3),)))
    rows = state.rows([0], [8])
    state.note(rows, torch.tensor([5]))
    before = adjust(logits, state.rows([0], [9]))
    words = tuple((*random_history(n, 8, n), 7) for n in range(9))
    state.set(1, admission(SamplingParams(min_tokens=9), stop_ids=(1, 2, 3), bad_words=words))
    assert torch.equal(adjust(logits, state.rows([0], [9])), before)
    state.note(state.rows([0], [9]), torch.tensor([1]))
    assert adjust(logits, state.rows([0], [10])).isinf().nonzero()[:, 1].tolist() == [3, 4]


# Draws


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1e-6), SamplingParams(temperature=1e-4)):
        state = state_of(admission(params), vocab=4)
        assert sample(logits, state.rows([0], [5])).item() in ([1] if params.greedy else [1, 3])


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 2.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}])
def test_no_temperature_overflows(temperature: float, filters: dict[str, float]) -> None:
    logits = torch.tensor([[-3e4, 6e4, 5.9e4, -torch.inf]])
    state = state_of(admission(SamplingParams(temperature=temperature, **filters)), vocab=4)
    assert sample(logits, state.rows([0], [5])).item() == 1


@pytest.mark.parametrize(
    "params", [{"top_p": 5e-324}, {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e-37, "top_p": 0.5}]
)
def test_numbers_too_small_for_32_bits_draw_the_likeliest(params: dict[str, float]) -> None:
    logits = torch.tensor([[-30.0, 0.0, 20.0, 60.0]])
    state = state_of(admission(SamplingParams(**params), [2, 3], prompt=2), vocab=4)
    assert sample(logits, state.rows([0], [5])).item() == 3


@pytest.mark.parametrize("filters", [{}, {"top_k": 7}])
def test_the_largest_u_draws_no_forbidden_token(filters: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(admission(SamplingParams(allowed_token_ids=(1, 3, 6), **filters)))
    monkeypatch.setattr("omniserve.ops.sample.uniform", lambda seed, position: torch.ones(1, dtype=torch.float64))
    assert sample(LOGITS[None], state.rows([0], [5])).item() == 6  # even if its product with the sum is rounded up


@pytest.mark.parametrize("vocab", [1, 50, 300])
def test_warming_takes_any_vocabulary_and_leaves_no_trace(vocab: int) -> None:
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    warm(logits)
    assert torch.equal(logits, before)


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logprobs_equal_log_softmax(dtype: torch.dtype) -> None:
    logits = (random_logits(5, 200) / 4).to(dtype)
    tokens = torch.tensor([0, 199, 7, 7, 50])
    found = logprobs(logits, tokens, 6)
    exact = logits.double() if dtype == torch.float64 else logits.float()
    expected = torch.log_softmax(exact, -1)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.logprob, expected.gather(1, tokens[:, None])[:, 0], **close)
    torch.testing.assert_close(found.top_logprobs, expected.gather(1, found.top_ids), **close)
    for row, token in enumerate(tokens.tolist()):
        order = sorted(range(200), key=lambda t: (-logits[row, t].item(), t))
        assert found.top_ids[row].tolist() == order[:6]
        assert found.rank[row].item() == order.index(token) + 1


def test_logprobs_are_the_same_bits_alone_and_among_others() -> None:
    logits = 5 * torch.randn(41, 5003, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(41)
    together = logprobs(logits, tokens, 4)
    for row in range(41):
        alone = logprobs(logits[row : row + 1], tokens[row : row + 1], 4)
        assert torch.equal(alone.logprob[0], together.logprob[row]), row
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row]), row


def test_a_list_of_logprobs_does_not_depend_on_its_length_and_ties_go_by_id() -> None:
    logits = torch.tensor([[0.0, -0.0, 2.0, 2.0, -1.0, -torch.inf, 2.0]])
    for dtype in (torch.float32, torch.float64):
        found = logprobs(logits.to(dtype), torch.tensor([3]), 20)
        assert found.top_ids.tolist() == [[2, 3, 6, 0, 1, 4, 5]]
        assert found.rank.tolist() == [2]
        assert found.top_logprobs[0, 1] == found.logprob[0]
        for count in range(7):
            assert logprobs(logits.to(dtype), torch.tensor([3]), count).top_ids.tolist() == [
                found.top_ids[0, :count].tolist()
            ]


# Randomness


def test_uniform_is_even_and_depends_on_seed_and_position() -> None:
    position = torch.arange(100_000)
    u = uniform(torch.full_like(position, 12), position)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square, 99 degrees of freedom, 0.9999
    assert not torch.equal(u, uniform(torch.full_like(position, 13), position))


def test_uniform_equals_splitmix64_in_python_integers() -> None:
    def plain(seed: int, position: int) -> float:
        mask = 2**64 - 1
        z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 11) * 2.0**-53

    for seed, position in [(0, 0), (1, 5), (-3, 17), (2**63 - 1, 1_000_000), (-(2**63), 3)]:
        assert uniform(torch.tensor([seed]), torch.tensor([position])).item() == plain(seed, position)

"""From logits to token ids, on the device, each row by its own request's parameters.

Randomness is counter-based: a draw depends on (seed, position) alone, so a request draws the same tokens alone, in any
batch, and again after a preemption. What a request counts (penalties) or remembers (bad words) lies on the device by
slot: it is built from the known tokens when the request takes the slot and brought up to date by every draw, so no draw
waits for the host. Which rows ask for what is known to the host: what no row asks for is not computed.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from omniserve.base.types import Admission
from omniserve.ops import nucleus
from omniserve.ops.changes import (
    NONE,
    PROMPT,
    BadWords,
    Bias,
    Masked,
    Muted,
    Penalties,
    changed,
    exact,
    without,
)
from omniserve.ops.dispatch import operation
from omniserve.ops.transfer import placed, sent

NARROW = 64
"""Rows with a top_k of at most this look at so many of their likeliest tokens only."""
CORRUPTED, EXHAUSTED = -1, -2
"""What stands in place of a token where logits are not finite numbers, and where none may be drawn."""

ROWS = 16
"""Rows whose logits are copied to fp64 at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """Rows that draw at random. rows, seed, position, top_k int64 [s]; temperature, top_p, min_p fp64 [s].

    position  index of the token that is drawn, in its sequence
    """

    rows: Tensor
    seed: Tensor
    position: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRows:
    """What S rows ask for, each part with the rows that do; a row that is in none of the last three is greedy.

    whole     rows that draw from the whole distribution
    narrow    rows with a small top_k, whatever else they have; filtered: other rows with a top_k, top_p or min_p
    """

    bias: Bias | None = None
    masked: Masked | None = None
    muted: Muted | None = None
    bad_words: BadWords | None = None
    penalties: Penalties | None = None
    whole: Chance | None = None
    narrow: Chance | None = None
    filtered: Chance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """logprob [S]; rank int64 [S]; top_ids int64 [S, count], top_logprobs [S, count]: the likeliest, in order."""

    logprob: Tensor
    rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


class SampleState:
    """Sampling parameters, counts and last tokens of every request slot. Mutable.

    A slot is set when a request takes it, and noted after every draw. Tables of [slots, V] are made when the first
    request needs them and stay.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self._slots, self._vocab, self._device = slots, vocab, device
        self._floats = torch.zeros(slots, 6, dtype=torch.float64, device=device)
        self._wholes = torch.zeros(slots, 2, dtype=torch.int64, device=device)
        self._bias: Tensor | None = None
        self._counts: Tensor | None = None
        self._stops = self._table(0)
        self._words = self._table(0, 1)
        self._recent = self._table(0)
        # What the host knows: which slots ask for what, and for anything; where a request may end at the earliest.
        self._biased: set[int] = set()
        self._muted: set[int] = set()
        self._worded: set[int] = set()
        self._penalized: set[int] = set()
        self._whole: set[int] = set()
        self._narrow: set[int] = set()
        self._filtered: set[int] = set()
        self._busy: set[int] = set()
        self._earliest_end = [0] * slots

    def set(self, slot: int, admission: Admission) -> None:
        """Give a slot its request's parameters and history."""
        chances = (self._whole, self._narrow, self._filtered)
        asking = (self._biased, self._muted, self._worded, self._penalized, *chances)
        for those in (*asking, self._busy):
            those.discard(slot)
        sampling = admission.sampling
        if not sampling.greedy:
            top_k = max(sampling.top_k, 0)
            filters = top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
            (self._narrow if 0 < top_k <= NARROW else self._filtered if filters else self._whole).add(slot)
            self._wholes[slot] = self._ids([top_k, admission.seed])
        if sampling.penalizes:
            self._penalized.add(slot)
            self._count(slot, admission)
        if sampling.penalizes or not sampling.greedy:
            numbers = (
                sampling.temperature, sampling.top_p, sampling.min_p,
                sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty,
            )  # fmt: skip
            self._floats[slot] = self._numbers(numbers, torch.float64)
        if sampling.logit_bias or sampling.allowed_token_ids is not None:
            self._biased.add(slot)
            self._weigh(slot, admission)
        if sampling.min_tokens and admission.stop_ids:
            self._muted.add(slot)
            self._earliest_end[slot] = admission.prompt + sampling.min_tokens
            self._mute(slot, admission)
        if admission.bad_words:
            self._worded.add(slot)
            self._forbid(slot, admission)
        if any(slot in those for those in asking):
            self._busy.add(slot)

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> SampleRows:
        """Return what S rows ask for; a row's position is the index of the token that is drawn."""
        if self._busy.isdisjoint(slots):
            return SampleRows()
        return SampleRows(
            bias=self._bias_rows(slots),
            muted=self._muted_rows(slots, positions),
            bad_words=self._word_rows(slots),
            penalties=self._penalty_rows(slots),
            whole=self._chance(self._whole, slots, positions),
            narrow=self._chance(self._narrow, slots, positions),
            filtered=self._chance(self._filtered, slots, positions),
        )

    def note(self, rows: SampleRows, tokens: Tensor) -> None:
        """Take in what the rows have drawn, int64 [S]."""
        if rows.penalties is not None:
            where = rows.penalties.slots, tokens[rows.penalties.rows]
            rows.penalties.counts[where] += 1  # slots differ, so no place comes twice
        if rows.bad_words is not None and self._recent.shape[1]:
            latest = torch.cat([rows.bad_words.recent[:, 1:], tokens[rows.bad_words.rows, None]], 1)
            self._recent[rows.bad_words.slots] = latest

    # What a slot asks for, written when it is taken

    def _count(self, slot: int, admission: Admission) -> None:
        if self._counts is None:
            self._counts = torch.zeros(self._slots, self._vocab, dtype=torch.int32, device=self._device)
        counts = self._counts[slot]
        counts.zero_()
        assert len(admission.history) >= admission.prompt, admission
        prompt, produced = admission.history[: admission.prompt], admission.history[admission.prompt :]
        counts.index_fill_(0, self._ids(prompt), PROMPT)  # to assign a number, torch would wait for the device
        ones = torch.ones(len(produced), dtype=torch.int32, device=self._device)
        counts.index_add_(0, self._ids(produced), ones)

    def _weigh(self, slot: int, admission: Admission) -> None:
        if self._bias is None:
            self._bias = torch.zeros(self._slots, self._vocab, device=self._device)
        bias, allowed = self._bias[slot], admission.sampling.allowed_token_ids
        bias.fill_(0.0 if allowed is None else -torch.inf)
        if allowed is not None:
            bias.index_fill_(0, self._ids(allowed), 0.0)
        if admission.sampling.logit_bias:
            ids, values = zip(*admission.sampling.logit_bias.items(), strict=True)
            bias[self._ids(ids)] += self._numbers(values, torch.float32)

    def _mute(self, slot: int, admission: Admission) -> None:
        ids = admission.stop_ids
        if len(ids) > self._stops.shape[1]:
            before, self._stops = self._stops, self._table(len(ids))
            self._stops[:, : before.shape[1]] = before
        self._stops[slot] = self._ids([*ids, *[NONE] * (self._stops.shape[1] - len(ids))])

    def _forbid(self, slot: int, admission: Admission) -> None:
        words = admission.bad_words
        _, most, width = self._words.shape
        if len(words) > most or max(map(len, words)) > width:
            before, recent = self._words, self._recent
            self._words = self._table(max(most, len(words)), max(width, *map(len, words)))
            self._words[:, :most, -width:] = before
            _, most, width = self._words.shape
            self._recent = self._table(width - 1)
            self._recent[:, width - 1 - recent.shape[1] :] = recent
        padded = [[NONE] * (width - len(word)) + list(word) for word in words]
        self._words[slot] = self._ids(padded + [[NONE] * width] * (most - len(words)))
        produced = [NONE] * (width - 1) + list(admission.history[admission.prompt :])
        self._recent[slot] = self._ids(produced[len(produced) - (width - 1) :])

    # The parts of a step's rows

    def _bias_rows(self, slots: Sequence[int]) -> Bias | None:
        rows = _among(slots, self._biased)
        if not rows or self._bias is None:
            return None
        at, where = self._rows_and_slots(rows, slots)
        return Bias(rows=at, slots=where, table=self._bias)

    def _muted_rows(self, slots: Sequence[int], positions: Sequence[int]) -> Muted | None:
        rows = [row for row in _among(slots, self._muted) if positions[row] < self._earliest_end[slots[row]]]
        if not rows:
            return None
        at, where = self._rows_and_slots(rows, slots)
        ids = self._stops[where]
        return Muted(rows=at, ids=torch.where(ids == NONE, ids[:, :1], ids))

    def _word_rows(self, slots: Sequence[int]) -> BadWords | None:
        rows = _among(slots, self._worded)
        if not rows:
            return None
        at, where = self._rows_and_slots(rows, slots)
        return BadWords(rows=at, slots=where, words=self._words[where], recent=self._recent[where])

    def _penalty_rows(self, slots: Sequence[int]) -> Penalties | None:
        rows = _among(slots, self._penalized)
        if not rows or self._counts is None:
            return None
        at, where = self._rows_and_slots(rows, slots)
        _, _, _, repetition, presence, frequency = _columns(self._floats, where)
        return Penalties(
            rows=at,
            slots=where,
            counts=self._counts,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _chance(self, those: Set[int], slots: Sequence[int], positions: Sequence[int]) -> Chance | None:
        rows = _among(slots, those)
        if not rows:
            return None
        lists = rows, [slots[row] for row in rows], [positions[row] for row in rows]
        at, where, position = sent(lists, self._device)
        temperature, top_p, min_p, *_ = _columns(self._floats, where)
        top_k, seed = _columns(self._wholes, where)
        return Chance(
            rows=at,
            seed=seed,
            position=position,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )

    def _ids(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return self._numbers(values, torch.int64)

    def _numbers(self, values: Sequence[float] | Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
        return placed(values, dtype, self._device)

    def _rows_and_slots(self, rows: Sequence[int], slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return rows of the step and their slots, int64 [s] each, in one copy."""
        first, second = sent([rows, [slots[row] for row in rows]], self._device)
        return first, second

    def _table(self, *shape: int) -> Tensor:
        return torch.full((self._slots, *shape), NONE, dtype=torch.int64, device=self._device)


def _columns(table: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Return the columns of a table [N, C] at rows int64 [s], each with its numbers side by side."""
    return table.T.index_select(1, rows).unbind(0)


def _among(slots: Sequence[int], those: Set[int]) -> list[int]:
    """Rows whose slot is among those."""
    return [row for row, slot in enumerate(slots) if slot in those] if those else []


@operation
def greedy(logits: Tensor, nothing: int) -> Tensor:
    """Return the token with the largest logit of each row [S, V], the smallest id among equals, int64 [S].

    A row that holds NaN or whose largest logit is +inf yields `CORRUPTED`, one of -inf alone `nothing`.
    """
    tokens = logits.argmax(-1)  # the first among equals, and the first NaN before all numbers
    largest = logits.gather(1, tokens[:, None])[:, 0]
    return torch.where(largest == -torch.inf, nothing, torch.where(largest.isfinite(), tokens, CORRUPTED))


@operation
def sample(logits: Tensor, rows: SampleRows) -> Tensor:
    """Return one token id per row, int64 [S]; logits [S, V].

    Each row goes through what it asks for, in vLLM's order: logit_bias and allowed_token_ids; what its grammar allows;
    min_tokens (what would end the request is forbidden); bad_words (of a row that they would leave nothing they forbid
    nothing); repetition, frequency and presence penalties. A greedy row then takes the largest logit, the smallest id
    among equals. The others: softmax at the temperature; tokens below min_p times the largest probability go; then all
    but the top_k, ties by token id; then the tail beyond top_p of what is left (the first token that crosses it stays);
    then the inverse of the cumulative distribution, along the ids, at u(seed, position).

    A row that holds NaN or whose largest logit is infinite yields `CORRUPTED`, one whose tokens are all forbidden
    `EXHAUSTED`; other rows do not notice.
    """
    adjusted = adjust(logits, rows)
    if adjusted is logits:
        likeliest = greedy(logits, CORRUPTED)
    else:
        likeliest = greedy(adjusted, EXHAUSTED)
        likeliest = torch.where(greedy(logits, CORRUPTED) == CORRUPTED, CORRUPTED, likeliest)
    if rows.whole is None and rows.narrow is None and rows.filtered is None:
        return likeliest
    tokens = likeliest.clone()
    if rows.whole is not None:
        tokens[rows.whole.rows] = draw_whole(adjusted, rows.whole)
    if rows.narrow is not None:
        tokens[rows.narrow.rows] = draw_narrow(adjusted, rows.narrow)
    if rows.filtered is not None:
        tokens[rows.filtered.rows] = draw_filtered(adjusted, rows.filtered)
    return torch.where(likeliest < 0, likeliest, tokens)


def adjust(logits: Tensor, rows: SampleRows) -> Tensor:
    """Return the logits after biases, bans and penalties, -inf for what is forbidden; `logits` if no row asks for any.

    Penalties leave -inf what it is: the order matters only to what is not forbidden.
    """
    if all(one is None for one in (rows.bias, rows.masked, rows.muted, rows.bad_words, rows.penalties)):
        return logits
    x = changed(logits, rows.bias, rows.masked, rows.penalties)
    if rows.muted is not None:
        nothing = x.new_full((), -torch.inf)  # to assign a number, torch would wait for the device
        x.index_put_((rows.muted.rows[:, None], rows.muted.ids), nothing)
    if rows.bad_words is not None:
        x[rows.bad_words.rows] = without(x[rows.bad_words.rows], rows.bad_words)
    return x


def _heat(x: Tensor, largest: Tensor, chance: Chance) -> Tensor:
    """Logits over temperature, 0 for the largest: no temperature overflows them."""
    return (x - largest) / chance.temperature[:, None].to(x.dtype)


@operation
def draw_whole(logits: Tensor, chance: Chance) -> Tensor:
    """Return a token for each of the chance's rows of logits [S, V], from the softmax at its temperature; int64 [s]."""
    x = logits[chance.rows].to(exact(logits))
    return _choose(torch.softmax(_heat(x, x.amax(-1, keepdim=True), chance), -1), chance)


@operation
def draw_narrow(logits: Tensor, chance: Chance) -> Tensor:
    """Return a token for each of the chance's rows of logits [S, V], of the `NARROW` likeliest, filtered; int64 [s]."""
    x = logits[chance.rows].to(exact(logits))
    tokens = likeliest(x, min(NARROW, x.shape[1]))
    ordered = x.gather(1, tokens)
    # In fp64: a GPU adds up few rows in another order than many, and no row's draw may depend on its batch.
    weight = torch.exp(_heat(ordered, ordered[:, :1], chance)).double()  # 1 for the likeliest
    rank = torch.arange(weight.shape[1], device=x.device)
    kept = weight >= chance.min_p[:, None]
    kept &= (rank < chance.top_k[:, None]) | (chance.top_k[:, None] == 0)
    weight = weight * kept
    probability = weight / weight.sum(-1, keepdim=True)
    before = probability.cumsum(-1) - probability
    probability = probability * ((before < chance.top_p[:, None]) | (rank == 0))
    tokens, order = tokens.sort(-1)
    return tokens.gather(1, _choose(probability.gather(1, order), chance)[:, None])[:, 0]


@operation
def draw_filtered(logits: Tensor, chance: Chance) -> Tensor:
    """Return a token for each of the chance's rows of logits [S, V], from all that filters leave; int64 [s].

    In whole numbers, as `nucleus` says, and along the ids: the order of the likeliest decides which tokens stay alone.
    """
    x = logits[chance.rows].to(exact(logits))
    weight = nucleus.weights(x, chance.temperature)
    left = nucleus.kept(weight, _ranked(x, x.shape[1]), chance.top_k, chance.top_p, chance.min_p)
    return nucleus.chosen(left, uniform(chance.seed, chance.position))


def _choose(probability: Tensor, chance: Chance) -> Tensor:
    """Return the index at which the cumulative distribution passes u(seed, position); never one of probability 0.

    Of what is no distribution (NaN) the index is one of the row all the same.
    """
    cumulative = probability.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    target = torch.minimum(uniform(chance.seed, chance.position)[:, None] * total, torch.nextafter(total, total * 0))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probability.shape[1] - 1)


@operation
def logprobs(logits: Tensor, tokens: Tensor, count: int) -> Logprobs:
    """Return the log-softmax of the logits [S, V] at the tokens int64 [S], their ranks, and the `count` likeliest.

    Rank 1 is the likeliest; among equals the smaller id comes first, so that a list does not depend on its length.
    """
    x = logits.to(exact(logits))
    # In fp64: torch adds up few rows in another order than many, and a request's list must not depend on its batch.
    norm = torch.cat([torch.logsumexp(some.double(), -1, keepdim=True) for some in torch.split(x, ROWS)]).to(x.dtype)
    chosen = x.gather(1, tokens[:, None])
    ids = torch.arange(x.shape[1], device=x.device)
    ahead = (x > chosen) | ((x == chosen) & (ids < tokens[:, None]))
    top = _largest(x, min(count, x.shape[1]))
    return Logprobs(
        logprob=(chosen - norm)[:, 0],
        rank=1 + ahead.sum(-1),
        top_ids=top,
        top_logprobs=x.gather(1, top) - norm,
    )


def warm(logits: Tensor) -> None:
    """Draw from logits [S, V] in every way that has a kernel, so that none is compiled within a request."""
    one = torch.zeros(1, dtype=torch.int64, device=logits.device)
    all_of_it = one.double() + 1
    chance = Chance(
        rows=one, seed=one, position=one, temperature=all_of_it, top_k=one + 1, top_p=all_of_it, min_p=all_of_it * 0
    )
    sample(logits, SampleRows(whole=chance))
    sample(logits, SampleRows(narrow=chance))
    sample(logits, SampleRows(filtered=chance))
    changed(logits, None, None, None)
    logprobs(logits, one.expand(logits.shape[0]), 1)


@operation
def likeliest(logits: Tensor, count: int) -> Tensor:
    """Return the ids of the largest logits [S, V], int64 [S, count], in order, the smaller id first among equals.

    count  at most `NARROW`, and V
    """
    return _ranked(logits, count)


def _largest(x: Tensor, count: int) -> Tensor:
    return likeliest(x, count) if count <= NARROW else _ranked(x, count)


def _ranked(x: Tensor, count: int) -> Tensor:
    """Ids of the largest entries in order.

    torch.topk promises no order of equals; the key of an fp32 number, a whole number that grows with it, leaves room
    for the id beside it.
    """
    if x.dtype == torch.float64 or count == x.shape[1]:
        return torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :count]
    bits = (x + 0.0).view(torch.int32)  # a copy; -0.0 becomes 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF  # of negative numbers the larger has the smaller bits
    behind = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    keys = torch.topk(bits.long().mul_(2**32).add_(behind), count).values
    return x.shape[1] - 1 - (keys & 0xFFFFFFFF)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Return u in [0, 1) fp64 from seed and position int64 [S]: splitmix64 of their combination, 53 bits of it.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), the mix function.
    """
    z = seed + (position + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15; int64 wraps
    z = (z ^ _shift(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ _shift(z, 31)
    return _shift(z, 11).double() * 2.0**-53


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)

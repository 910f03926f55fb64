"""Sampling: frequencies match the distribution; a row never depends on the others."""

import pytest
import torch

from omniserve.base.types import SamplingParams
from omniserve.ops.sample import SampleState, sample, uniform

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -8.0])


def draws(params: SamplingParams, count: int) -> torch.Tensor:
    state = SampleState(1, CPU)
    state.set(0, params, seed=7)
    rows = state.rows([0] * count, torch.arange(count))
    return sample(LOGITS.expand(count, -1), rows)


def distribution(params: SamplingParams) -> torch.Tensor:
    """The same filters, written as loops over a sorted list."""
    p = torch.softmax(LOGITS.double() / params.temperature, 0).tolist()
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
    return torch.tensor([p[t] / total if t in nucleus else 0.0 for t in range(len(p))])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.3),
        SamplingParams(temperature=1.5, top_k=5, top_p=0.8, min_p=0.1),
    ],
    ids=str,
)
def test_frequencies_match_the_distribution(params: SamplingParams) -> None:
    count = 20_000
    seen = torch.bincount(draws(params, count), minlength=len(LOGITS)).double()
    expected = distribution(params).double() * count
    assert seen[expected == 0].sum() == 0
    used = expected > 0
    chi_square = ((seen - expected)[used] ** 2 / expected[used]).sum()
    assert chi_square < 29.9  # the 0.9999 quantile for 7 degrees of freedom


def test_greedy_takes_the_first_of_equal_logits() -> None:
    state = SampleState(1, CPU)
    state.set(0, SamplingParams(temperature=0), seed=0)
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert sample(logits, state.rows([0], torch.tensor([5]))).tolist() == [1]


def test_rows_of_a_mixed_batch_draw_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 300, generator=generator, dtype=torch.float64)
    state = SampleState(6, CPU)
    kinds = [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.2}, {"temperature": 0.7}]
    for slot, kind in enumerate(kinds):
        state.set(slot, SamplingParams(**kind), seed=slot + 100)
    positions = torch.tensor([4, 9, 1, 77, 3, 12])
    together = sample(logits, state.rows(list(range(6)), positions))
    alone = [sample(logits[s : s + 1], state.rows([s], positions[s : s + 1])).item() for s in range(6)]
    assert together.tolist() == alone


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

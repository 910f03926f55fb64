"""Hadamard matrices, in integers."""

import pytest
import torch

from omniserve.base.errors import ConfigError
from omniserve.quantize.hadamard import hadamard, orthogonal

HIDDEN = (576, 768, 896, 960, 1024, 1152, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
"""Of SmolLM2, Qwen, Llama, Mistral, Yi."""
HEADS = (16, 32, 64, 80, 96, 112, 128, 256)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, *HEADS, *HIDDEN[:9]])
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert h is not None
    assert h.shape == (n, n)
    assert set(h.unique().tolist()) <= {-1, 1}
    exact = h.float()  # products of ±1 stay whole numbers below 2^24
    assert torch.equal(exact @ exact.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [n for n in HIDDEN if n > 2000])
def test_large_sizes_are_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert h is not None
    exact = h.float()
    rows = torch.cat([torch.arange(8), torch.randint(0, n, (24,), generator=torch.Generator().manual_seed(n))])
    assert torch.equal(exact[rows] @ exact.T, n * torch.eye(n)[rows])


@pytest.mark.parametrize(("size", "core"), [(11008, 5504), (14336, 28), (18944, 148), (28672, 28), (53248, 104)])
def test_feed_forward_sizes_have_a_core(size: int, core: int) -> None:
    """The construction doubles a core; that the core is orthogonal is enough, the whole would be gigabytes."""
    doublings = size // core
    assert core * doublings == size
    assert doublings & (doublings - 1) == 0
    h = hadamard(core)
    assert h is not None
    assert torch.equal(h[:16].float() @ h.float().T, core * torch.eye(core)[:16])


@pytest.mark.parametrize("n", [0, 3, 6, 18, 52, 92, 100])
def test_sizes_without_construction(n: int) -> None:
    assert hadamard(n) is None
    if n:
        with pytest.raises(ConfigError, match=f"size {n}"):
            orthogonal(n, "hadamard")
        r = orthogonal(n)
        assert torch.allclose(r @ r.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert torch.equal(r, orthogonal(n, "random"))


def test_orthogonal_is_the_same_every_time() -> None:
    first = orthogonal(52).clone()
    orthogonal.cache_clear()
    assert torch.equal(first, orthogonal(52))
    assert not torch.equal(first, orthogonal(52, seed=1))

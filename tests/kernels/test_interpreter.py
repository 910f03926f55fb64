"""The kernels' arithmetic on any machine: the parity cases of their operations, in Triton's interpreter."""

from collections import Counter

from tests.kernels.processes import python
from tests.parity.cases import CASES

SERVED = (
    "add_norm", "attend", "cut_rows", "draw_narrow", "draw_whole", "gemm_w16a16", "gemm_w4a8_blocks", "gemm_w8a8",
    "greedy", "keep_pages", "likeliest", "produced", "quantize", "rope_write", "select_pages", "swiglu", "window_pages",
)  # fmt: skip
"""Operations that have a kernel."""


def test_kernels_equal_references() -> None:
    """One process for all: its start takes longer than the cases. Tiles of a product agree to the last bit."""
    run = python("-m", "tests.kernels.check", interpret=True)
    lines = run.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == [], run.stderr
    assert run.returncode == 0, run.stderr
    done = Counter(line.removeprefix("ok ").split(":")[0] for line in lines)
    assert done == {f"{name}_triton": sum(1 for _ in CASES[name]()) for name in SERVED} | {
        "tiles": 3,
        "alone": 5,
        "runs": 3,
        "pairs": 3,
    }

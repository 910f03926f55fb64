"""The kernels' arithmetic on any machine: the parity cases of their operations, in Triton's interpreter."""

from collections import Counter
from importlib import import_module

import pytest

from omniserve.ops.dispatch import TABLE
from tests.kernels.processes import python
from tests.parity.cases import CASES

LAWS = {"tiles": 3, "alone": 5, "runs": 3, "pairs": 3, "widths": 3, "padded": 4}
"""Comparisons of a kernel with itself: how many there are."""
PARTS = (
    ("attend", "select_pages", "keep_pages", "widths"),
    ("rope_write", "select_tiles", "tiles", "padded"),
    (
        "add_norm", "changed", "cut_rows", "draw_filtered", "draw_narrow", "draw_whole", "gemm_w16a16",
        "gemm_w4a8_blocks", "gemm_w8a8", "greedy", "likeliest", "produced", "quantize", "swiglu", "window_pages",
        "alone", "runs", "pairs",
    ),
)  # fmt: skip
"""Operations that have a kernel, and laws, in parts of about the same time."""


@pytest.mark.parametrize("names", PARTS, ids=lambda names: names[0])
def test_kernels_equal_references(names: tuple[str, ...]) -> None:
    """One process for a part: its start takes longer than most cases. Tiles of a product agree to the last bit."""
    run = python("-m", "tests.kernels.check", *names, interpret=True)
    lines = run.stdout.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == [], run.stderr
    assert run.returncode == 0, run.stderr
    done = Counter(line.removeprefix("ok ").split(":")[0] for line in lines)
    operations = [name for name in names if name not in LAWS]
    assert done == {f"{name}_triton": sum(1 for _ in CASES[name]()) for name in operations} | {
        name: LAWS[name] for name in names if name in LAWS
    }


def test_no_kernel_is_left_out() -> None:
    import_module("omniserve.kernels")
    served = {name for name, one in TABLE.items() if any(of.device == "cuda" for of in one.implementations)}
    assert served == {name for names in PARTS for name in names} - set(LAWS)

"""The compile gate: what the kernels become on cards that are not there. It says nothing about speed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.processes import python

KERNELS = {
    "add_norm_kernel",
    "attend_kernel",
    "bound_kernel",
    "change_kernel",
    "choose_kernel",
    "combine_kernel",
    "dense_kernel",
    "draw_kernel",
    "cut_kernel",
    "few_kernel",
    "flash_gluon_kernel",
    "flash_kernel",
    "gather_kernel",
    "gemm_kernel",
    "hopper_kernel",
    "keep_kernel",
    "key_score_kernel",
    "level_kernel",
    "list_kernel",
    "maxima_kernel",
    "nucleus_kernel",
    "parts_kernel",
    "pick_kernel",
    "produced_kernel",
    "product",
    "quantize_kernel",
    "rope_write_kernel",
    "score_kernel",
    "share_kernel",
    "statistics_kernel",
    "sum_kernel",
    "swiglu_kernel",
    "swiglu_parts_kernel",
    "take_kernel",
    "top_kernel",
    "unit_kernel",
    "weigh_kernel",
    "window_kernel",
}
"""All kernels: each has at least one launch in the catalogue."""
HOPPER = {"bound_kernel", "few_kernel", "hopper_kernel", "flash_gluon_kernel", "product", "swiglu_parts_kernel"}
"""Kernels for compute capability 9.0 alone."""


def built(arch: int, which: str, cache: Path) -> list[dict[str, Any]]:
    run = python("-m", "tests.kernels.build", str(arch), which, interpret=False, cache=cache)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def wrong(found: list[dict[str, Any]]) -> list[str]:
    return [f"{one['name']} on {one['arch']}: {problem}" for one in found for problem in one["problems"]]


@pytest.mark.parametrize("arch", [80, 90])
def test_one_launch_of_every_kernel(arch: int, tmp_path: Path) -> None:
    """On 9.0; on 8.0 the product, whose instruction is another there."""
    found = built(arch, "first", tmp_path)
    assert {one["kernel"] for one in found} == (KERNELS if arch == 90 else {"gemm_kernel"})
    assert wrong(found) == []


@pytest.mark.long
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_every_launch(arch: int, tmp_path: Path) -> None:
    found = built(arch, "all", tmp_path)
    assert {one["kernel"] for one in found} == (KERNELS if arch == 90 else KERNELS - HOPPER)
    assert wrong(found) == []


GREEDY = """
import dataclasses
from omniserve.kernels.ahead import compile_spec
from omniserve.kernels.catalog import specs
spec = next(one for one in specs(80) if one.name.startswith("gemm g128 128x"))
tight = dataclasses.replace(spec, warps=4, matrix="wgmma", longest=10)
print(*compile_spec(tight).problems, sep="\\n")
"""


def test_the_gate_sees_spills_the_wrong_instruction_and_long_loops(tmp_path: Path) -> None:
    run = python("-c", GREEDY, interpret=False, cache=tmp_path)
    spills, instruction, loop = run.stdout.splitlines()
    assert spills.startswith("spills "), run.stderr
    assert "expected wgmma" in instruction
    assert "its budget is 10" in loop

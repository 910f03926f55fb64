"""The cases of `omniserve bench kernels` with the references on a CPU: all run, and agree with themselves."""

import pytest
import torch

from omniserve.bench.kernels.cases import Sizes, error
from omniserve.bench.kernels.limits import CARDS
from omniserve.bench.kernels.run import TOLERANCE, cases, spec_of, steps

SIZES = Sizes(
    spec=spec_of("tiny"),
    device=torch.device("cpu"),
    dtype=torch.float16,
    tokens=(1, 3),
    decode=((3, 70), (1, 9000)),
    prompts=((5, 70, None), (70, 70, None), (5, 70, 16)),
)
KINDS = (
    "decode", "prefill", "rope_write", "add_norm", "quantize", "swiglu", "sample greedy", "score_pages", "top_pages",
    "gemm", "gate_up_silu", "head",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_cases_run(kind: str) -> None:
    found = [case for case in cases(SIZES, [kind]) if case.kind == kind]
    assert found
    for case in found:
        built = case.build(1)
        assert len(built.calls) == 1
        assert built.check() < TOLERANCE, case.title
        assert case.work.microseconds(CARDS["NVIDIA H200"]) > 0


def test_titles_are_different() -> None:
    titles = [case.title for case in cases(SIZES, [])]
    assert len(set(titles)) == len(titles)
    assert {case.kind for case in cases(SIZES, [])} == set(KINDS)
    assert [case.title for case in cases(SIZES, ["kv4 3 x 70", "w8a8 out 3"])] == [
        "decode kv4 3 x 70",
        "gemm w8a8 out 3",
    ]


def test_peers_of_products_run() -> None:
    (case,) = cases(SIZES, ["gemm w8a8 qkv 3"])
    peers = case.build(1).peers
    assert list(peers) == ["16 bit", "fp8", "int8"]
    assert peers["16 bit"]()[0]().shape == (3, 128)
    assert case.build(3).calls[2]().shape == (3, 128)


def test_error_tells_wrong_results() -> None:
    x = torch.ones(10)
    assert error(x, x) == 0
    assert error(x * 1.5, x) == pytest.approx(0.5)
    assert error(torch.full((10,), float("nan")), x) == 1e9
    assert error((x, x * 2), (x, x)) == pytest.approx(0.5**0.5)


def test_a_step_is_the_sum_of_its_parts() -> None:
    rows = [
        {"kind": case.kind, "name": case.name, "size": case.size, "us": 3.0, "limit_us": 1.0, "ok": True}
        for case in cases(SIZES, [])
    ]
    made = steps(rows, layers=2)
    assert [(row["name"], row["size"]) for row in made] == [
        (f"{form} {kv}", size)
        for form, kv in (("w4a8-g128", "kv4"), ("w4a8-row", "kv4"), ("w8a8", "kv8"), ("w16a16", "kv16"))
        for size in ("3 x 70", "1 x 9000")
    ]
    # per layer four products, two norms, quantization, rotation, attention; head and sampling once
    assert made[0]["us"] == 3 * (2 * 9 + 2)
    assert made[-1]["us"] == 3 * (2 * 8 + 2)
    assert made[0]["share"] == pytest.approx(1 / 3)
    assert sum(made[0]["parts"].values()) == pytest.approx(1)
    assert steps([row for row in rows if row["kind"] != "head"], layers=2) == []

"""The cases of `omniserve bench kernels` with the references on a CPU: all run, and agree with themselves."""

import pytest
import torch

from omniserve.bench.kernels.cases import Sizes, error
from omniserve.bench.kernels.limits import CARDS
from omniserve.bench.kernels.run import TOLERANCE, cases, spec_of
from omniserve.bench.kernels.sums import sums

SIZES = Sizes(
    spec=spec_of("tiny"),
    device=torch.device("cpu"),
    dtype=torch.float16,
    tokens=(1, 3),
    decode=((3, 70), (1, 9000)),
    prompts=((5, 70, None), (70, 70, None), (5, 70, 16)),
)
KV = {"w4a8-g128": "kv4", "w4a8-row": "kv4", "w8a8": "kv8", "w16a16": "kv16"}
KINDS = (
    "decode", "prefill", "rope_write", "add_norm", "quantize", "swiglu", "sample", "select", "gemm", "gate_up_silu",
    "head",
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


def test_sums_are_those_of_their_parts() -> None:
    peers = {"fp8": {"us": 6.0, "ratio": 2.0}, "int8": {"problem": "no such kernel"}}
    rows = [
        {
            "kind": case.kind,
            "name": case.name,
            "size": case.size,
            "us": 3.0,
            "limit_us": 1.0,
            "ok": True,
            "peers": peers,
        }
        for case in cases(SIZES, [])
    ]
    made = {(row["kind"], row["name"], row["size"]): row for row in sums(rows, layers=2)}
    assert set(made) == {
        *(("four products", form, tokens) for form in KV for tokens in ("1", "3")),
        *(("step", f"{form} {kv}", size) for form, kv in KV.items() for size in ("3 x 70", "1 x 9000")),
    }
    products = made["four products", "w8a8", "3"]
    assert (products["us"], products["limit_us"], products["peers"]) == (12, 4, {"fp8": {"us": 24, "ratio": 2}})
    # per layer four products, two norms, quantization, rotation, attention; head and sampling once
    step = made["step", "w4a8-g128 kv4", "3 x 70"]
    assert step["us"] == 3 * (2 * 9 + 2)
    assert step["share"] == pytest.approx(1 / 3)
    assert sum(step["parts"].values()) == pytest.approx(1)
    assert made["step", "w16a16 kv16", "1 x 9000"]["us"] == 3 * (2 * 8 + 2)
    kinds = {row["kind"] for row in sums([row for row in rows if row["kind"] != "head"], layers=2)}
    assert kinds == {"four products"}

"""The cases of `omniserve bench kernels` with the references on a CPU: all run, and agree with themselves."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from omniserve.bench.kernels import milestones, prompts
from omniserve.bench.kernels import run as kernels_run
from omniserve.bench.kernels.cases import Built, Case, Sizes, against_rows, error
from omniserve.bench.kernels.limits import CARDS, Work
from omniserve.bench.kernels.pages import other_pages
from omniserve.bench.kernels.run import TOLERANCE, cases, run, spec_of
from omniserve.bench.kernels.sums import sums
from omniserve.ops.act import Act, ActFormat, Int8, quantize

SIZES = Sizes(
    spec=spec_of("tiny"),
    device=torch.device("cpu"),
    dtype=torch.float16,
    tokens=(1, 3),
    decode=((3, 70), (1, 9000)),
    prompts=((5, 70, None), (70, 70, None), (5, 70, 16)),
    wholes=(200,),
)
KV = {"w4a8-g128": "kv4", "w4a8-row": "kv4", "w8a8": "kv8", "w16a16": "kv16"}
KINDS = (
    "decode", "prefill", "whole prompt", "rope_write", "add_norm", "quantize", "swiglu", "sample", "select", "gemm",
    "four products", "gate_up_silu", "head",
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
        "gemm w8a8 out 3",
        "decode kv4 3 x 70",
    ]


def test_peers_of_products_run() -> None:
    (case,) = cases(SIZES, ["gemm w8a8 qkv 3"])
    peers = case.build(1).peers
    assert list(peers) == ["16 bit", "fp8", "int8"]
    assert peers["16 bit"]()[0]().shape == (3, 128)
    assert case.build(3).calls[2]().shape == (3, 128)
    (four,) = cases(SIZES, ["four products w4a8-row 3"])
    built = four.build(2)
    assert len(built.calls) == 2
    assert [len(built.peers[name]()) for name in ("16 bit", "int8")] == [2, 2]
    for call in built.peers["16 bit"]():
        call()


def test_peers_of_attention_run() -> None:
    for title in ("decode kv4 3 x 70", "prefill kv4 5 of 70", "prefill kv4 70 of 70"):
        case = next(case for case in cases(SIZES, [title]))
        peers = case.build(1).peers
        assert list(peers) == ["torch", "cudnn"]
        for call in peers["torch"]()[:1]:
            call()
    assert not next(case for case in cases(SIZES, ["prefill kv4 window"])).build(1).peers


def test_error_tells_wrong_results() -> None:
    x = torch.ones(10)
    assert error(x, x) == 0
    assert error(x * 1.5, x) == pytest.approx(0.5)
    assert error(torch.full((10,), float("nan")), x) == 1e9
    assert error((x, x * 2), (x, x)) == pytest.approx(0.5**0.5)


def rows_of(found: Iterable[Case], **more: Any) -> list[dict[str, Any]]:
    named = ({"kind": case.kind, "name": case.name, "size": case.size} for case in found)
    return [{**one, "us": 3.0, "limit_us": 1.0, "share": 1 / 3, "ok": True, **more} for one in named]


def test_sums_are_those_of_their_parts() -> None:
    rows = rows_of(cases(SIZES, []))
    made = {(row["name"], row["size"]): row for row in sums(rows, layers=2)}
    dense = {(f"{form} {kv}", size) for form, kv in KV.items() for size in ("3 x 70", "1 x 9000")}
    chosen = {"w4a8-g128 kv4": ("keys", "bounds"), "w4a8-row kv4": ("keys", "bounds"), "w8a8 kv8": ("keys",)}
    sparse = {(f"{name} lserve, {by}", "1 x 9000") for name, every in chosen.items() for by in every}
    assert set(made) == dense | sparse
    # per layer four products, two norms, quantization, rotation, attention; head and sampling once
    step = made["w4a8-g128 kv4", "3 x 70"]
    assert step["us"] == 3 * (2 * 9 + 2)
    assert step["share"] == pytest.approx(1 / 3)
    assert sum(step["parts"].values()) == pytest.approx(1)
    assert made["w16a16 kv16", "1 x 9000"]["us"] == 3 * (2 * 8 + 2)
    sparse_step = made["w8a8 kv8 lserve, keys", "1 x 9000"]
    assert sparse_step["us"] == 3 * (2 * 9 + 2 + 2 / 4)
    assert sparse_step["parts"]["select keys kv8"] == pytest.approx(0.5 / 20.5)
    assert not sums([row for row in rows if row["kind"] != "head"], layers=2)


def test_a_case_that_raises_is_a_row_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(found: float) -> Any:
        return lambda copies: Built(calls=[lambda: None], check=lambda: found)

    def broken(copies: int | None) -> Built:
        raise ValueError("no such tile")

    todo = [
        Case(kind="k", name=name, size="1", work=Work(bytes=4.3e6), build=build)
        for name, build in {"broken": broken, "wrong": built(0.5), "right": built(0.0)}.items()
    ]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels_run, "microseconds", lambda calls, replays: 2.0)
    rows: list[dict[str, Any]] = []
    left = deque(todo)
    run(left, replays=3, peers=True, on_row=rows.append)
    assert not left
    assert [(row["name"], row["ok"], row.get("us")) for row in rows] == [
        ("broken", False, None), ("wrong", False, 2.0), ("right", True, 2.0)
    ]  # fmt: skip
    assert rows[0]["problem"] == "ValueError: no such tile"
    assert rows[2]["share"] == pytest.approx(0.5)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    rows.clear()
    left = deque(todo)
    run(left, replays=3, peers=True, on_row=rows.append)
    assert len(left) == 2
    assert [row["name"] for row in rows] == ["broken"]


def test_some_rows_of_a_product_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniserve.bench.kernels.cases.CHECKED_ROWS", 3)
    act = quantize(torch.randn(9, 8), ActFormat.INT8_SUM)
    assert isinstance(act, Int8)
    seen: list[int] = []

    def product(of: Act, spoilt: int | None = None) -> torch.Tensor:
        assert isinstance(of, Int8)
        assert of.sum is not None
        seen.append(len(of.codes))
        made = of.codes.float() * of.scale + of.sum
        if spoilt is not None and len(made) == 9:
            made[spoilt] = 0
        return made

    assert against_rows(product, act)() == 0
    assert seen == [9, 3]
    for row in (0, 4, 8):
        assert against_rows(lambda of, row=row: product(of, row), act)() > 0  # type: ignore[misc]  # a lambda's default


def test_a_chunk_is_compared_at_its_ends_and_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "CHECKED", 4)
    prompt = prompts._Prompt("kv8", 150, (None, 16), SIZES)
    positions = range(100, 150)
    q, out = prompts._queries(50, SIZES)
    found = prompt.call(q, positions, out)().clone()
    assert prompt.error(q, positions, found) < TOLERANCE
    for place in (0, 24, 49):
        spoilt = found.clone()
        spoilt[place] += 1
        assert prompt.error(q, positions, spoilt) > 0.1


def test_other_pages_than_the_reference_chose() -> None:
    index = torch.arange(8).int().view(1, 2, 4)
    lists = index + 100, index, torch.tensor([4])
    assert other_pages(lists, lists) == 0
    swapped = index.clone()
    swapped[0, 1, 3] = 9
    assert other_pages((swapped + 100, swapped, lists[2]), lists) == pytest.approx(1 / 8)
    assert other_pages((swapped + 100, index, lists[2]), lists) == pytest.approx(1 / 8)
    assert other_pages((*lists[:2], torch.tensor([3])), lists) == 1


def test_milestones_judge_rows() -> None:
    def row(kind: str, name: str, size: str, **more: Any) -> dict[str, Any]:
        return {"kind": kind, "name": name, "size": size, "us": 10.0, "share": 0.7, "ok": True, **more}

    rows = [
        row("four products", "w4a8-row", "64", peers={"fp8": {"us": 16.0, "ratio": 1.6}, "int8": {"problem": "none"}}),
        row("four products", "w4a8-row", "2048"),
        row("four products", "w4a8-row", "512"),
        row("four products", "w8a8", "8192", ok=False),
        row("decode", "kv16", "8 x 8192", us=25.0),
        row("decode", "kv4", "8 x 8192"),
        row("decode", "kv4", "1 x 1024", share=0.1),
        row("decode", "kv4 lserve", "1 x 262144"),
        row("prefill", "kv4", "8192 of 32768"),
        row("prefill", "kv4 window 256", "8192 of 32768"),
        row("whole prompt", "kv4", "65536", us=18.0),
        row("whole prompt", "kv4 half window 256", "65536"),
        row("whole prompt", "kv4 half window 8192", "65536", us=12.0),
        row("whole prompt", "kv4", "98304", us=15.0),
        row("whole prompt", "kv4 half window 256", "98304"),
        row("whole prompt", "kv4 half window 256", "131072"),
        row("select", "bounds", "1 x 262144"),
        row("select", "keys kv4", "1 x 262144", us=15.5),
        row("select", "bounds", "8 x 262144"),
        row("step", "w4a8-row kv4 lserve, keys", "1 x 262144", parts={"select keys kv4": 0.05}),
    ]
    found = [(one["title"], one["size"], one["found"], one["met"]) for one in milestones.judged(rows)]
    assert found == [
        ("W4A8 channel", "64", 0.7, True),
        ("W4A8 channel", "2048", 0.7, False),
        ("W8A8", "8192", 0.7, False),
        ("decode kv16", "8 x 8192", 0.7, False),
        ("decode kv4", "8 x 8192", 0.7, True),
        ("dense prefill", "8192 of 32768", 0.7, False),
        ("streaming 256", "65536", 1.8, True),
        ("streaming 256", "98304", 1.5, False),
        ("streaming 256", "131072", None, False),
        ("select bounds", "1 x 262144", 10.0, True),
        ("select keys", "1 x 262144", 15.5, False),
    ]
    by_title = {one["title"]: one for one in milestones.judged(rows)}
    assert by_title["W4A8 channel"]["peers"] == {}  # of 2,048 tokens, the last one
    assert next(milestones.judged(rows))["peers"] == {"fp8": 1.6}
    assert by_title["decode kv4"]["peers"] == {"kv16": 2.5}
    assert [by_title[f"select {name}"]["step"] for name in ("bounds", "keys")] == [None, 0.05]


def test_the_suite_holds_every_milestone_and_a_whole_step() -> None:
    wanted = kernels_run.Wanted(spec=spec_of(milestones.SHAPE), dtype="float16", tokens=milestones.TOKENS, suite=True)
    rows = rows_of(cases(kernels_run.gpu_sizes(wanted), [], suite=True))
    judged = list(milestones.judged(rows + sums(rows, 32)))
    assert {one["title"] for one in judged} == {one.title for one in milestones.MILESTONES}
    for milestone in milestones.MILESTONES:
        assert any(milestone.covers(row["kind"], row["name"], row["size"]) for row in rows), milestone
    assert [one["step"] is not None for one in judged if one["title"].startswith("select")] == [True, True]
    assert len(rows) < 80

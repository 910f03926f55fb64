"""Benchmarks of a model: one timed run for each repeat, rows that are kept, suites that go on, comparison, pictures."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omniserve import LLM, SamplingParams
from omniserve.base.errors import CapacityError, ConfigError
from omniserve.bench.kernels import milestones
from omniserve.bench.kernels import run as kernels_run
from omniserve.bench.kernels.cases import Sizes
from omniserve.bench.results import Results, ratio, read_rows
from omniserve.bench.throughput import WARM_UP, engine_runner, measure, random_prompts
from omniserve.cli import cases, speed
from tests.cli.commands import Ran, check_refusal

Run = Callable[..., Ran]
TINY = ("--dummy-weights", "--shape", "tiny")
QSERVE = ("bench", "throughput", "--suite", "qserve", "--input-len", "8", "--output-len", "4", "--repeats", "1")
LATENCY = ("bench", "latency", "--output-len", "3", "--repeats", "1")
PNG = b"\x89PNG"


def done(ran: Ran) -> Ran:
    assert ran.code == 0, ran
    return ran


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in read_rows(path)]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(None, load_format="dummy", shape="tiny", enable_prefix_caching=False, max_num_batched_tokens=64)


def test_one_timed_run_for_each_repeat(llm: LLM) -> None:
    runner, asked = engine_runner(llm), []

    def counted(prompts: Any, count: int) -> Any:
        asked.append((len(prompts), len(prompts[0]), count))
        return runner(prompts, count)

    prompts = random_prompts(4, 100, llm.spec.vocab, seed=0)
    (speed_,) = measure([counted], prompts, 12, repeats=2, step_tokens=64)
    assert asked == [(4, 32, WARM_UP), (1, 100, 2), (4, 100, 12), (4, 100, 12)]
    assert [len(tokens) for tokens in speed_.tokens] == [12] * 4
    assert 0 < speed_.first_seconds <= speed_.prompt_seconds < speed_.total_seconds
    # four prompts of 100 tokens in steps of 64: the first ones produce while the last ones are read
    assert 4 < speed_.late < 4 * 11
    rate = speed_.decode_tokens_per_second
    assert rate == speed_.late / (speed_.total_seconds - speed_.prompt_seconds)


def test_tokens_without_text_and_when_they_came(llm: LLM) -> None:
    prompts = random_prompts(3, 8, llm.spec.vocab, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
    bare = [output.outputs[0] for output in llm.generate(prompts, params)]
    full = [output.outputs[0] for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=5))]
    assert [output.token_ids for output in bare] == [output.token_ids for output in full]
    assert {output.text for output in bare} == {""}
    for output in (*bare, *full):
        assert len(output.times) == len(output.token_ids)
        assert list(output.times) == sorted(set(output.times))


def test_a_suite_runs_one_model_and_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "QSERVE", ("tiny", "llama-2-7b"))
    loaded: list[tuple[str | None, str]] = []
    load = cases.load

    def recorded(model: str | None, options: Any, **rest: Any) -> LLM:
        loaded.append((options.shape, options.precision))
        if options.shape != "tiny":
            raise CapacityError("weights of 3.6 GB: the device has 1.0 GB")
        return load(model, options, **rest)

    monkeypatch.setattr(cases, "load", recorded)
    path = tmp_path / "bench-qserve.json"
    found = json.loads(done(run(*QSERVE, "--batch", "2", "--shape", "tiny", "--json")).out)
    assert [(row["model"], row["batch"], row["status"]) for row in found["rows"]] == [
        ("tiny (dummy weights)", 2, "measured")
    ]
    first = rows_in(path)
    assert first[0]["configuration"]["precision"]["kv"] == "kv4"
    assert not first[0]["configuration"]["cache"]["prefix_caching"]
    assert first[0]["machine"]["versions"]["torch"]

    ran = done(run(*QSERVE, "--batch", "2,1", "--plot", "p.png"))
    assert loaded == [("tiny", "w4a8kv4")] * 2
    assert [row["batch"] for row in rows_in(path)] == [2, 1]
    assert rows_in(path)[0] == first[0]
    assert "2 of 4 rows were not run" in ran.err
    assert ran.out.count("not run") == 2
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)

    ran = done(run(*QSERVE, "--batch", "2,1"))
    assert loaded[2:] == [("llama-2-7b", "w4a8kv4")]
    assert ran.out.count("does not fit") == 2
    assert "not run" not in ran.err
    ran = done(run(*QSERVE, "--batch", "2,1", "--compare", str(path)))
    assert len(loaded) == 3
    assert "against" in ran.out


def test_what_does_not_fit_alone_is_a_refusal(run: Run, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def full(*_: Any, **__: Any) -> LLM:
        raise CapacityError("it does not fit")

    monkeypatch.setattr(cases, "load", full)
    check_refusal(run("bench", "throughput", tiny, "--batch", "1"), "it does not fit")


def test_latency(run: Run, tmp_path: Path, tiny: Path) -> None:
    flags = (*LATENCY, tiny, "--input-len", "20,70", "--results", "r.json")
    found = json.loads(done(run(*flags, "--json", "--plot", "p.png")).out)
    assert [(row["context"], row["mode"], row["tokens"]) for row in found["rows"]] == [
        (20, "dense", 3),
        (70, "dense", 3),
    ]
    for row in found["rows"]:
        assert row["first_token_seconds"] > 0
        assert 0 < row["token_ms"] <= row["token_p99_ms"]
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    again = done(run(*flags, "--compare", "r.json"))
    assert again.out.count("   1") >= 4
    assert rows_in(tmp_path / "r.json") == [
        {name: value for name, value in row.items() if "against" not in name} for row in found["rows"]
    ]


def test_the_suite_of_contexts(run: Run, tmp_path: Path) -> None:
    done(run(*LATENCY, "--suite", "lserve", "--shape", "tiny", "--input-len", "200"))
    rows = rows_in(tmp_path / "bench-lserve.json")
    assert [(row["precision"], row["mode"]) for row in rows] == [
        *(("w4a8kv4 g128", mode) for mode in ("dense", "static", "static-256", "lserve", "lserve+prefill")),
        ("w8a8kv8", "dense"),
        ("w16a16kv16", "dense"),
    ]
    sparsity = {row["mode"]: row["configuration"]["sparsity"] for row in rows}
    assert (sparsity["static"]["streaming"], sparsity["static"]["budget"]) == (0.5, None)
    assert sparsity["static-256"]["prefill_local"] == 256
    assert sparsity["lserve+prefill"]["prefill_budget"] == 16384


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is played by the CPU: references at tiny sizes, ten microseconds each."""
    from omniserve.cli import kernels as command

    sizes = Sizes(
        spec=kernels_run.spec_of("tiny"),
        device=torch.device("cpu"),
        dtype=torch.float16,
        tokens=(2,),
        decode=((2, 70),),
        prompts=((5, 70, None),),
    )
    monkeypatch.setattr(command, "_need_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr("omniserve.bench.kernels.cases.COLD", 1.0)
    monkeypatch.setattr(kernels_run, "gpu_sizes", lambda wanted: sizes)
    monkeypatch.setattr(kernels_run, "microseconds", lambda calls, replays: 10.0)


KERNELS = ("bench", "kernels", "--tokens", "2", "--jobs", "1", "--results", "k.json")


@pytest.mark.usefixtures("card")
def test_kernels(run: Run, tmp_path: Path, tiny: Path) -> None:
    found = json.loads(done(run(*KERNELS, "--json", "--plot", "p.png")).out)
    rows = {(row["kind"], row["name"]): row for row in found["rows"]}
    product = rows["gemm", "w4a8-g128 qkv"]
    assert (product["us"], product["ok"], product["share"]) == (10.0, True, product["limit_us"] / 10)
    assert product["peers"]["16 bit"] == {"us": 10.0, "ratio": 1.0}
    assert rows["step", "w4a8-g128 kv4"]["us"] == 10 * (32 * 9 + 2)
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)
    again = done(run(*KERNELS, "--compare", "k.json", "--only", "decode kv4"))
    assert "decode kv4" in again.out
    measured = json.loads(done(run("bench", "kernels", tiny, "--only", "add_norm", "--jobs", "1", "--json")).out)
    assert [(row["model"], row["kind"]) for row in measured["rows"]] == [(str(tiny), "add_norm")]
    assert "against" in again.out
    check_refusal(run("bench", "kernels", "--only", "nothing", "--jobs", "1"), "--only nothing")


@pytest.mark.usefixtures("card")
def test_a_wrong_kernel_fails_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniserve.bench.kernels.run.TOLERANCE", -1.0)
    ran = run("bench", "kernels", "--only", "quantize", "--jobs", "1")
    assert ran.code == 4
    assert "quantize int8+sum 2: the result is off by 0" in ran.err


@pytest.fixture
def small_targets(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Milestones for lengths that a CPU does in a second."""
    sizes = Sizes(
        spec=kernels_run.spec_of("tiny"),
        device=torch.device("cpu"),
        dtype=torch.float16,
        tokens=(1, 128),
        decode=((1, 9000),),
        prompts=((5, 70, None),),
        wholes=(200,),
    )
    monkeypatch.setattr(kernels_run, "gpu_sizes", lambda wanted: sizes)
    every = [replace(one, sizes=(0.0, float("inf"))) for one in milestones.MILESTONES]
    monkeypatch.setattr(milestones, "MILESTONES", every[:2] + every[7:])
    monkeypatch.setattr(milestones, "STEP_SIZE", "1 x 9000")


@pytest.mark.usefixtures("small_targets")
def test_targets(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[int] = []

    def stopped(calls: Sequence[Any], replays: int) -> float:
        if len(took) == 5:
            raise KeyboardInterrupt
        took.append(len(calls))
        return 10.0

    targets = ("bench", "kernels", "--suite", "targets", "--jobs", "1", "--no-peers")
    monkeypatch.setattr(kernels_run, "microseconds", stopped)
    assert run(*targets).code == 130
    path = tmp_path / "bench-targets.json"
    assert len(rows_in(path)) == 5
    monkeypatch.setattr(kernels_run, "microseconds", lambda calls, replays: took.append(len(calls)) or 10.0)
    ran = done(run(*targets, "--json"))
    found = json.loads(ran.out)
    assert len(took) == len(rows_in(path))
    assert {row["machine"]["versions"]["torch"] for row in rows_in(path)} == {torch.__version__}
    judged = {(one["title"], one["size"]): one for one in found["milestones"]}
    assert {title for title, _ in judged} == {one.title for one in milestones.MILESTONES}
    assert judged["W4A8 channel", "128"]["met"] is False
    assert judged["streaming 256", "200"]["found"] == 1.0
    selector = judged["select bounds", "1 x 9000"]
    assert (selector["found"], selector["met"]) == (10.0, True)
    # 32 layers: four products, two norms, quantization, rotation, attention, a quarter of the choice; head, sampling
    assert selector["step"] == pytest.approx(8 / (32 * 9 + 2 + 8))
    again = done(run(*targets))
    assert len(took) == len(rows_in(path))
    assert "milestones met" in again.out
    assert " 15 us" in again.out


@pytest.mark.usefixtures("small_targets")
def test_a_wrong_milestone_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniserve.bench.kernels.run.TOLERANCE", -1.0)
    ran = run("bench", "kernels", "--suite", "targets", "--jobs", "1", "--no-peers", "--only", "select bounds")
    assert ran.code == 4
    assert "WRONG" in ran.out
    assert "select bounds 1 x 9000: the result is off by" in ran.err


def test_results_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results = Results(path, ("a", "b"))
    results.add({"a": 1, "b": "x", "value": 2.0})
    results.add({"a": 1, "b": "y", "value": 3.0})
    results.add({"a": 1, "b": "x", "value": 4.0})
    again = Results(path, ("a", "b"))
    assert list(again) == [{"a": 1, "b": "x", "value": 4.0}, {"a": 1, "b": "y", "value": 3.0}]
    assert again.find({"a": 1, "b": "y"}) == {"a": 1, "b": "y", "value": 3.0}
    assert again.find({"a": 2, "b": "y"}) is None
    others = read_rows(path)
    assert ratio({"a": 1, "b": "y", "value": 6.0}, others, ("a", "b"), "value") == 2
    assert ratio({"a": 2, "b": "y", "value": 6.0}, others, ("a", "b"), "value") is None
    with pytest.raises(ConfigError, match="there is no folder"):
        Results(tmp_path / "nowhere" / "r.json", ("a",))


BAD = {
    "no file": ("nowhere.json", None, "no such file of results"),
    "no JSON": ("r.json", "{", "is no JSON"),
    "no rows": ("r.json", '{"rows": 3}', "holds no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_results(case: str, run: Run, tmp_path: Path, tiny: Path) -> None:
    name, text, words = BAD[case]
    if text is not None:
        (tmp_path / name).write_text(text)
    check_refusal(run("bench", "throughput", tiny, "--compare", name), name, words)


REFUSED = {
    "suite and model": (["throughput", "m", "--suite", "qserve"], ["instead of the model"]),
    "unknown suite": (["throughput", "--suite", "vllm"], ["vllm", "qserve"]),
    "peer and results": (["throughput", "m", "--peer", "transformers", "--results", "r.json"], ["--peer transformers"]),
    "plot": (["throughput", "m", "--plot", "p.jpg"], ["--plot p.jpg", ".png"]),
    "no GPU": (["kernels"], ["bench kernels measures kernels on an NVIDIA GPU: this torch", "CUDA"]),
    "a model's shape": (["kernels", "--shape", "tiny"], ["--shape tiny", "llama-3-8b"]),
    "model and shape": (["kernels", "m", "--shape", "llama-3-8b"], ["instead of MODEL"]),
    "replays": (["kernels", "--replays", "0"], ["--replays 0"]),
    "counts": (["kernels", "--tokens", "0,1"], ["--tokens 0"]),
    "suite of another model": (["kernels", "m", "--suite", "targets"], ["MODEL m", "--suite targets", "leave it out"]),
    "suite of other sizes": (["kernels", "--tokens", "1", "--suite", "targets"], ["--tokens 1", "leave it out"]),
    "no model": (["latency"], ["MODEL is missing"]),
    "length": (["latency", "m", "--input-len", "0"], ["--input-len=0"]),
    "tokens": (["latency", "m", "--output-len", "0"], ["--output-len=0"]),
    "sparse suite": (["latency", "--suite", "lserve", "--sparsity", "dynamic"], ["--sparsity dynamic", "leave it out"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, run: Run, tmp_path: Path) -> None:
    flags, words = REFUSED[case]
    check_refusal(run("bench", *flags), *words)
    assert list(tmp_path.iterdir()) == []

"""omniserve/cli/doctor.py: what runs here and why, and where each setting comes from."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omniserve.cli import machine
from omniserve.ops import integer
from tests.cli.commands import Ran

Run = Callable[..., Ran]


def report(run: Run, *flags: object) -> dict[str, Any]:
    ran = run("doctor", "--json", *flags)
    assert ran.code == 0, ran
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_every_operation_has_a_reason(run: Run) -> None:
    found = report(run)
    served = found["implementations"]["cpu"]
    assert {"add_norm", "attend", "rope_write", "int_matmul", "sample"} <= set(served)
    for one in served.values():
        assert (one["name"] == "reference") == (
            one["why"] == "nothing faster is there for cpu" or "failed" in one["why"]
        )
    assert found["int8"]["exact"] is integer.int_mm_is_exact()
    assert served["int_matmul"]["name"] == ("int_matmul_vnni" if found["int8"]["exact"] else "reference")
    text = run("doctor").out
    assert "int8        self-test of torch._int_mm " in text
    assert all(one["why"] in text for one in served.values())


def test_kernels_are_listed_where_there_is_no_gpu(run: Run) -> None:
    found = report(run)
    assert found["gpus"] == []
    assert found["kernels"]["problem"] is None
    assert found["kernels"]["operations"]["attend"] == "attend_triton"
    text = run("doctor").out
    assert "would serve on an NVIDIA GPU of compute capability 8.0 or newer; none is here:" in text
    assert all(kernel in text for kernel in found["kernels"]["operations"].values())


def test_a_gpu_that_serves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as the driver and torch would tell it; the kernels are those that are here."""
    told = {"built_for": "13.0", "problem": None, "device": "NVIDIA H200", "capability": 9.0, "processors": 132}
    told |= {"tables": ["nvidia-h200"], "cache": {"folder": "/cache", "bytes": 2048}}
    smi = dict(zip(machine.GPU, ("NVIDIA H200", "9.0", "580.1", "143771 MiB", "143000 MiB"), strict=True))
    monkeypatch.setattr(machine, "cuda", lambda: told)
    monkeypatch.setattr(machine, "gpus", lambda: [smi])
    found = report(run)
    assert found["cuda"] == told
    served = found["implementations"]["cuda"]
    assert served["sample"] == {"name": "reference", "why": "nothing faster is there for cuda"}
    assert served["attend"]["why"].startswith("attend_triton needs an NVIDIA GPU of compute capability 8.0")
    text = run("doctor").out
    for words in (
        "gpu         NVIDIA H200, compute capability 9.0, driver 580.1, 143771 MiB, 143000 MiB free",
        "torch built for CUDA 13.0; NVIDIA H200, 132 multiprocessors",
        "products are cut as measured on nvidia-h200",
        "compiled kernels in /cache, 2.0 KiB",
        "operations  on cuda:",
    ):
        assert words in text


def test_why_no_gpu_serves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cuda        no GPU found: this torch" in run("doctor").out
    smi = dict(zip(machine.GPU, ("Old", "7.0", "1", "2 MiB", "1 MiB"), strict=True))
    monkeypatch.setattr(machine, "gpus", lambda: [smi])
    assert "cuda        not used: this torch" in run("doctor").out


def test_missing_triton_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU build of torch: the sentence stands in the report, and the report is whole."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("omniserve.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    assert "kernels     the GPU kernels need Triton" in run("doctor").out


def test_a_failed_self_test_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def int_mm_is_exact() -> bool:
        return False

    old = integer.int_matmul.implementations[0]
    new = type(old)(old.name, old.function, old.device, int_mm_is_exact, old.rank)
    monkeypatch.setattr(integer.int_matmul, "implementations", [new])
    monkeypatch.setattr(integer, "int_mm_is_exact", int_mm_is_exact)
    found = report(run)
    assert found["int8"]["exact"] is False
    assert found["implementations"]["cpu"]["int_matmul"] == {
        "name": "reference",
        "why": "int_matmul_vnni failed its self-test int_mm_is_exact",
    }
    assert "FAILED: sums saturate, so exact fp32 sums are used instead" in run("doctor").out


def test_references_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_BACKEND", "reference")
    served = report(run)["implementations"]["cpu"]
    assert {tuple(one.values()) for one in served.values()} == {("reference", "backend=reference asks for it")}


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("fpu avx2 avx512f avx512_vnni amx_tile amx_int8 sse4_2", {"VNNI": True, "AMX": True}),
        ("fpu avx2 avx_vnni", {"VNNI": True, "AMX": False}),
        ("fpu avx2 fma", {"VNNI": False, "AMX": False}),
        ("fp asimd asimddp", {"NEON dot product": True}),
        ("fp asimd", {"NEON dot product": False}),
    ],
)
def test_int8_instructions(flags: str, has: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", lambda key: flags)
    assert machine.int8_instructions() == has


def test_merged_settings_and_their_origin(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is named even where it repeats the file's value or the default."""
    (tmp_path / "c.yaml").write_text("precision: w8a8kv4\nmax-model-len: 96\ndownload-dir: models\n")
    monkeypatch.setenv("OMNISERVE_MAX_MODEL_LEN", "96")
    monkeypatch.setenv("OMNISERVE_SEED", "0")
    found = report(run, "--config", "c.yaml")
    assert found["settings"]["max_model_len"] == {"value": 96, "origin": "OMNISERVE_MAX_MODEL_LEN"}
    assert found["settings"]["seed"] == {"value": 0, "origin": "OMNISERVE_SEED"}
    assert found["settings"]["precision"] == {"value": "w8a8kv4", "origin": "c.yaml"}
    assert found["settings"]["offline"] == {"value": False, "origin": "default"}
    assert "models" in found["disk_free_bytes"]
    assert "--precision w8a8kv4  (c.yaml)" in run("doctor", "--config", "c.yaml").out


def test_packages_and_places(run: Run) -> None:
    found = report(run)
    assert {"torch", "numpy", "huggingface-hub", "gguf"} <= set(found["packages"])
    assert len(found["disk_free_bytes"]) == 3
    assert found["torch_isa"]
    assert found["threads"] >= 1

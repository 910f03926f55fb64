"""omniserve/engine/device.py: where an engine runs, and what is told when it cannot."""

from dataclasses import replace

import pytest
import torch

from omniserve.base.config import Options, Precision
from omniserve.base.errors import CapacityError, ConfigError
from omniserve.base.spec import Device, ModelSpec
from omniserve.engine import device
from omniserve.engine.device import check_dtype, check_room, find_device, taken_bytes, weight_bytes, working_bytes
from omniserve.formats.dummy import CONFIGS
from omniserve.models.families import family

LLAMA: ModelSpec = family(CONFIGS["llama-3-8b"]).spec(CONFIGS["llama-3-8b"])
H200 = Device(kind="cuda", memory_bytes=120 << 30, capability=(9, 0), total_bytes=141 << 30)


def test_a_cpu_where_there_is_no_gpu() -> None:
    assert find_device(Options()).kind == "cpu"
    assert find_device(Options(device="cpu")).memory_bytes > 0
    with pytest.raises(ConfigError, match=r"device=cuda: .*; use --device cpu"):
        find_device(Options(device="cuda"))


def test_a_gpu_that_is_there_too_old_or_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no NVIDIA GPU, or its driver"):
        find_device(Options(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7\.5: the kernels need 8\.0 or newer"):
        find_device(Options(device="cuda"))
    assert find_device(Options()).kind == "cpu"


def test_weights_are_counted_before_they_load() -> None:
    """Llama-3-8B has 6.98 G numbers in its linears and 1.05 G in embedding and head."""
    four, eight = (weight_bytes(LLAMA, Precision.parse(word, -1), "float16", "w16") for word in ("w4a8kv4", "w8a8kv8"))
    sixteen = weight_bytes(LLAMA, Precision.parse("w16a16"), "float16", "w16")
    assert sixteen == pytest.approx(2 * 8.03e9, rel=0.01)
    assert eight - four == pytest.approx(6.98e9 / 2, rel=0.01)
    assert sixteen - eight == pytest.approx(6.98e9, rel=0.01)


def test_too_little_memory_names_what_would_fit() -> None:
    assert check_room(H200, LLAMA, Precision.parse("w16a16"), "float16", "w16") > 100 << 30
    small = replace(H200, memory_bytes=11 << 30, total_bytes=12 << 30)
    with pytest.raises(CapacityError, match=r"the weights take 15\.0 GiB at w16a16kv16 .* 11\.0 GiB .*--precision w"):
        check_room(small, LLAMA, Precision.parse("w16a16"), "float16", "w16")
    with pytest.raises(CapacityError, match="no precision would fit"):
        check_room(replace(small, memory_bytes=1 << 30), LLAMA, Precision.parse("w4a8kv4"), "float16", "w16")


def test_a_step_takes_more_with_more_tokens_and_sequences() -> None:
    take = working_bytes(LLAMA, "float16", 8192)
    assert take(8192, 256) < take(16384, 256) < take(16384, 1024) < 20 << 30
    assert take(8192, 1024) - take(8192, 256) >= 3 * 768 * LLAMA.vocab * 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_that_the_kernels_do_not_take(dtype: str) -> None:
    with pytest.raises(ConfigError, match=f"dtype={dtype}: the GPU's kernels take float16 or bfloat16"):
        check_dtype(Options(), H200, dtype)  # type: ignore[arg-type]  # from a parameter list
    check_dtype(Options(backend="reference"), H200, dtype)  # type: ignore[arg-type]  # from a parameter list


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_that_is_none(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpu_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 200))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=f"gpu_memory_utilization={share:g}: must be above 0 and at most 1"):
        find_device(Options(gpu_memory_utilization=share))
    found = find_device(Options(gpu_memory_utilization=0.75))
    assert (found.kind, found.memory_bytes, found.total_bytes) == ("cuda", 50, 200)  # 100 are used by others


def test_eight_bits_for_the_head_are_counted() -> None:
    more = weight_bytes(LLAMA, Precision.parse("w4a8kv4"), "float16", "w16")
    less = weight_bytes(LLAMA, Precision.parse("w4a8kv4"), "float16", "w8")
    assert more - less == pytest.approx(128256 * 4096, rel=0.01)


def test_memory_that_others_give_back_is_not_counted_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    free, held = [600], [100]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free[0], 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: held[0])
    taken = taken_bytes()
    free[0], held[0] = 300, 350
    assert taken() == 300, "CUDA takes memory beside torch's"
    free[0] = 900
    assert taken() == 250, "others gave 600 back, and torch holds 250 more"

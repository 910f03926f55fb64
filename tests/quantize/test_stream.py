"""The whole run: artefacts that describe themselves, streaming against the whole model, killed and resumed runs."""

import gc
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.quantize import export, spill, stages, stream
from omniserve.quantize.recipe import Recipe
from omniserve.quantize.stream import FOLDER, quantize
from tests.quantize.conftest import RECIPES, SHAPES, calibration, small
from tests.quantize.fakequant import decoded, read, served_logits
from tests.tiny import tiny_model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def run(model: Path, out: Path, recipe: Recipe | str = "w4a8kv4-g128") -> Path:
    recipe = small(recipe) if isinstance(recipe, str) else recipe
    quantize(open_checkpoint(model), recipe, out, calibration=calibration(model), files={"note.txt": b"x"})
    return out


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_family_is_quantized(name: str, recipe: str, tmp_path: Path) -> None:
    """The artefact, decoded by the formulas of its layout, is near the model; its own words describe it."""
    model = tiny_model(tmp_path / "model", **SHAPES[name])  # type: ignore[arg-type]
    out = run(model, tmp_path / "out", recipe)
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(7)).tolist()
    wanted = read(model, torch.float32).logits(ids)
    near = torch.corrcoef(torch.stack([wanted.flatten(), served_logits(out, ids).flatten()]))[0, 1]
    assert near > (0.99 if recipe.startswith("w8") else 0.85), float(near)
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block["weights"]["format"] == small(recipe).weights.format
    assert block["made_by"]["recipe"]["sha256"] == small(recipe).sha256
    assert block["made_by"]["calibration"]["sha256"] == calibration(model).sha256
    assert not (out / FOLDER).exists()
    report = json.loads((out / export.REPORT).read_text())
    assert len(report["layers"]) == 2
    for layer in report["layers"]:
        assert 0 < layer["output_error"] < 1
        assert all(0 <= [*steps.values()][-1] < 0.2 for steps in layer["linears"].values())


def test_two_runs_make_equal_bytes(tiny: Path, tmp_path: Path) -> None:
    first, second = run(tiny, tmp_path / "a"), run(tiny, tmp_path / "b")
    assert contents(first) == contents(second)


def test_nothing_but_what_is_asked_for_changes(tiny: Path, tmp_path: Path) -> None:
    """Without any pass the linears are rounded to nearest, and the rest is the model's own."""
    recipe = small("w8a8kv8").without(["rotate", "reorder", "keys", "smooth", "solve"])
    quantize(open_checkpoint(tiny), recipe, tmp_path / "out")
    given, made = open_checkpoint(tiny), decoded(tmp_path / "out")
    assert given.names() == made.keys()
    for name in given.names():
        wanted = given.tensor(name).double()
        limit = wanted.abs().max() / 127 if name.endswith("proj.weight") else wanted.abs().max() / 2000
        assert float((made[name] - wanted).abs().max()) <= limit, name


@pytest.mark.parametrize("range_", ["head", "tensor"])
def test_static_scales(range_: str, tiny: Path, tmp_path: Path) -> None:
    """They cover what the calibration text showed; the largest of a layer serves all heads, if one scale is asked."""
    recipe = small("w8a8kv8")
    out = run(tiny, tmp_path / "out", replace(recipe, kv=replace(recipe.kv, range=range_)))
    scale = decoded(out)["model.layers.0.self_attn.kv_scale"]
    assert scale.shape == (2, 2)
    assert bool((scale > 0).all())
    assert (len(scale[0].unique()) == 1) == (range_ == "tensor")
    ids = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(7)).tolist()
    wanted = read(tiny, torch.float32).logits(ids)
    near = torch.corrcoef(torch.stack([wanted.flatten(), served_logits(out, ids).flatten()]))[0, 1]
    assert near > 0.98


def test_an_override_is_stored_in_its_own_format(tiny: Path, tmp_path: Path) -> None:
    recipe = small("w4a8kv4-g128")
    module = "model.layers.1.mlp.down_proj"
    out = run(tiny, tmp_path / "out", replace(recipe, weights=replace(recipe.weights, overrides={module: "w8a8"})))
    source = open_checkpoint(out)
    assert source.dtype(f"{module}.codes") == torch.int8
    assert source.dtype(f"{module.replace('1', '0')}.codes") == torch.uint8


def test_damaged_weights_are_named(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for change, sentence in (
        (lambda w: w.index_fill(0, torch.tensor([3]), float("nan")), f"{name} holds NaN"),
        (torch.zeros_like, f"all values of tensor {name} are 0"),
        (lambda w: w * 1e36, r"layers\.1\.mlp\.down_proj"),
    ):
        save_file(weights | {name: change(weights[name])}, tiny / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=sentence):
            run(tiny, tmp_path / sentence[:3])
    save_file({n: w for n, w in weights.items() if n != name}, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}' is missing"):
        run(tiny, tmp_path / "missing")


def test_dead_channels_are_no_damage(tiny: Path, tmp_path: Path) -> None:
    """A neuron that never fires, a head whose values are zero."""
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][5] = 0
    weights["model.layers.0.self_attn.v_proj.weight"][:16] = 0
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    ids = list(range(50))
    for recipe in RECIPES:
        assert torch.isfinite(served_logits(run(tiny, tmp_path / recipe, recipe), ids)).all()


def test_memory_is_one_layer_not_the_model(tmp_path: Path) -> None:
    """Four layers hold no more tensors at any step than two, and no more than a few layers."""
    models = [tiny_model(tmp_path / f"model-{n}", layers=n) for n in (2, 4)]
    few, many = (held_bytes(model, tmp_path / f"out-{model.name}") for model in models)
    layer = 4 * (64 * 64 * 3 + 3 * 64 * 160)
    activations = 4 * 3 * 40 * 64
    assert many <= few * 1.01
    assert many < 4 * layer + 4 * activations + 8 * 2 * 160 * 160


def held_bytes(model: Path, out: Path) -> int:
    """The most bytes of tensors that are alive between two steps of a run, beyond those alive before it."""

    def tensors() -> list[Tensor]:
        gc.collect()
        found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        return [tensor for tensor in found if not tensor.is_mkldnn]  # those of other tests have no storage to look at

    before = tensors()  # held, so that none of them is freed meanwhile and its place reused
    known = {t.untyped_storage().data_ptr() for t in before}

    def alive() -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        return sum(size for place, size in storages.items() if place not in known)

    seen = [0]
    quantize(
        open_checkpoint(model),
        small("w4a8kv4-g128"),
        out,
        calibration=calibration(model),
        progress=lambda phase, done, total: seen.append(alive()),
    )
    return max(seen)


# killed and resumed


class Stop(BaseException):
    """Stands for the end of the process."""


def test_stopped_at_every_commit_and_resumed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each rename of a file: the resumed run's files are those of an undisturbed one."""
    whole = contents(run(tiny, tmp_path / "whole"))
    rename = spill.sync_replace
    total = counted(lambda: run(tiny, tmp_path / "count"), monkeypatch)
    assert total > 10
    for stop in range(total):
        for after in (False, True):
            out = tmp_path / f"out-{stop}-{after}"
            left = [stop]

            def stopping(temporary: Path, final: Path, left: list[int] = left, after: bool = after) -> None:
                left[0] -= 1
                if left[0] < 0 and not after:
                    raise Stop
                rename(temporary, final)
                if left[0] < 0:
                    raise Stop

            with monkeypatch.context() as patch:
                patch.setattr(spill, "sync_replace", stopping)
                with pytest.raises(Stop):
                    run(tiny, out)
            assert contents(run(tiny, out)) == whole, (stop, after)


def counted(do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many files `do` makes visible."""
    seen: list[Path] = []
    rename = spill.sync_replace

    def counting(temporary: Path, final: Path) -> None:
        seen.append(final)
        rename(temporary, final)

    with monkeypatch.context() as patch:
        patch.setattr(spill, "sync_replace", counting)
        do()
    return len(seen)


def test_killed_at_ten_random_moments_and_resumed(tmp_path: Path) -> None:
    """SIGKILL, in processes of their own, until a run comes to its end."""
    model = tiny_model(tmp_path / "model", layers=4)
    began = time.perf_counter()
    whole = contents(run(model, tmp_path / "whole"))
    seconds = time.perf_counter() - began
    moments, out, kills = random.Random(5), tmp_path / "out", 0
    while kills < 10 or not ended(model, out, None):
        if ended(model, out, moments.uniform(0.02, 0.9) * seconds):
            assert contents(out) == whole
            out = tmp_path / f"out-{kills}"
        else:
            kills += 1
    assert contents(out) == whole


def ended(model: Path, out: Path, seconds: float | None) -> bool:
    """Run in a forked process, killed after `seconds`; True if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            run(model, out)
            os._exit(0)
        except BaseException:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def test_resuming_with_something_else_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stopped_run(tiny, tmp_path / "out", monkeypatch)
    source = open_checkpoint(tiny)
    with pytest.raises(ConfigError, match="another recipe"):
        run(tiny, out, "w4a8kv4-row")
    with pytest.raises(ConfigError, match="another calibration"):
        quantize(source, small("w4a8kv4-g128"), out, calibration=calibration(tiny, seed=1))
    other = tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="another source"):
        run(other, out)
    (out / FOLDER / stream.MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        run(tiny, out)


def stopped_run(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped behind its first layer."""
    work = stages.quantize_layer
    done: list[object] = []

    def once(*args: object) -> object:
        if done:
            raise Stop
        done.append(work(*args))  # type: ignore[arg-type]  # passed on
        return done[0]

    with monkeypatch.context() as patch:
        patch.setattr(stream, "quantize_layer", once)
        with pytest.raises(Stop):
            run(model, out)
    return out


def test_a_stopped_run_is_no_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = stopped_run(tiny, tmp_path / "out", monkeypatch)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(out)


def test_folders_with_something_in_them_are_refused(tiny: Path, tmp_path: Path) -> None:
    out = run(tiny, tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        run(tiny, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no checkpoint can be written"):
        run(tiny, tmp_path / "file")


def test_two_processes_do_not_share_a_folder(tiny: Path, tmp_path: Path) -> None:
    import fcntl

    work = tmp_path / "out" / FOLDER
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            run(tiny, tmp_path / "out")

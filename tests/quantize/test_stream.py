"""The whole run: artefacts that describe themselves, streaming against the whole model, killed and resumed runs."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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

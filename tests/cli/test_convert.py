"""`omniserve convert` and `omniserve eval fidelity` as commands: what they print, write and refuse."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniserve.cli.exits import GATE
from omniserve.evals.fidelity import Fidelity
from omniserve.evals.perplexity import Score
from omniserve.formats.artifact import KVScheme, Scheme
from omniserve.formats.checkpoint import FolderSource
from omniserve.models.families import family, linears
from tests.cli.commands import Ran, check_refusal
from tests.tiny import tiny_model
from tests.unit.test_artifact import describe, rewrite
from tests.unit.test_dumps import Evil, dump, save
from tests.unit.test_imports import AWQ, awq, packed
from tests.unit.test_legacy import published

Run = Callable[..., Ran]


def pickled(folder: Path) -> Path:
    """Turn a folder of safetensors into one of pickles, as published."""
    save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("form", ["w4a8-row", "w4a8-g128", "w8a8"])
def test_published_pickles(form: str, run: Run, tmp_path: Path) -> None:
    folder, stored = published(tmp_path / "m", form, static=form == "w8a8")
    (folder / "tokenizer.json").write_text("{}")
    pickled(folder)
    check_refusal(run("generate", folder, "--prompt", "a"), "omniserve convert ", " -o ")
    ran = run("convert", folder, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "every weight is exactly what it was" in ran.out
    assert f"QServe {form}" in ran.out
    assert ("norm weights are not 1" in ran.err) == (form != "w8a8")
    source = FolderSource(tmp_path / "out")
    for module, tensors in stored.items():
        for name, tensor in tensors.items():
            assert torch.equal(source.tensor(f"{module}.{name}"), tensor)
    block = source.config["quantization_config"]
    assert isinstance(block, dict)
    assert block["quant_method"] == "omniserve"
    assert block["made_by"]["omniserve"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    back = run("convert", tmp_path / "out", "--to", "qserve", "--output", tmp_path / "back")
    assert (back.code, back.err) == (0, "")
    theirs = torch.load(folder / "pytorch_model.bin", weights_only=True)
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == theirs.keys()
    assert all(again[name].dtype == theirs[name].dtype and torch.equal(again[name], theirs[name]) for name in again)


def test_other_tools(run: Run, tmp_path: Path) -> None:
    folder, _ = packed(tmp_path / "m", AWQ | {"group_size": 64}, awq, group=64)
    ran = run("convert", folder, "-o", tmp_path / "out")
    assert ran.code == 0
    assert "relative squared error of 14 linears" in ran.out
    assert "14 of 14 linears" in ran.err
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(block["made_by"]["relative_squared_error"]) == 14
    assert block["made_by"]["imported"] == "AWQ, group size 64"
    assert len(block["made_by"]["rounded_again"]) == 14


def test_dumps(run: Run, tmp_path: Path) -> None:
    dump(tmp_path / "d", "g128", "v0.1", config=False)
    check_refusal(run("convert", tmp_path / "d", "-o", "out"), "config.json is missing", "--original FOLDER")
    check_refusal(run("convert", tmp_path / "d", "-o", "out", "--original", tmp_path), "neither has")
    (tmp_path / "d-original" / "tokenizer.json").write_text("{}")
    ran = run("convert", tmp_path / "d", "-o", "out", "--original", tmp_path / "d-original")
    assert ran.code == 0, ran.err
    assert "DeepCompressor dump, v0.1" in ran.out
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_pickles_in_16_bit(run: Run, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m")
    wanted = load_file(folder / "model.safetensors")
    ran = run("convert", pickled(folder), "-o", "out")
    assert (ran.code, ran.out) == (0, "out: 16-bit safetensors\n")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_is_refused(run: Run, tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "plain")
    theirs, _ = published(tmp_path / "theirs", "w8a8")
    before = set(tmp_path.rglob("*"))
    check_refusal(run("convert", plain, "-o", "out"), "served as it is", "nothing to convert")
    check_refusal(run("convert", plain, "-o", "out", "--to", "qserve"), "not quantized")
    check_refusal(run("convert", theirs, "-o", plain), "exists already")
    check_refusal(run("convert", theirs, "-o", "out", "--to", "awq"), "--to", "qserve")
    check_refusal(run("convert", theirs), "--output")
    check_refusal(run("convert", tmp_path / "none", "-o", "out"), "none")
    assert set(tmp_path.rglob("*")) == before
    rewrite(theirs, lambda t: t.pop("model.layers.1.mlp.up_proj.dequant_scale"))
    check_refusal(run("convert", theirs, "-o", "out"), "up_proj.dequant_scale' is missing")
    rewrite(theirs, lambda t: t.update({"model.layers.1.mlp.up_proj.dequant_scale": torch.zeros(256)}))
    for command in (["generate", theirs, "--prompt", "a"], ["convert", theirs, "-o", "out"]):
        check_refusal(run(*command), "up_proj.scale' holds a scale that is not positive")
    assert not (tmp_path / "out").exists()


def test_hostile_and_half_written_pickles(run: Run, tmp_path: Path) -> None:
    folder = pickled(published(tmp_path / "m", "w8a8")[0])
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    check_refusal(run("convert", folder, "-o", "out"), "pytorch_model.bin", "damaged or truncated")
    save({"x": Evil(tmp_path / "touched")}, file)
    check_refusal(run("convert", folder, "-o", "out"), "posix.system", "it is refused")
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in w8a8 with 4-bit KV."""
    folder = tmp_path_factory.mktemp("quantized") / "w8a8kv4"
    shutil.copytree(tiny, folder)
    scheme = Scheme(weights="w8a8", kv=KVScheme(bits=4), made_by={"calibration": {"tokens": 1}})
    config = json.loads((folder / "config.json").read_text())

    def change(tensors: dict[str, Tensor]) -> None:
        for module in linears(family(config).spec(config)):
            stored = scheme.form(module).from_dense(tensors.pop(f"{module}.weight"))
            tensors |= {f"{module}.{name}": tensor for name, tensor in stored.items()}

    return describe(rewrite(folder, change), scheme)


FLAGS = ("--length", "64", "--windows", "0,1")


def test_fidelity(run: Run, quantized: Path, tiny: Path) -> None:
    ran = run("eval", "fidelity", quantized, "--reference", tiny, *FLAGS)
    assert ran.code == 0, ran.err
    assert "w8a8kv4, windows 0,1 of 64 tokens" in ran.out
    assert [word for word in ("tiny w16a16kv16", "w8a8kv4", "with kv8: w8a8kv8") if word not in ran.out] == []
    ran = run("eval", "fidelity", quantized, "--reference", tiny, *FLAGS, "--json", "--max-kl", "100")
    found = json.loads(ran.out)
    rows = found["rows"]
    assert [row["precision"] for row in rows] == ["tiny w16a16kv16", "w8a8kv4", "with kv8: w8a8kv8"]
    assert rows[0]["kl"] is None
    assert rows[1]["kl"] > rows[2]["kl"] > 0
    assert found["kv4_costs"] == pytest.approx(rows[1]["kl"] - rows[2]["kl"])
    assert (found["passed"], found["windows"], rows[0]["predictions"]) == (True, [0, 1], 126)


def test_fidelity_is_a_gate(run: Run, quantized: Path, tiny: Path) -> None:
    ran = run("eval", "fidelity", quantized, "--reference", tiny, *FLAGS, "--max-kl", "0", "--json")
    assert ran.code == GATE == 4
    assert json.loads(ran.out)["passed"] is False
    assert "quality gate failed" in ran.err


def test_fidelity_with_8_bit_kv_is_measured_once(run: Run, quantized: Path, tiny: Path) -> None:
    ran = run("eval", "fidelity", quantized, "--reference", tiny, *FLAGS, "--precision", "w8a8kv8", "--json")
    found = json.loads(ran.out)
    assert [row["precision"] for row in found["rows"]] == ["tiny w16a16kv16", "w8a8kv8"]
    assert (found["kv4_costs"], found["advice"]) == (None, None)


def test_fidelity_refuses(run: Run, quantized: Path, tiny: Path, tmp_path: Path) -> None:
    check_refusal(run("eval", "fidelity", quantized), "--reference")
    check_refusal(run("eval", "fidelity", quantized, "--reference", tiny, "--max-kl", "-1"), "--max-kl=-1.0")
    check_refusal(run("eval", "fidelity", quantized, "--reference", tiny, "--length", "1"), "--length=1")
    check_refusal(run("eval", "fidelity", quantized, "--reference", tiny, "--text", "no.txt"), "no such text file")
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    config = json.loads((other / "config.json").read_text())
    tensors = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, other / "model.safetensors")
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    check_refusal(run("eval", "fidelity", quantized, "--reference", other, *FLAGS), "they cannot be compared")


def scored(kl: float | None) -> Score:
    return Score(predictions=10, nll=1.0, kl=kl, agreement=0.5, seconds=1.0)


def test_when_4_bit_kv_is_advised_against() -> None:
    def found(kv4: float, kv8: float | None) -> Fidelity:
        return Fidelity(
            precision="w4a8kv4 g128",
            kv8_precision="w4a8kv8",
            reference=scored(None),
            served=scored(kv4),
            kv8=None if kv8 is None else scored(kv8),
        )

    advice = found(0.5, 0.1).advice
    assert advice is not None
    assert "4-BIT KV HURTS THIS MODEL: 0.4 of its 0.5 nats" in advice
    assert "--precision w4a8kv8" in advice
    assert found(0.14, 0.1).advice is None  # the weights are to blame
    assert found(0.011, 0.001).advice is None  # nobody sees it
    assert found(0.5, None).advice is None
    assert found(float("nan"), 0.1).advice is not None
    assert replace(found(0.5, 0.1), kv8=None).kv4_costs is None

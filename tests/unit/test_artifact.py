"""Our own checkpoint: its description, the checks of its tensors, and the folder that is written."""

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniserve.base.config import Options, Precision, choose_precision
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.formats.artifact import KVScheme, Scheme, key_means, read_linear, scheme_of
from omniserve.formats.checkpoint import FolderSource, kv_scales, open_checkpoint
from omniserve.formats.table import FORMATS
from omniserve.formats.translated import Linear, Part, Translated, described_config
from omniserve.formats.writer import write_folder
from omniserve.models.families import check_tensors, expected, family, linears
from tests.tiny import tiny_model

Change = Callable[[dict[str, Tensor]], object]


def rewrite(folder: Path, change: Change) -> Path:
    """Change the tensors of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def describe(folder: Path, scheme: Scheme) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = scheme.block()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def artefact(folder: Path, scheme: Scheme, extra: Mapping[str, Tensor] | None = None, **shape: object) -> Path:
    """A tiny model whose linears were rounded to nearest and stored; `extra` are tensors beside its own."""
    tiny_model(folder, **shape)  # type: ignore[arg-type]
    config = json.loads((folder / "config.json").read_text())
    modules = linears(family(config).spec(config))

    def change(tensors: dict[str, Tensor]) -> None:
        for module in modules:
            form = scheme.form(module)
            if form.name != "w16a16":
                dense = tensors.pop(f"{module}.weight")
                tensors |= {f"{module}.{name}": tensor for name, tensor in form.from_dense(dense).items()}
        tensors |= extra or {}

    return describe(rewrite(folder, change), scheme)


def check(folder: Path) -> None:
    source = open_checkpoint(folder)
    check_tensors(source, family(source.config).spec(source.config))


SCHEMES = {
    "g128": Scheme(weights="w4a8-g128", kv=KVScheme(bits=4)),
    "row": Scheme(weights="w4a8-row", kv=KVScheme(bits=4)),
    "w8a8": Scheme(weights="w8a8"),
    "mixed": Scheme(
        weights="w4a8-g128",
        overrides={"model.layers.0.mlp.down_proj": "w8a8", "model.layers.1.self_attn.o_proj": "w4a8-row"},
        keep=("lm_head", "model.embed_tokens", "model.layers.1.mlp.down_proj"),
        made_by={"calibration": {"tokens": 1}},
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_survives_its_description(name: str, tmp_path: Path) -> None:
    folder = artefact(tmp_path / "m", SCHEMES[name])
    source = open_checkpoint(folder)
    assert scheme_of(source) == SCHEMES[name]
    check(folder)


def test_the_published_example_is_read(tmp_path: Path) -> None:
    """qoq.md section 4, and what the quantizer writes for static KV."""
    block = {
        "quant_method": "omniserve",
        "version": 1,
        "weights": {
            "format": "w4a8-g128",
            "group": 128,
            "overrides": {"model.layers.0.mlp.down_proj": "w8a8"},
            "keep": ["lm_head", "model.embed_tokens"],
        },
        "activations": {"bits": 8, "per": "token"},
        "kv": {
            "key_bits": 4,
            "value_bits": 4,
            "per": "token-head",
            "zero": "real",
            "key_mean": True,
            "key_rotation": None,
        },
        "made_by": {"recipe": {}, "transforms": ["R1"], "calibration": {}, "source_sha256": {}, "omniserve": "0.1"},
    }
    folder = tiny_model(tmp_path / "m", claims={"quantization_config": block})
    scheme = scheme_of(open_checkpoint(folder))
    assert scheme is not None
    assert scheme.precision == Precision.parse("w4a8kv4")
    assert (scheme.kv.key_mean, scheme.calibrated) == (True, False)
    assert scheme.form("model.layers.0.mlp.down_proj").name == "w8a8"
    static = {"key_bits": 8, "value_bits": 8, "per": "tensor", "zero": "none", "key_mean": False}
    other = {**block, "weights": {"format": "w8a8", "group": -1}, "kv": static}
    scheme = scheme_of(open_checkpoint(tiny_model(tmp_path / "n", claims={"quantization_config": other})))
    assert scheme is not None
    assert scheme.kv == KVScheme(bits=8, static=True)


def test_users_may_change_kv_and_nothing_else() -> None:
    stored = SCHEMES["row"].precision
    assert choose_precision(Options(), stored) == stored
    assert choose_precision(Options(precision="w4a8kv8", group_size=-1), stored).kv == "kv8"
    for word, group in (("w8a8kv4", -1), ("w4a8kv4", 128), ("w16a16kv16", 128)):
        with pytest.raises(ConfigError, match="the checkpoint holds w4a8kv4 per channel weights"):
            choose_precision(Options(precision=word, group_size=group), stored)


BLOCK = SCHEMES["mixed"].block()
BAD_BLOCKS: dict[str, tuple[dict[str, object] | str, str]] = {
    "a word": ("gptq", "quantized by 'gptq', this version reads omniserve, qoq, awq"),
    "version": (BLOCK | {"version": 2}, "version=2: this omniserve reads version 1"),
    "unknown key": (BLOCK | {"weigths": {}}, "unknown key 'weigths' (did you mean weights?)"),
    "no weights": ({k: v for k, v in BLOCK.items() if k != "weights"}, "weights=None: must be an object"),
    "format": (BLOCK | {"weights": {"format": "w3"}}, "quantization_config.weights: format='w3': must be one of"),
    "group": (BLOCK | {"weights": {"format": "w4a8-g128", "group": 64}}, "weights: group=64: must be 128"),
    "inner key": (BLOCK | {"weights": {"format": "w8a8", "bits": 8}}, "weights: unknown key 'bits'"),
    "override": (BLOCK | {"weights": {"format": "w8a8", "overrides": {"a": "w9"}}}, "overrides['a']='w9'"),
    "keep": (BLOCK | {"weights": {"format": "w8a8", "keep": [1]}}, "keep=[1]: must be a list of names"),
    "both": (
        BLOCK | {"weights": {"format": "w8a8", "keep": ["a"], "overrides": {"a": "w8a8"}}},
        "keep='a': must be another module",
    ),
    "activations": (BLOCK | {"activations": {"bits": 4, "per": "token"}}, "activations: bits=4: must be 8"),
    "kv bits": (BLOCK | {"kv": {"key_bits": 3}}, "kv: key_bits=3: must be one of 4, 8, 16"),
    "kv truth": (BLOCK | {"kv": {"key_bits": True}}, "kv: key_bits=True"),
    "two kinds of bits": (
        BLOCK | {"kv": {"key_bits": 8, "value_bits": 4, "per": "token-head", "zero": "real"}},
        "value_bits=4: must be key_bits=8, one number for both so far",
    ),
    "static kv4": (
        BLOCK | {"kv": {"key_bits": 4, "value_bits": 4, "per": "head", "zero": "none"}},
        "kv: per='head': must be token-head",
    ),
    "rotation": (
        BLOCK
        | {"kv": {"key_bits": 4, "value_bits": 4, "per": "token-head", "zero": "real", "key_rotation": "hadamard"}},
        "kv: key_rotation='hadamard': must be null",
    ),
    "mean": (
        BLOCK | {"kv": {"key_bits": 4, "value_bits": 4, "per": "token-head", "zero": "real", "key_mean": 1}},
        "kv: key_mean=1: must be true or false",
    ),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_descriptions_that_are_refused(name: str, tmp_path: Path) -> None:
    block, message = BAD_BLOCKS[name]
    source = open_checkpoint(tiny_model(tmp_path / "m", claims={"quantization_config": block}))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        scheme_of(source)


DOWN = "model.layers.0.mlp.down_proj"
Q = "model.layers.1.self_attn.q_proj"


def halve(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][..., : tensors[name].shape[-1] // 2].contiguous()


BAD_TENSORS: dict[str, tuple[str, Change, str]] = {
    "missing": ("g128", lambda t: t.pop(f"{DOWN}.group_zero"), f"tensor '{DOWN}.group_zero' is missing"),
    "surplus": ("row", lambda t: t.update({f"{Q}.group_zero": torch.ones(1)}), "q_proj.group_zero' is no part of"),
    "dense beside codes": ("row", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), "q_proj.weight' is no part"),
    "shape": ("w8a8", lambda t: halve(t, f"{Q}.codes"), "q_proj.codes' has shape [64, 32], the config calls for"),
    "groups": ("g128", lambda t: halve(t, f"{DOWN}.group_scale"), "down_proj.group_scale' has shape [64, 1]"),
    "type": ("w8a8", lambda t: t.update({f"{Q}.codes": t[f"{Q}.codes"].short().to(torch.int32)}), "is torch.int32"),
    "static scale in a dynamic one": (
        "w8a8",
        lambda t: t.update({"model.layers.0.self_attn.kv_scale": torch.ones(2, 2)}),
        "kv_scale' is no part of a llama model",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit_the_description(name: str, tmp_path: Path) -> None:
    scheme, change, message = BAD_TENSORS[name]
    folder = rewrite(artefact(tmp_path / "m", SCHEMES[scheme], ffn=256), change)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check(folder)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            replace(SCHEMES["mixed"], overrides={"model.layers.7.mlp.down_proj": "w8a8"}),
            "overrides names 'model.layers",
        ),
        (replace(SCHEMES["mixed"], overrides={"lm_head": "w8a8"}, keep=()), "'lm_head', which is no linear of this"),
        (replace(SCHEMES["mixed"], keep=("model.layers.0.mlp",)), "'model.layers.0.mlp', which is no module of this"),
    ],
)
def test_modules_that_are_not_there(scheme: Scheme, message: str, tmp_path: Path) -> None:
    folder = describe(artefact(tmp_path / "m", SCHEMES["mixed"]), scheme)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_odd_columns_name_the_linear(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", ffn=161)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.down_proj': a weight has 161 columns"):
        check(describe(folder, SCHEMES["g128"]))


def put(name: str, at: tuple[int, ...], value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][at] = value

    return change


BAD_VALUES: dict[str, tuple[str, Change, str]] = {
    "NaN scale": ("row", put(f"{Q}.scale", (3,), float("nan")), f"tensor '{Q}.scale' holds NaN or infinity"),
    "infinite zero": ("row", put(f"{Q}.zero", (3,), float("inf")), f"tensor '{Q}.zero' holds NaN or infinity"),
    "scale 0": ("w8a8", put(f"{Q}.scale", (3,), 0.0), f"tensor '{Q}.scale' holds a scale that is not positive"),
    "negative scale": ("g128", put(f"{Q}.scale", (3,), -1.0), "holds a scale that is not positive"),
    "group scale 0": ("g128", put(f"{Q}.group_scale", (3, 0), 0), "group_scale' holds values from 0 to"),
    "group scale 18": ("g128", put(f"{Q}.group_scale", (3, 0), 18), "to 18, allowed are 1 to 17"),
    "out of int8": ("g128", put(f"{Q}.group_zero", (3, 0), 250), "group_zero' with its codes and group_scale leaves"),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_no_writer_makes(name: str, tmp_path: Path) -> None:
    word, change, message = BAD_VALUES[name]
    source = open_checkpoint(rewrite(artefact(tmp_path / "m", SCHEMES[word]), change))
    scheme = scheme_of(source)
    assert scheme is not None
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_linear(source, scheme, Q)


def test_codes_that_are_not_in_use_may_leave_int8(tmp_path: Path) -> None:
    """A group of a foreign file: 15 * 17 - 120 is beyond int8, but no code above 14 is there."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.codes"][0] = 0xEE
        tensors[f"{Q}.group_scale"][0], tensors[f"{Q}.group_zero"][0] = 17, 120

    source = open_checkpoint(rewrite(artefact(tmp_path / "m", SCHEMES["g128"]), change))
    read = read_linear(source, SCHEMES["g128"], Q)
    assert float(FORMATS["w4a8-g128"].dense(read)[0, 0]) == (14 * 17 - 120) * float(read["scale"][0])


def test_key_means_and_static_scales(tmp_path: Path) -> None:
    scheme = Scheme(weights="w8a8", kv=KVScheme(bits=8, static=True, key_mean=True))
    means = {f"model.layers.{i}.self_attn.key_mean": torch.full((2, 16), float(i)).half() for i in (0, 1)}
    scales = {f"model.layers.{i}.self_attn.kv_scale": torch.full((2, 2), 0.5 + i) for i in (0, 1)}
    folder = artefact(tmp_path / "m", scheme, means | scales)
    check(folder)
    source = open_checkpoint(folder)
    spec = family(source.config).spec(source.config)
    read = key_means(source, spec)
    assert read is not None
    assert [float(mean[0, 0]) for mean in read] == [0.0, 1.0]
    assert kv_scales(source, 2) is not None
    rewrite(folder, put("model.layers.1.self_attn.key_mean", (1, 3), float("nan")))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.key_mean' holds NaN"):
        key_means(open_checkpoint(folder), spec)
    rewrite(folder, lambda t: t.pop("model.layers.1.self_attn.key_mean"))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.key_mean' is missing"):
        check(folder)
    assert key_means(open_checkpoint(artefact(tmp_path / "n", SCHEMES["w8a8"])), spec) is None


def test_linears_are_the_layers_projections(tmp_path: Path) -> None:
    config = {"num_local_experts": 2, "num_experts_per_tok": 1}
    source = open_checkpoint(tiny_model(tmp_path / "m", "mixtral", config=config))
    spec = family(source.config).spec(source.config)
    names = set(linears(spec))
    assert "model.layers.0.block_sparse_moe.experts.1.w2" in names
    assert "model.layers.0.block_sparse_moe.gate" not in names
    assert len(names) == 2 * (4 + 2 * 3)
    assert all(f"{name}.weight" in expected(spec) for name in names)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000, 9_000])
def test_what_is_written_is_read(tmp_path: Path, shard_bytes: int) -> None:
    folder = artefact(tmp_path / "m", SCHEMES["mixed"], layers=11)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "notes.txt").write_text("mine")
    source = FolderSource(folder)
    seen: list[tuple[int, int]] = []
    write_folder(
        source,
        tmp_path / "deep" / "out",
        config=lambda: source.config,
        progress=lambda done, total: seen.append((done, total)),
        shard_bytes=shard_bytes,
    )
    written = tmp_path / "deep" / "out"
    read = FolderSource(written)
    assert read.names() == source.names()
    assert all(torch.equal(read.tensor(name), source.tensor(name)) for name in source.names())
    assert read.config == source.config
    count = len(source.names())
    assert seen == [(n + 1, count) for n in range(count)]
    files = sorted(path.name for path in written.glob("*.safetensors"))
    assert (written / "model.safetensors.index.json").exists() == (len(files) > 1) == (shard_bytes < 1 << 30)
    assert {path.name for path in written.iterdir()} - set(files) - {"model.safetensors.index.json"} == {
        "config.json",
        "tokenizer.json",
        "LICENSE",
    }
    assert os.stat(written).st_mode & 0o777 == 0o755
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    for file in files:  # the library of others reads it too, every tensor aligned
        with safe_open(str(written / file), framework="pt") as opened:  # type: ignore[no-untyped-call]
            for name in opened.keys():  # noqa: SIM118  # no mapping
                assert torch.equal(opened.get_tensor(name), source.tensor(name))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = FolderSource(artefact(tmp_path / "m", SCHEMES["w8a8"]))
    for target in (tmp_path / "m", tmp_path / "m" / "config.json"):
        with pytest.raises(ConfigError, match="exists already: give a folder that does not"):
            write_folder(source, target, config=lambda: source.config)
    (tmp_path / "empty").mkdir()
    write_folder(source, tmp_path / "empty", config=lambda: source.config)
    check(tmp_path / "empty")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    source = FolderSource(artefact(tmp_path / "m", SCHEMES["w8a8"]))

    def interrupted(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(source, tmp_path / "out", config=lambda: source.config, progress=interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_folder(source, tmp_path / "file" / "out", config=lambda: source.config)


def test_a_killed_write_is_no_checkpoint(tmp_path: Path) -> None:
    """What a killed process leaves behind, at any moment, is refused."""
    source = FolderSource(artefact(tmp_path / "m", SCHEMES["w8a8"]))
    left = []

    def killed(done: int, total: int) -> None:
        if done in (1, 9, total):
            left.append(shutil.copytree(next(tmp_path.glob(".out.partial-*")), tmp_path / f"left-{done}"))

    write_folder(source, tmp_path / "out", config=lambda: source.config, progress=killed, shard_bytes=30_000)
    assert len(left) == 3
    for folder in left:
        with pytest.raises(CheckpointError, match=r"config.json is missing"):
            open_checkpoint(folder)
    for folder in left[:2]:  # somebody helps with the config
        shutil.copy(tmp_path / "out" / "config.json", folder)
        with pytest.raises(CheckpointError, match=r"of \d shards are there"):
            check(folder)


def test_a_write_holds_one_tensor(tmp_path: Path) -> None:
    """Streaming: nothing but the tensor in hand is alive when the next one is asked for."""
    held = weakref.WeakSet()

    class Counting:
        def __init__(self, source: FolderSource) -> None:
            self.path, self.config, self.names = source.path, source.config, source.names
            self.shape, self.dtype = source.shape, source.dtype
            self._tensor = source.tensor

        def tensor(self, name: str) -> Tensor:
            assert len(held) <= 1
            made = self._tensor(name).clone()
            held.add(made)
            return made

    source = Counting(FolderSource(artefact(tmp_path / "m", SCHEMES["g128"])))
    write_folder(source, tmp_path / "out", config=lambda: source.config)
    check(tmp_path / "out")


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "m", SCHEMES["w8a8"])
    rewrite(folder, put("model.layers.1.input_layernorm.weight", (3,), float("nan")))
    source = FolderSource(folder)
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.1.input_layernorm.weight' holds NaN"):
        write_folder(source, tmp_path / "out", config=lambda: source.config)
    assert not (tmp_path / "out").exists()


def test_translated_sources_state_their_loss(tmp_path: Path) -> None:
    source = FolderSource(tiny_model(tmp_path / "m"))
    form = FORMATS["w8a8"]
    made = []

    def make() -> tuple[dict[str, Tensor], float]:
        made.append(1)
        return form.from_dense(source.tensor(f"{Q}.weight")), 0.25

    other = Translated(
        source,
        origin="somebody",
        scheme=SCHEMES["w8a8"],
        linears={Q: Linear(form=form, shape=(64, 64), make=make, dtypes={"scale": torch.float16}, rounded=True)},
        parts={"lm_head.weight": Part(shape=(2,), dtype=torch.float32, make=lambda: torch.ones(2))},
        notes=["mind this"],
    )
    assert other.config["tie_word_embeddings"] is False
    assert other.names() == {f"{Q}.codes", f"{Q}.scale", "lm_head.weight"}
    assert (other.shape(f"{Q}.codes"), other.dtype(f"{Q}.scale")) == ((64, 64), torch.float16)
    assert other.tensor(f"{Q}.scale").dtype == torch.float16
    assert other.tensor(f"{Q}.codes").dtype == torch.int8
    assert len(made) == 1
    block = described_config(other)["quantization_config"]
    assert isinstance(block, dict)
    assert block["made_by"] == {
        "imported": "somebody",
        "notes": ["mind this"],
        "relative_squared_error": {Q: 0.25},
        "rounded_again": [Q],
    }
    with pytest.raises(CheckpointError, match=f"tensor '{Q}.zero' is missing"):
        other.tensor(f"{Q}.zero")

"""Options: one parser for keywords, environment and files; nothing is ignored, clamped or guessed."""

import pytest

from omniserve.base.config import (
    FEW,
    PRECISIONS,
    SHAPES,
    Options,
    Precision,
    check_model,
    choose_precision,
    choose_sparsity,
    options_from,
    resolve,
)
from omniserve.base.environment import environment, options_from_environment
from omniserve.base.errors import CapacityError, ConfigError, RequestError
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import SamplingParams, check_prompt

SPEC = ModelSpec(
    family="llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=160, vocab=97, context=512, norm_eps=1e-5
)
CPU = Device(kind="cpu", memory_bytes=2**30)


def test_every_word_of_qserve_is_a_precision() -> None:
    names = {word: Precision.parse(word).name for word in PRECISIONS}
    assert names == {
        "w4a8kv4": "w4a8kv4",
        "w4a8kv8": "w4a8kv8",
        "w4a8": "w4a8kv8",
        "w8a8kv4": "w8a8kv4",
        "w8a8kv8": "w8a8kv8",
        "w8a8": "w8a8kv8",
        "w16a16kv16": "w16a16kv16",
        "w16a16kv8": "w16a16kv8",
        "w16a16kv4": "w16a16kv4",
    }
    assert Precision.parse("W4A8KV4", -1).label == "w4a8kv4 per channel"


@pytest.mark.parametrize("word", ["", "w4a8kv5", "w4", "kv4", "int4", "w8a8kv8x"])
def test_an_unknown_precision_is_refused_with_the_list(word: str) -> None:
    with pytest.raises(ConfigError, match="must be one of w4a8kv4"):
        Precision.parse(word)


def test_a_misspelt_precision_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean w8a8kv8\?"):
        Precision.parse("w8a8k8")


def test_a_group_size_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size=64: must be -1"):
        Precision.parse("w4a8kv4", 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precison": "w8a8"}, r"unknown option 'precison' \(did you mean precision\?\)"),
        ({"max_model_len": "many"}, "max_model_len='many': must be int or nothing"),
        ({"max_model_len": 1.5}, "must be int or nothing"),
        ({"max_num_seqs": True}, "max_num_seqs=True: must be int or nothing"),
        ({"dtype": "float8"}, "dtype='float8': must be one of auto, float32"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1: must be bool"),
        ({"group_size": 64}, "group_size=64: must be one of -1, 128"),
        ({"load_format": "dumy"}, r"must be one of auto, safetensors, gguf, dummy \(did you mean dummy\?\)"),
        ({"shape": "llama3-8b"}, r"shape='llama3-8b': must be one of tiny.*\(did you mean llama-3-8b\?\)"),
        ({"offline": "yes"}, "offline='yes': must be bool"),
        ({"revision": 3}, "revision=3: must be str or nothing"),
    ],
)
def test_wrong_keywords_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options_from(values, origin="keyword")


def test_environment_fills_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNISERVE_MAX_MODEL_LEN", "256")
    monkeypatch.setenv("OMNISERVE_ENABLE_PREFIX_CACHING", "false")
    options = options_from_environment()
    assert (options.max_model_len, options.enable_prefix_caching) == (256, False)


def test_what_the_environment_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that tell the tests where things are set nothing."""
    monkeypatch.setenv("OMNISERVE_TEST_MODELS", "/models")
    monkeypatch.setenv("OMNISERVE_SEED", "0")
    monkeypatch.setenv("OMNISERVE_DOWNLOAD_DIR", "/models")
    assert environment() == {"seed": 0, "download_dir": "/models"}


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("m", {"shape": "tiny"}, "shape=tiny: goes with load_format=dummy only"),
        ("m", {"shape": "tiny", "load_format": "gguf"}, "shape=tiny: goes with load_format=dummy only"),
        (None, {"shape": "tiny"}, "shape=tiny: goes with load_format=dummy only"),
        (None, {"load_format": "dummy"}, "load_format=dummy: give the shape as well, one of tiny, llama-3-8b"),
        ("m", {"load_format": "dummy"}, "load_format=dummy: give the shape as well"),
        (
            "m",
            {"load_format": "dummy", "shape": "tiny"},
            "load_format=dummy: takes shape=tiny instead of the model 'm'",
        ),
        (None, {}, "MODEL is missing: give a .gguf file, a model folder or a name on huggingface.co"),
    ],
)
def test_a_model_or_a_shape(model: str | None, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(model, options_from(values, origin="keyword"))


def test_a_model_or_a_shape_is_enough() -> None:
    check_model("m", options_from({"shape": None}, origin="keyword"))
    for shape in SHAPES:
        check_model(None, Options(load_format="dummy", shape=shape))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OMNISERVE_MAX_MODEL_LENGTH", "3", r"did you mean max_model_len\?"),
        ("OMNISERVE_MAX_MODEL_LEN", "three", "must be a number"),
        ("OMNISERVE_ENABLE_PREFIX_CACHING", "maybe", "must be true or false"),
    ],
)
def test_wrong_variables_are_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        options_from_environment()


def resolved(device: Device = CPU, **values: object) -> object:
    return resolve(
        options_from(values, origin="keyword"),
        SPEC,
        device,
        stored=None,
        dtype="float32",
        token_bytes=100,
        free_bytes=2**29,
    )


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_model_len": 513}, ConfigError, "max_model_len=513: this model's context is 512"),
        ({"max_model_len": 0}, ConfigError, "max_model_len=0: must be 1 or more"),
        ({"max_num_seqs": -1}, ConfigError, "max_num_seqs=-1: must be 1 or more"),
        ({"max_num_batched_tokens": 4}, ConfigError, "must be at least max_num_seqs=16"),
        ({"kv_cache_memory_bytes": 6400}, CapacityError, "holds 64 tokens but one request may need 512"),
    ],
)
def test_limits_that_cannot_work_are_refused(values: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolved(**values)


def test_resolve_replaces_every_auto() -> None:
    config = resolved()
    assert (config.precision.name, config.limits.max_model_len, config.overlap) == ("w8a8kv8", 512, False)  # type: ignore[attr-defined]
    assert config.cache.memory_bytes == 16 * 512 * 100  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "precision", "asked", "head"),
    [
        ("cpu", "w4a8kv4", "auto", "w16"),
        ("cpu", "w4a8kv4", "w8", "w8"),
        ("cuda", "w4a8kv4", "auto", "w8"),
        ("cuda", "w4a8kv4", "w16", "w16"),
        ("cuda", "w16a16kv16", "auto", "w16"),
        ("cuda", "w16a16kv16", "w8", "w8"),
    ],
)
def test_the_head_has_8_bits_where_that_pays(kind: str, precision: str, asked: str, head: str) -> None:
    device = Device(kind=kind, memory_bytes=2**30)  # type: ignore[arg-type]
    config = resolved(device, precision=precision, lm_head=asked, kv_cache_memory_bytes=2**29)
    assert config.lm_head == head  # type: ignore[attr-defined]


def test_a_quantized_checkpoint_keeps_its_weights() -> None:
    stored = Precision.parse("w4a8kv4", 128)
    assert choose_precision(Options(), stored) == stored
    assert choose_precision(Options(precision="w4a8kv8"), stored).kv == "kv8"
    with pytest.raises(ConfigError, match="holds w4a8kv4 g128 weights"):
        choose_precision(Options(precision="w8a8kv8"), stored)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: must be 0 to 2"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0: must be above 0"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"min_p": 2}, "min_p=2"),
        ({"max_tokens": 0}, "max_tokens=0: must be 1 or more"),
        ({"seed": 2**63}, "must be a 64-bit whole number"),
        ({"stop": ["", "a"]}, "must be a non-empty string"),
        ({"stop_token_ids": [-1]}, "must be token ids"),
    ],
)
def test_wrong_sampling_parameters_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_sampling_parameters_take_one_stop_string_or_many() -> None:
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop == ("x", "y")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "the prompt is empty"), ([3, 97], "token id 97 at position 1: must be a whole number from 0 to 96")],
)
def test_wrong_prompts_are_refused(ids: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_prompt(ids, 97)


@pytest.mark.parametrize(
    ("budget", "given", "interval"),
    [(None, None, 4), (FEW, None, 4), (FEW - 64, None, 2), (512, 4, 4), (4096, 1, 1)],
)
def test_small_budgets_are_chosen_more_often(budget: int | None, given: int | None, interval: int) -> None:
    options = Options(sparsity="dynamic", token_budget=budget, reuse_interval=given)
    assert choose_sparsity(options).interval == interval

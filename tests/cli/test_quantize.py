"""`omniserve quantize` on a tiny model: the artefact is served, a second run continues, mistakes are sentences."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omniserve import LLM, SamplingParams
from tests.cli.commands import Ran, check_refusal

Run = Callable[..., Ran]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 60
RECIPE = """
name = "small"
[weights]
format = "w4a8-row"
[kv]
keys = 8
values = 8
[rotate]
residual = true
[solve]
search = true
gptq = true
[calibration]
samples = 2
length = 64
"""


def test_quantize_then_serve(tiny: Path, tmp_path: Path, run: Run) -> None:
    recipe, text, out = tmp_path / "small.toml", tmp_path / "text.txt", tmp_path / "out"
    recipe.write_text(RECIPE)
    text.write_text(TEXT)
    command = ["quantize", str(tiny), "-o", str(out), "--recipe", str(recipe), "--calibration", str(text)]
    assert run(*command, "--no-check", "--json").code == 0
    with LLM(out, max_model_len=64) as llm, LLM(tiny, max_model_len=64) as source:
        assert llm.config.precision.label == "w4a8kv8 per channel"
        assert llm.tokenizer.encode("the dog and the fox") == source.tokenizer.encode("the dog and the fox")
        assert llm.tokenizer.eos_ids == source.tokenizer.eos_ids
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        assert len(llm.generate("the dog", params)[0].outputs[0].token_ids) == 5
        assert not llm.warnings


def test_quick_needs_no_text(tiny: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    ran = run("quantize", str(tiny), "-o", str(out), "--quick", "--no-check", "--json")
    assert ran.code == 0, ran
    assert json.loads(ran.out)["recipe"] == "w4a8kv4-g128-quick"
    assert "without calibration" in ran.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--precision", "w16a16kv16"], "16-bit weights need no quantizer"),
        (["--precision", "w5"], "must be one of w4a8kv4"),
        (["--recipe", "nowhere.toml"], "the recipe cannot be read"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--without", "rotat"], "did you mean rotate"),
        (["--samples", "0"], "--samples=0: must be 1 or more"),
        (["--samples", "9999"], "more text or fewer samples"),
        (["--static-kv", "head"], "static scales exist for 8-bit KV"),
    ],
)
def test_mistakes(words: list[str], sentence: str, tiny: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    check_refusal(run("quantize", str(tiny), "-o", str(out), *words), sentence)
    assert not out.exists()

"""Every command on a tiny model: results on standard output, all else on standard error, exit code 0."""

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from omniserve import LLM
from omniserve.cli import demo
from omniserve.cli.flags import whole_numbers, with_dashes
from omniserve.evals.perplexity import cut, measure
from tests.cli.commands import Ran, environment

Run = Callable[..., Ran]
PROMPT = "The quick brown fox"
SIXTEEN = ("--precision", "w16a16kv16", "--dtype", "float32")


def done(ran: Ran) -> Ran:
    """Assert that the command ended well."""
    assert ran.code == 0, ran
    return ran


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from omniserve.cli.main import main; r = main(['eval', 'perplexity', '--help']); "
    code += "print('torch' in sys.modules, r)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert ran.stdout.splitlines()[-1] == "False 0", ran.stderr
    for flag in ("--text", "--reference", "--precisions", "--max-model-len", "--no-enable-prefix-caching", "--config"):
        assert flag in ran.stdout


def test_version_and_help(run: Run) -> None:
    from omniserve import __version__

    assert done(run("--version")).out.strip() == __version__
    assert "generate" in done(run()).out
    assert "perplexity" in done(run("eval")).out


def test_generate_prints_text_or_json(run: Run, tiny: Path) -> None:
    flags = ("generate", tiny, "--prompt", PROMPT, "--max-tokens", "12", "--ignore-eos", *SIXTEEN)
    plain = done(run(*flags))
    answer = json.loads(done(run(*flags, "--json")).out)
    assert plain.out == answer["text"] + "\n"
    assert "w16a16kv16 on cpu (float32)" in plain.err
    assert len(answer["token_ids"]) == 12
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["total_tokens"] == 12 + answer["usage"]["prompt_tokens"]
    assert answer["ttft_ms"] > 0
    assert answer["tokens_per_second"] > 0
    assert (answer["model"], answer["precision"]) == ("tiny", "w16a16kv16")


def test_generate_stops_before_a_text(run: Run, tiny: Path) -> None:
    flags = ("generate", tiny, "--prompt", PROMPT, "--max-tokens", "12", "--ignore-eos", "--json", *SIXTEEN)
    whole = json.loads(done(run(*flags)).out)["text"]
    stop = whole[len(whole) // 2 :][:2]
    cut_short = json.loads(done(run(*flags, "--stop", "never there", "--stop", stop)).out)
    assert cut_short["finish_reason"] == "stop"
    assert cut_short["text"] == whole[: whole.index(stop)]


def test_seed_decides_what_is_drawn(run: Run, tiny: Path) -> None:
    flags = (
        "generate",
        tiny,
        "--prompt",
        PROMPT,
        "--max-tokens",
        "12",
        "--temperature",
        "1.5",
        "--ignore-eos",
        *SIXTEEN,
    )
    texts = [done(run(*flags, "--seed", seed)).out for seed in ("5", "5", "6")]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_may_begin_with_a_dash(run: Run, tiny: Path) -> None:
    assert done(run("generate", tiny, "--prompt", "- one", "--max_tokens", "2", *SIXTEEN)).out


def test_underscores_become_dashes_in_names_only() -> None:
    line = ["generate", "a_b", "--max_model_len", "5", "--stop=a_b", "--top_p=0_5", "-q", "--", "--x_y"]
    assert with_dashes(line) == [
        "generate", "a_b", "--max-model-len", "5", "--stop=a_b", "--top-p=0_5", "-q", "--", "--x_y",
    ]  # fmt: skip


def test_ranges() -> None:
    assert whole_numbers("0,10", "x") == [0, 10]
    assert whole_numbers("0-3, 7", "x") == [0, 1, 2, 3, 7]


def test_order_of_flag_environment_file_default(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("precision: w8a8kv4\nmax-model-len: 128\nseed: 4\n")
    monkeypatch.setenv("OMNISERVE_MAX_MODEL_LEN", "96")
    settings = json.loads(done(run("doctor", "--config", "c.yaml", "--json")).out)["settings"]
    assert settings["precision"] == {"value": "w8a8kv4", "origin": "c.yaml"}
    assert settings["max_model_len"] == {"value": 96, "origin": "OMNISERVE_MAX_MODEL_LEN"}
    assert settings["dtype"] == {"value": "auto", "origin": "default"}
    flags = ("generate", tiny, "--prompt", "a", "--max-tokens", "1", "--config", "c.yaml")
    assert "w8a8kv4 on cpu" in done(run(*flags)).err
    assert "context 96;" in done(run(*flags)).err
    ran = done(run(*flags, "--precision", "w8a8", "--max-model-len", "64"))
    assert "w8a8kv8 on cpu" in ran.err
    assert "context 64;" in ran.err


def test_doctor_reports(run: Run) -> None:
    report = json.loads(done(run("doctor", "--json")).out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["cores"] >= 1
    assert report["memory_bytes"] >= report["memory_available_bytes"] > 0
    assert len(report["implementations"]["cpu"]) > 3
    text = done(run("doctor")).out
    assert all(name in text for name in report["implementations"]["cpu"])
    assert "settings" not in text


def test_warmup_without_a_gpu(run: Run, tmp_path: Path) -> None:
    flags = ("warmup", "--dummy-weights", "--shape", "tiny", "--device", "cpu", "--cache-dir", tmp_path / "kernels")
    ran = done(run(*flags))
    assert "nothing to compile" in ran.out
    told = json.loads(done(run(*flags, "--json")).out)
    assert (told["device"], told["kernels"]) == ("cpu", None)
    assert told["seconds"]["load"] > 0
    assert not (tmp_path / "kernels").exists()


def test_chat_one_shot(run: Run, tiny: Path) -> None:
    flags = ("chat", tiny, "-q", "Is water wet?", "--max-tokens", "8", "--ignore-eos", *SIXTEEN)
    ran = done(run(*flags, "--stats"))
    again = done(run(*flags))
    assert ran.out == again.out != "\n"
    assert "8 tokens, first after" in ran.err
    assert "8 tokens" not in again.err
    assert done(run(*flags, "--system", "Answer in rhymes.")).out != ran.out


def test_conversation_from_a_pipe(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """History grows, a refused line leaves it as it was, /clear forgets it, /exit leaves."""
    flags = ("chat", tiny, "--max-tokens", "6", "--ignore-eos", "--stats", *SIXTEEN)
    lines = ["one", "one", "Zq" * 400, "/clear", "one", "/exit", "one"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    ran = done(run(*flags))
    counts = [line.split()[0] for line in ran.err.splitlines() if "prompt tokens" in line]
    assert len(counts) == 3
    assert counts[0] == counts[2]
    assert int(counts[1]) > int(counts[0])
    assert ran.err.count("omniserve: error: ") == 1
    assert "/clear starts a new conversation" in ran.err


def test_interrupted_answer_does_not_end_the_conversation(
    run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during an answer ends it; the next question is answered by the same engine."""
    stream_chat = LLM.stream_chat
    asked: list[int] = []

    def interrupted(self: LLM, messages: Any, params: Any = None) -> Any:
        asked.append(len(messages))
        for place, delta in enumerate(stream_chat(self, messages, params)):
            if len(asked) == 1 and place == 3:
                signal.raise_signal(signal.SIGINT)
            yield delta

    monkeypatch.setattr(LLM, "stream_chat", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    ran = done(run("chat", tiny, "--max-tokens", "30", "--ignore-eos", "--stats", *SIXTEEN))
    stats = [line for line in ran.err.splitlines() if "first after" in line]
    assert asked == [1, 3]
    assert stats[0].startswith("4 tokens,")
    assert "30 tokens," in stats[1]


def test_perplexity_equals_transformers(run: Run, tiny: Path, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. Is water wet? " * 8)
    flags = ("eval", "perplexity", tiny, "--text", "t.txt", "--length", "64", "--windows", "0,2", "--json", *SIXTEEN)
    found = json.loads(done(run(*flags)).out)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))
    ids = tokenizer((tmp_path / "t.txt").read_text(), add_special_tokens=False)["input_ids"]
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    losses = []
    with torch.inference_mode():
        for start in (0, 128):
            window = torch.tensor([ids[start : start + 64]])
            losses.append(network(window, labels=window).loss.item())
    assert found["windows"] == [0, 2]
    assert found["rows"][0]["predictions"] == 126
    assert found["rows"][0]["nll"] == pytest.approx(sum(losses) / 2, abs=2e-3)
    assert found["rows"][0]["kl"] is None


def test_perplexity_table_against_a_reference(run: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. Is water wet? " * 8)
    flags = ("eval", "perplexity", tiny, "--text", "t.txt", "--length", "100", "--reference", "w16a16kv16")
    ran = done(run(*flags, "--precisions", "all", "--json", "--max-num-batched-tokens", "48"))
    rows = {row["precision"]: row for row in json.loads(ran.out)["rows"]}
    assert len(rows) == 9
    assert rows["w16a16kv16"]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows["w16a16kv16"]["top1_agreement"] == 1
    assert rows["w8a8kv8"]["kl"] > 0
    table = done(run(*flags, "--precisions", "w16a16kv16,w8a8kv8")).out
    assert "top-1 agreement" in table
    assert "w8a8kv8" in table


class Chunks:
    """Stands in for an engine: fixed logits, handed out in chunks from one reused buffer."""

    def __init__(self, logits: torch.Tensor, chunk: int) -> None:
        self.logits, self.chunk, self.scored = logits, chunk, 0

    def score(self, ids: Sequence[int], reduce: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        buffer = torch.empty(self.chunk, self.logits.shape[1])
        for start in range(0, len(ids), self.chunk):
            count = min(self.chunk, len(ids) - start)
            buffer.fill_(float("nan"))
            buffer[:count] = self.logits[start : start + count]
            reduce(torch.arange(start, start + count), buffer[:count])
        self.scored += 1


@pytest.mark.parametrize(("mine", "theirs"), [(7, 7), (7, 3), (3, 7), (100, 1), (1, 100), (16, 5)])
def test_divergence_whatever_the_chunks(mine: int, theirs: int) -> None:
    """KL and agreement are those of the whole, however either engine cuts its work."""
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(33, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    windows = [torch.randint(50, (n,), generator=generator).tolist() for n in (33, 20)]
    other = Chunks(p.float(), theirs)
    score = measure(cast(LLM, Chunks(q.float(), mine)), windows, reference=cast(LLM, other))
    nll = kl = equal = 0.0
    for window in windows:
        rows = len(window) - 1
        log_q, log_p = q[:rows].log_softmax(1), p[:rows].log_softmax(1)
        nll -= sum(log_q[i, window[i + 1]].item() for i in range(rows))
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        equal += (q[:rows].argmax(1) == p[:rows].argmax(1)).sum().item()
    assert score.predictions == 51
    assert score.nll == pytest.approx(nll / 51, abs=1e-5)
    assert score.kl == pytest.approx(kl / 51, abs=1e-5)
    assert score.agreement == pytest.approx(equal / 51)
    assert other.scored == 2


def test_errors_of_either_engine_are_raised() -> None:
    class Broken(Chunks):
        def score(self, ids: Sequence[int], reduce: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
            super().score(ids[:4], reduce)
            raise ZeroDivisionError

    logits = torch.zeros(8, 5)
    good, bad = (cast(LLM, kind(logits, 4)) for kind in (Chunks, Broken))
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ZeroDivisionError):
            measure(pair[0], [[0] * 8], reference=pair[1])


def test_windows() -> None:
    ids = list(range(10))
    assert cut(ids, length=4, stride=4) == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    assert cut(ids, length=4, stride=3, which=[2]) == {2: [6, 7, 8, 9]}
    assert cut(ids, length=20, stride=20) == {0: ids}


def test_throughput_beside_transformers(run: Run, tiny: Path) -> None:
    flags = ("bench", "throughput", tiny, "--batch", "1,3", "--input-len", "9", "--output-len", "8", "--repeats", "1")
    found = json.loads(done(run(*flags, "--peer", "transformers", "--json", *SIXTEEN)).out)
    ours = [row for row in found["rows"] if row["runner"] == "w16a16kv16"]
    assert [row["batch"] for row in found["rows"]] == [1, 1, 3, 3]
    assert [row["same_tokens"] for row in ours] == [1, 1]
    for row, peer in zip(ours, found["rows"][1::2], strict=True):  # a busy machine may leave no time for decoding
        rates = [one["decode_tokens_per_second"] for one in (row, peer)]
        assert row["decode_ratio"] == (None if None in rates else pytest.approx(rates[0] / rates[1]))
        assert row["prompt_tokens_per_second"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    ran = done(run(*flags, "--precisions", "w8a8kv8,w4a8kv4"))
    assert "w4a8kv4 g128" in ran.out
    assert "decode vs peer" not in ran.out
    assert torch.__version__ in ran.err


def test_demo(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole tour, with the tiny model in the place of the real one; the second time nothing is calibrated."""
    monkeypatch.setattr(demo, "find_smollm2", lambda folder: tiny)
    monkeypatch.setattr(demo, "WINDOW", 64)
    monkeypatch.setattr(demo, "SAMPLES", 1)
    ran = done(run("demo", "--yes", "--download-dir", str(tmp_path)))
    assert demo.QUESTION in ran.out
    assert "Apache-2.0" in ran.out
    for precision in ("w16a16kv16", "w8a8kv8", "w4a8kv4 g128 (uncalibrated)", "w4a8kv4 g128 (calibrated)"):
        assert precision in ran.out
    assert "tokens/s" in ran.out
    (made,) = tmp_path.glob("*/config.json")
    assert f"chat {made.parent}" in ran.out
    assert "calibrating" in ran.err
    again = done(run("demo", "--yes", "--download-dir", str(tmp_path)))
    assert "calibrating" not in again.err


def test_demo_fetches_what_is_not_there(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def fetch(folder: Path, *, progress: Callable[[str], None]) -> Path:
        asked.append(folder)
        return tiny

    monkeypatch.setattr(demo, "find_smollm2", lambda folder: None)
    monkeypatch.setattr(demo, "fetch_smollm2", fetch)
    assert demo._model(tmp_path, ask=False) == tiny
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert demo._model(tmp_path, ask=True) == tiny
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    with pytest.raises(Exception, match="needs its model"):
        demo._model(tmp_path, ask=True)
    assert asked == [tmp_path, tmp_path]


def test_interrupt_ends_a_command_at_once(smollm2: Path, tmp_path: Path) -> None:
    """A real Ctrl-C during a long answer: 130 within two seconds, no traceback.

    The best of three tries counts: on a machine whose cores are all busy one may have to wait for its turn.
    """
    command = [sys.executable, "-m", "omniserve", "generate", str(smollm2), "--prompt", "Once", "--ignore-eos"]
    command += ["--max-tokens", "4000", "--precision", "w8a8kv8"]

    def interrupted() -> float:
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(10)
            began = time.perf_counter()
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
            assert process.returncode == 130
            assert b"Traceback" not in process.stderr.read()
            return time.perf_counter() - began

    assert any(interrupted() < 2 for _ in range(3))


def test_reader_that_hangs_up(tiny: Path, tmp_path: Path) -> None:
    """`omniserve generate | head -c 1` ends quietly."""
    command = f"{sys.executable} -m omniserve generate {tiny} --prompt a --ignore-eos --max-tokens 200 | head -c 1"
    ran = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True)
    assert len(ran.stdout) == 1
    assert b"Broken" not in ran.stderr
    assert b"Traceback" not in ran.stderr

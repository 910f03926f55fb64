"""aiperf with a tenth of its requests cancelled: `python use_aiperf.py http://127.0.0.1:8000 MODEL FOLDER`.

MODEL is what the server serves, FOLDER holds aiperf's executables. Runs where omniserve is installed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import checks

REQUESTS = 60
CANCELLED = {"code": 499, "type": "RequestCancellationError"}


def main(url: str, path: str, bin_folder: str) -> None:
    before = checks.metrics(url)[checks.ABORTED]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, out = Path(folder, "tokenizer"), Path(folder, "out")
        checks.export_tokenizer(path, tokenizer)
        command = [Path(bin_folder, "aiperf"), "profile", "-m", checks.model(url), "--url", url, "--ui", "none"]
        command += ["--endpoint-type", "chat", "--streaming", "--tokenizer", tokenizer, "--artifact-dir", out]
        command += [
            "--synthetic-input-tokens-mean",
            64,
            "--output-tokens-mean",
            24,
            "--extra-inputs",
            "ignore_eos:true",
        ]
        command += ["--concurrency", 4, "--request-count", REQUESTS, "--random-seed", 7]
        command += ["--request-cancellation-rate", 10, "--request-cancellation-delay", 0.1]
        # a tokenizer folder is refused where the hub is switched off
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        checks.command(command, environment | {"HF_HOME": str(Path(folder, "cache"))})
        records = [json.loads(line) for line in (out / "profile_export.jsonl").read_text().splitlines()]
    errors = [record["error"] for record in records if record.get("error")]
    assert len(records) == REQUESTS, len(records)
    assert 0 < len(errors) < REQUESTS / 2, errors
    assert all(error.items() >= CANCELLED.items() for error in errors), errors
    first = sorted(r["metrics"]["time_to_first_token"]["value"] for r in records if not r.get("error"))
    print(f"{REQUESTS} requests: {len(first)} answered, {len(errors)} cancelled, no other error")
    print(f"median time to first token {first[len(first) // 2]:.0f} ms")
    idle = checks.until_idle(url)
    print(f"after it: {idle}; the server dropped {checks.metrics(url)[checks.ABORTED] - before:g}")


if __name__ == "__main__":
    main(*sys.argv[1:])

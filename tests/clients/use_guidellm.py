"""guidellm with four streams at once: `python use_guidellm.py http://127.0.0.1:8000 MODEL FOLDER`.

MODEL is what the server serves, FOLDER holds guidellm's executables. Runs where omniserve is installed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import checks

REQUESTS = 20


def main(url: str, path: str, bin_folder: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, out = Path(folder, "tokenizer"), Path(folder, "out.json")
        checks.export_tokenizer(path, tokenizer)
        command = [Path(bin_folder, "guidellm"), "run", "--disable-console-interactive"]
        command += ["--backend", f"kind=openai_http,target={url},model={checks.model(url)}"]
        command += ["--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}"]
        command += ["--tokenizer", f"kind=huggingface_auto,model={tokenizer}"]
        command += ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"]
        command += ["--output", f"kind=json,path={out}"]
        checks.command(command, {**os.environ, "HF_HOME": str(Path(folder, "cache"))}, cwd=folder)
        (benchmark,) = json.loads(out.read_text())["benchmarks"]
    requests = benchmark["requests"]
    counts = {kind: len(requests[kind]) for kind in ("successful", "incomplete", "errored")}
    print(f"{REQUESTS} requests: {counts}")
    assert counts == {"successful": REQUESTS, "incomplete": 0, "errored": 0}
    print(f"after it: {checks.until_idle(url)}")


if __name__ == "__main__":
    main(*sys.argv[1:])

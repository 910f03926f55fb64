"""hey, then wrk: `python use_hey.py http://127.0.0.1:8000`. Both are packages of Debian.

hey sends whole requests and counts statuses; wrk goes away in the middle of its last ones.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import checks

REQUESTS, AT_ONCE = 64, 8
SECONDS = 10


def main(url: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "model": checks.model(url)}
    chat = f"{url}/v1/chat/completions"
    hey = ["hey", "-n", REQUESTS, "-c", AT_ONCE, "-t", 0, "-m", "POST", "-T", "application/json"]
    text = checks.command([*hey, "-d", json.dumps(body), chat])
    statuses = re.findall(r"\[(\d+)\]\s+(\d+) responses", text)
    print(f"hey: {REQUESTS} requests, {AT_ONCE} at once; statuses {statuses}")
    assert statuses == [("200", str(REQUESTS))], text
    assert "Error distribution" not in text, text
    before = checks.metrics(url)[checks.ABORTED]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(
            'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
            f"wrk.body = [[{json.dumps(body)}]]\n"
        )
        text = checks.command(["wrk", "-t1", f"-c{AT_ONCE}", f"-d{SECONDS}s", "--timeout", "60s", "-s", script, chat])
    (answered,) = re.findall(r"(\d+) requests in", text)
    assert int(answered) > 0, text
    assert "Non-2xx" not in text, text
    assert "Socket errors" not in text, text
    idle = checks.until_idle(url)
    dropped = checks.metrics(url)[checks.ABORTED] - before
    print(f"wrk: {answered} requests in {SECONDS} s, all answered with 200")
    print(f"after it: {idle}; the server dropped {dropped:g}, which wrk had left")


if __name__ == "__main__":
    main(*sys.argv[1:])

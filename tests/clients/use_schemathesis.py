"""schemathesis over the whole OpenAPI file: `python use_schemathesis.py http://127.0.0.1:8000 KEY EXAMPLES`.

Runs in the environment that schemathesis is installed in. The server should be one with the dummy model and a context
of 128 tokens: most time goes into answers. Fails for a 5xx other than 501, for statuses, content types and bodies that
the file does not declare, and for wrong values that are taken.
"""

import subprocess
import sys
from pathlib import Path

import checks

HERE = Path(__file__).resolve().parent
ENDLESS = "/engine/stats"
"""A stream without an end: schemathesis would wait for it for ever."""


def main(url: str, key: str, examples: str) -> int:
    command = [
        Path(sys.executable).with_name("schemathesis"),
        "--no-color",
        "--config-file",
        HERE / "schemathesis.toml",
    ]
    command += ["run", f"{url}/openapi.json", "--max-examples", examples, "--exclude-path", ENDLESS]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--generation-deterministic"]
    command += ["--request-timeout", "60", "-H", f"Authorization: Bearer {key}"]
    code = subprocess.run([str(word) for word in command]).returncode
    print(f"after it: {checks.until_idle(url, key)}")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

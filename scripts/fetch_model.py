"""Put the model of the tests into `.models/` of this checkout; `make model` calls it.

The file itself is kept in the user's cache, which the demo shares; `.models/` holds a link to it. Where that cache
cannot be written, the file goes into `.models/`.
"""

import os
import sys
from pathlib import Path

from omniserve.base.errors import OmniserveError
from omniserve.cli.models import SMOLLM2, fetch_smollm2, find_smollm2, model_directory

MODELS = Path(__file__).resolve().parent.parent / ".models"


def writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def main() -> int:
    if find_smollm2(MODELS):
        return 0
    cache = model_directory()
    try:
        path = fetch_smollm2(cache if writable(cache) else MODELS, progress=print)
    except OmniserveError as error:
        print(error, file=sys.stderr)
        return 2
    link = MODELS / SMOLLM2
    if path != link:
        MODELS.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    print(f"{link} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One logger for the package: one line per event, `event key=value ...`."""

import logging
import sys

_ROOT = logging.getLogger("omniserve")
_ROOT.addHandler(logging.NullHandler())

LEVELS = ("debug", "info", "warning", "error")


def get(name: str) -> logging.Logger:
    """Return the logger of the module `name`, below the package's logger."""
    return logging.getLogger(name)


def configure(level: str) -> None:
    """Send the package's log to standard error from `level` on; called by the command line only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    _ROOT.handlers = [handler]
    _ROOT.setLevel(level.upper())


def fields(**values: object) -> str:
    """Return `key=value` pairs of a log line; control characters are escaped."""
    return " ".join(f"{key}={_escape(str(value))}" for key, value in values.items())


def _escape(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii") if not text.isprintable() else text

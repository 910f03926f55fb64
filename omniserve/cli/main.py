"""The command `omniserve`: exit codes, and one sentence for every mistake.

Little is imported before `main` runs, so that Ctrl-C ends even the first instant without a traceback.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from omniserve.base.errors import OmniserveError
from omniserve.cli.exits import INTERNAL, INTERRUPTED, OK, USAGE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    try:
        _replace_what_cannot_be_printed()
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        _last_words("")
        return INTERRUPTED
    except BrokenPipeError:
        return _hang_up()


def _run(tokens: list[str]) -> int:
    from cyclopts import CycloptsError

    from omniserve.base import log
    from omniserve.cli.app import parse, usage

    debug = False
    try:
        command, common = parse(tokens)
        debug = common.log_level == "debug"
        log.configure(common.log_level or "warning")
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except CycloptsError as error:
        return _refuse(usage(error))
    except OmniserveError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "omniserve").split(".")[0]
        if package == "omniserve":
            return _internal(error, debug)
        return _refuse(f"the package {package} is missing: pip install {package}")
    except Exception as error:  # the program's top level: whatever it is, it ends in one line
        return _internal(error, debug)


def _refuse(sentence: str) -> int:
    """Report a mistake of the user."""
    _last_words(f"omniserve: error: {sentence}")
    return USAGE


def _internal(error: Exception, debug: bool) -> int:
    """Report a mistake of ours in one line."""
    if debug:
        import traceback

        traceback.print_exception(error)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    _last_words(f"omniserve: internal error: {what}; run `omniserve doctor` and report both")
    return INTERNAL


def _last_words(text: str) -> None:
    """Print a line on standard error after what was already written; a closed pipe is none of its business."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _hang_up() -> int:
    """Leave quietly when the reader of standard output has gone."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OK


def _replace_what_cannot_be_printed() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

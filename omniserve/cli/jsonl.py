"""Lines of JSON, in and out: a prompt file of any size, and an output that a killed run can be resumed from.

The output is the only record of what is done. A line of it is written in one piece when its answer is whole, so that a
process killed at any moment leaves at most one torn line, the last, which the next run cuts off; every SYNC_SECONDS and
at the end the file is flushed to the disk, so that a power failure costs no more than that. Beside it OUT.job says what
the answers were made from; a run that would make others refuses to go on.
"""

import fcntl
import hashlib
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from omniserve.base.errors import CapacityError, ConfigError, RequestError

LONGEST_LINE = 16 << 20
"""Bytes of a line; longer ones are reported."""
WINDOW = 1024
"""Answers of an ordered run that wait for an earlier one; then nothing new is begun until it is there."""
SYNC_SECONDS = 5.0
"""Between two times that the output is flushed to the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """The lines of a prompt file that hold something, by their number, from 1.

    filled  how many there are; last: the number of the last one; digest: SHA-256 of the file
    state   size and time of the file when it was read
    """

    path: Path
    digest: str
    filled: int
    last: int
    state: tuple[int, int]

    @staticmethod
    def scan(path: Path, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> "Lines":
        """Read the file once."""
        digest, done, filled, last = hashlib.sha256(), 0, 0, 0
        with path.open("rb") as file:
            state = _state(file)
            for number, pieces in _pieces(file):
                holds = False
                for piece in pieces:
                    digest.update(piece)
                    done += len(piece)
                    holds = holds or not piece.isspace()
                if holds:
                    filled, last = filled + 1, number
                if number % 4096 == 0:
                    on_progress(done, state[0])
        return Lines(path=path, digest=digest.hexdigest(), filled=filled, last=last, state=state)

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield number and content; None for a line that is longer than LONGEST_LINE.

        Raises ConfigError if the file was changed since it was scanned.
        """
        with self.path.open("rb") as file:
            for number, pieces in _pieces(file):
                content: bytes | None = b""
                for piece in pieces:
                    if content is not None:
                        content = None if len(content) + len(piece) > LONGEST_LINE else content + piece
                if number > self.last:
                    break
                if content is None or content.strip():
                    yield number, content
            if _state(file) != self.state:
                raise ConfigError(f"{self.path}: was changed while it was read: start again with --overwrite")


def _state(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def _pieces(file: BinaryIO) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Yield the number of each line and its pieces, which must be taken before the next line."""

    def rest(piece: bytes) -> Iterator[bytes]:
        while piece:
            yield piece
            piece = b"" if piece.endswith(b"\n") else file.readline(1 << 20)

    for number in count(1):
        first = file.readline(1 << 20)
        if not first:
            return
        yield number, rest(first)


def fingerprint(model: str) -> str:
    """Return a hash of a model file or folder: names, sizes, the first and last MiB of each file. Else its name."""
    path = Path(model)
    if not path.exists():
        return model
    wanted = {".gguf", ".jinja", ".json", ".model", ".safetensors", ".tsv"}
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.suffix in wanted)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            size = file.stat().st_size
            digest.update(f"{'' if path.is_file() else file.name}\0{size}\0".encode())
            digest.update(content.read(1 << 20))
            content.seek(max(size - (1 << 20), 0))
            digest.update(content.read())
    return digest.hexdigest()


def short(value: object) -> str:
    """Return a value for a sentence."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def as_bytes(text: str) -> bytes:
    """Return JSON as UTF-8; half a surrogate pair, which has none, becomes JSON's escape."""
    return text.encode("utf-8", "backslashreplace")


def job_file(target: Path) -> Path:
    """Return the file beside an output that says what its answers are made from."""
    return target.with_name(target.name + ".job")


def json_object(line: int, content: bytes | None, keys: str) -> dict[str, Any]:
    """Return the JSON object that a line holds; `keys` says which ones it should have. Raises RequestError."""
    if content is None:
        raise RequestError(f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        text = content.decode("utf-8-sig" if line == 1 else "utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"not valid JSON: {error.msg} (character {error.pos})") from None
    except (ValueError, RecursionError):
        raise RequestError("not valid JSON: nested too deeply, or a number with too many digits") from None
    if not isinstance(value, dict):
        raise RequestError(f"not a JSON object with {keys}")
    return value


class Names:
    """Whose each name is: in a temporary file of SQLite's, so that memory stays bounded."""

    def __init__(self) -> None:
        self._names = sqlite3.connect("", isolation_level=None)
        self._names.execute("PRAGMA journal_mode = OFF")
        self._names.execute("CREATE TABLE names (name BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def owner(self, name: str | int | float, line: int) -> int:
        """Return the first line that has this name, which is `line` if none had it before."""
        key = hashlib.blake2b(as_bytes(json.dumps(name)), digest_size=16).digest()
        self._names.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (key, line))
        first: int = self._names.execute("SELECT line FROM names WHERE name = ?", (key,)).fetchone()[0]
        return first


@dataclass(frozen=True, slots=True)
class Marks:
    """How a line of an output says which line of the input it answers (None: it does not), and whether it failed."""

    line: Callable[[Mapping[str, object]], object]
    failed: Callable[[Mapping[str, object]], bool]


OWN_MARKS = Marks(lambda answer: answer.get("line"), lambda answer: "error" in answer)
"""Those of `generate --prompt-file`."""


class Output:
    """The output file, open for appending by this process alone.

    Invariant: every line in it is whole, and answers a line of the input that no other one answers.

    facts     what answers depend on, by name; the values of JSON
    last      number of the input's last line
    marks     how its lines are read
    answered, errors, torn
              lines found in it with an answer, with an error; bytes cut off at its end
    Raises ConfigError if it holds something else than the beginning of this run.
    """

    def __init__(
        self,
        path: Path,
        facts: Mapping[str, object],
        last: int,
        *,
        ordered: bool,
        overwrite: bool,
        marks: Marks = OWN_MARKS,
    ) -> None:
        self.path = path
        self._marks = marks
        self.answered = self.errors = self.torn = self.latest = 0
        self._done = bytearray(last // 8 + 1)
        self._last = last
        self._ordered = ordered
        self._synced = time.monotonic()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._take(facts, overwrite)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
        except BaseException:
            os.close(self._file)
            raise

    @staticmethod
    def check(path: Path, facts: Mapping[str, object], *, overwrite: bool) -> None:
        """Raise ConfigError if the file holds what was not made from these facts, as far as they are known yet."""
        if overwrite or not path.exists() or path.stat().st_size == 0:
            return
        job = job_file(path)
        again = "give another --output, or --overwrite to start again"
        try:
            begun = json.loads(job.read_bytes())["facts"]
            differing = [name for name in facts if begun.get(name, _ABSENT) != _plain(facts[name])]
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: holds something, but no run was begun in it ({job} is missing): {again}"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise ConfigError(f"{job}: cannot be read, so nothing tells what {path} was made from: {again}") from None
        if differing:
            shown = ", ".join(_difference(name, begun.get(name, _ABSENT), facts[name]) for name in differing)
            raise ConfigError(f"{path}: was begun with other settings ({shown}): {again}")

    def _take(self, facts: Mapping[str, object], overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another process is writing it: wait for it, or end it") from None
        self.check(self.path, facts, overwrite=overwrite)
        if overwrite:
            os.ftruncate(self._file, 0)
        if os.fstat(self._file).st_size == 0:
            self._begin(facts)
        else:
            self._mend()

    def _begin(self, facts: Mapping[str, object]) -> None:
        from omniserve import __version__

        job = job_file(self.path)
        draft = job.with_name(job.name + ".draft")
        with draft.open("w", encoding="utf-8") as file:
            json.dump({"omniserve": __version__, "facts": {n: _plain(v) for n, v in facts.items()}}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(job)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _mend(self) -> None:
        """Note which lines are there, and cut off what was torn at the end."""
        place, torn = 0, None
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for row, content in enumerate(file, start=1):
                answer = self._whole(content)
                if answer is None:
                    torn = place if torn is None else torn
                elif torn is not None or not self._note(answer):
                    raise ConfigError(
                        f"{self.path}: line {row} or one before it was changed by something else: mend it, "
                        "or give --overwrite to start again"
                    )
                place += len(content)
        if torn is not None:
            self.torn = place - torn
            os.ftruncate(self._file, torn)

    def _note(self, answer: Mapping[str, object]) -> bool:
        """Note a line that is in the file; False if it cannot be."""
        line = self._marks.line(answer)
        assert isinstance(line, int)
        if not 1 <= line <= self._last or line in self or (self._ordered and line < self.latest):
            return False
        self._done[line // 8] |= 1 << line % 8
        self.latest = max(self.latest, line)
        failed = self._marks.failed(answer)
        self.errors += failed
        self.answered += not failed
        return True

    def _whole(self, content: bytes) -> dict[str, object] | None:
        """Return the object in a line of the file; None if the line is torn."""
        if not content.endswith(b"\n"):
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) and type(self._marks.line(value)) is int else None

    @property
    def filled(self) -> int:
        """How many lines it holds."""
        return self.answered + self.errors

    def __contains__(self, line: int) -> bool:
        """Whether a line of the input has its line in the output."""
        return bool(self._done[line // 8] >> line % 8 & 1)

    def append(self, answer: Mapping[str, object]) -> None:
        """Write one line."""
        noted = self._note(answer)
        assert noted, self._marks.line(answer)
        content = memoryview(as_bytes(json.dumps(answer, ensure_ascii=False, allow_nan=False)) + b"\n")
        try:
            while content:
                content = content[os.write(self._file, content) :]
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise CapacityError(
                f"{self.path}: cannot be written ({error.strerror}): mend that, and the same command goes on"
            ) from None

    def sync(self) -> None:
        """Flush what was written to the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        try:
            if kind is None:
                self.sync()
        finally:
            os.close(self._file)
        return False


_ABSENT = object()


def _plain(value: object) -> object:
    """Return a value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def _difference(name: str, before: object, now: object) -> str:
    if name in ("input", "model", "chat_template"):
        return f"another {name.replace('_', ' ')}"
    return f"{name} {'not given' if before is _ABSENT else short(before)}, now {short(_plain(now))}"


class InOrder:
    """Answers on their way into an output: those that come before their turn wait for it, unless any order will do."""

    def __init__(self, output: Output, *, ordered: bool) -> None:
        self._output = output
        self._ordered = ordered
        self._due: deque[int] = deque()  # lines that were taken and not written, in their order
        self._held: dict[int, Mapping[str, object]] = {}  # those of them that are answered

    @property
    def full(self) -> bool:
        """Whether too many answers wait for an earlier one: nothing new should be begun."""
        return len(self._due) >= WINDOW

    @property
    def empty(self) -> bool:
        """Whether every line that was taken is written."""
        return not self._due

    def take(self, line: int) -> None:
        """Note that a line will be answered. Raises ConfigError if it cannot have its place any more."""
        if self._ordered and line < self._output.latest:
            raise ConfigError(
                f"{self._output.path}: has lines after line {line} but not that one: give --overwrite to start again"
            )
        self._due.append(line)

    def write(self, line: int, answer: Mapping[str, object]) -> None:
        """Write the answer to a line that was taken, as soon as it is its turn."""
        if not self._ordered:
            self._due.remove(line)
            self._output.append(answer)
            return
        self._held[line] = answer
        while self._due and self._due[0] in self._held:
            self._output.append(self._held.pop(self._due.popleft()))

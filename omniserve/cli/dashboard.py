"""The screen of `omniserve top`: one snapshot after the other of /engine/stats, drawn with textual."""

import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import DataTable, Footer, Sparkline, Static

HISTORY = 240
"""Snapshots that the lines show: a minute's worth."""
CELLS = {"f": ("·", "grey50"), "c": ("▪", "blue"), "h": ("■", "green"), "s": ("■", "yellow")}
WORDS = {"f": "free", "c": "cached", "h": "held", "s": "shared"}
LINES = {
    "tokens_per_second": "tokens/s",
    "prompt_tokens_per_second": "prompt tokens/s",
    "ttft_ms": "time to first token, ms (median)",
    "itl_ms": "between tokens, ms (median)",
}


class Dashboard(App[str]):
    """Shows snapshots as they come.

    root   where the server is, for the title
    first  a snapshot to begin with; feed: further ones, or sentences while there are none
    """

    TITLE = "omniserve top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Leave"),
        Binding("p", "pause", "Pause"),
    ]
    CSS = """
    #title { height: 1; background: $boost; }
    #numbers { height: auto; padding: 0 1; }
    .line { height: 4; padding: 0 1; width: 1fr; }
    .line Static { height: 1; }
    .line Sparkline { height: 2; }
    #lines { height: 8; }
    #pages { height: auto; padding: 0 1; }
    #requests { height: auto; max-height: 20; }
    """

    def __init__(self, root: str, first: Mapping[str, Any], feed: AsyncIterator[dict[str, Any] | str]) -> None:
        super().__init__()
        self._root = root
        self._first = first
        self._feed = feed
        self._paused = False
        self._last = first
        self._history: dict[str, deque[float]] = {name: deque(maxlen=HISTORY) for name in LINES}

    def compose(self) -> ComposeResult:
        """Lay out the screen."""
        yield Static(id="title")
        with VerticalScroll():
            yield Static(id="numbers")
            with Vertical(id="lines"):
                names = list(LINES)
                for pair in (names[:2], names[2:]):
                    with Horizontal():
                        for name in pair:
                            with Vertical(classes="line"):
                                yield Static(id=f"{name}-words")
                                yield Sparkline(id=name, summary_function=max)
            yield Static(id="pages")
            yield DataTable(id="requests", show_cursor=False)
        yield Footer()

    def on_mount(self) -> None:
        """Show the first snapshot and begin to read."""
        self.query_one(DataTable).add_columns("running request", "pages held", "pages read")
        self.show(self._first)
        self.run_worker(self._read(), exclusive=True)

    async def _read(self) -> None:
        async for found in self._feed:
            if isinstance(found, str):
                self.lost(found)
            elif not self._paused:
                self.show(found)

    def action_pause(self) -> None:
        """Stop or go on showing what comes."""
        self._paused = not self._paused
        self._title(self._last, "paused" if self._paused else "")

    def lost(self, sentence: str) -> None:
        """Say that nothing comes any more; the last numbers stay."""
        self._title(self._last, sentence, style="bold red")

    def show(self, found: Mapping[str, Any]) -> None:
        """Draw a snapshot."""
        self._last = found
        self._title(found, "")
        self.query_one("#numbers", Static).update(numbers(found))
        for name, words in LINES.items():
            value = found.get(name)
            value = value.get("p50") if isinstance(value, dict) else value
            history = self._history[name]
            history.append(float(value or 0))
            self.query_one(f"#{name}", Sparkline).data = list(history)
            shown = "-" if value is None else f"{value:,.1f}"
            self.query_one(f"#{name}-words", Static).update(f"{words}: {shown}, highest {max(history):,.1f}")
        self.query_one("#pages", Static).update(pages(found["kv_pages"]))
        table = self.query_one(DataTable)
        table.clear()
        for number, request in enumerate(found.get("requests") or (), start=1):
            table.add_row(str(number), str(request["held"]), str(request["read"]))

    def _title(self, found: Mapping[str, Any], note: str, *, style: str = "bold yellow") -> None:
        text = Text(f" {found.get('model')}", style="bold", no_wrap=True)
        clock = time.strftime("%H:%M:%S", time.localtime(found["time"]))
        text.append(f"  {found.get('precision') or '-'}  {found.get('state')}  {self._root}  {clock}", style="none")
        if note:
            text.append(f"  {note}", style=style)
        self.query_one("#title", Static).update(text)


def numbers(found: Mapping[str, Any]) -> Text:
    """Return the counts in two lines."""
    cache = found.get("prefix_cache") or {}
    queries = cache.get("queries") or 0
    hits = f"{cache.get('hits', 0) / queries:.0%}" if queries else "-"
    age = found.get("queue_age") or 0.0
    first = [
        f"running {found['running']}",
        f"waiting {found['waiting']}" + (f" (oldest {age:.1f} s)" if age else ""),
        f"open {found.get('open_sequences', 0)}",
        f"preemptions {found.get('preemptions', 0)}",
        f"prefix cache {hits} of {queries:,} tokens",
    ]
    second = [f"{name} {_percentiles(found.get(key))}" for name, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms"))]
    if found.get("kv_bytes_per_token"):
        sixteen = found.get("kv_bytes_per_token_fp16")
        against = f" (16 bit: {sixteen:,} B)" if sixteen else ""
        second.append(f"KV {found['kv_bytes_per_token']:,} B per token{against}")
    return Text("   ".join(first) + "\n" + "   ".join(second))


def _percentiles(found: Mapping[str, float] | None) -> str:
    if not found:
        return "-"
    return " ".join(f"{name} {value:.1f}" for name, value in found.items()) + " ms"


def pages(kinds: Mapping[str, Mapping[str, Any]]) -> Text:
    """Return the pools: their counts, and a map in which a cell is a page or several."""
    text = Text()
    for kind, pool in kinds.items():
        total, held, cached, shared = (int(pool.get(name) or 0) for name in ("total", "held", "cached", "shared"))
        text.append(f"\n{kind} pages", style="bold")
        share = f"{held / total:.1%}" if total else "-"
        text.append(f"  {held:,} of {total:,} held ({share}), {shared:,} of them shared, {cached:,} cached\n")
        found = pool.get("map")
        if found:
            for letter in found["cells"]:
                mark, style = CELLS.get(letter, ("?", "red"))
                text.append(mark, style=style)
            each = "" if found["pages_per_cell"] == 1 else f", {found['pages_per_cell']} pages each"
            text.append("\n")
            for letter, word in WORDS.items():
                mark, style = CELLS[letter]
                text.append(f"{mark} ", style=style)
                text.append(f"{word}  ")
            text.append(f"the first {found['pages']:,} pages{each}\n")
    return text

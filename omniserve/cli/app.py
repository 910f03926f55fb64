"""The table of commands, and what a command line means. No torch here: commands import it when they run."""

from collections.abc import Callable, Sequence
from functools import partial

from cyclopts import App, CycloptsError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

from omniserve import __version__
from omniserve.base.config import nearest
from omniserve.cli.answer import generate
from omniserve.cli.batch import batch
from omniserve.cli.chat import chat
from omniserve.cli.convert import convert
from omniserve.cli.delay import latency
from omniserve.cli.demo import demo
from omniserve.cli.doctor import doctor
from omniserve.cli.fidelity import fidelity
from omniserve.cli.flags import Common, with_dashes
from omniserve.cli.kernels import kernels
from omniserve.cli.load import serving
from omniserve.cli.lserve import translated
from omniserve.cli.quality import perplexity
from omniserve.cli.quantize import quantize
from omniserve.cli.retrieval import longbench, needle, ruler
from omniserve.cli.serve import serve
from omniserve.cli.sparsity import identify
from omniserve.cli.speed import throughput
from omniserve.cli.tokenizer import export_tokenizer
from omniserve.cli.top import top
from omniserve.cli.warmup import warmup

app = App(
    name="omniserve",
    help="Low-bit, long-context serving of large language models.",
    version=__version__,
    help_format="plaintext",
)
evaluate = App(name="eval", help="Quality of a model: perplexity, fidelity, needle, ruler, LongBench.")
sparsity = App(name="sparsity", help="Sparse attention: identify the retrieval heads of a model.")
bench = App(name="bench", help="Speed: throughput and latency of a model, kernels of a GPU, latencies of a server.")
app.command(generate)
app.command(chat)
app.command(serve)
app.command(batch)
app.command(quantize)
app.command(convert)
app.command(top)
app.command(export_tokenizer)
app.command(evaluate)
app.command(sparsity)
app.command(bench)
app.command(warmup)
app.command(doctor)
app.command(demo)
evaluate.command(perplexity)
evaluate.command(fidelity)
evaluate.command(needle)
evaluate.command(ruler)
evaluate.command(longbench)
sparsity.command(identify)
bench.command(throughput)
bench.command(latency)
bench.command(kernels)
bench.command(serving)


def parse(tokens: Sequence[str]) -> tuple[Callable[[], object], Common]:
    """Return the command, ready to be called, and the flags that all commands share.

    Raises CycloptsError or ConfigError.
    """
    command, bound, _ = app.parse_args(
        translated(with_dashes(tokens)), print_error=False, exit_on_error=False, verbose=False
    )
    common = next((value for value in bound.arguments.values() if isinstance(value, Common)), Common())
    return partial(command, *bound.args, **bound.kwargs), common


def usage(error: CycloptsError) -> str:
    """Return a mistake in the command line as one sentence, with the nearest name."""
    if isinstance(error, UnknownOptionError):
        word = (error.token.keyword or error.token.value).split("=")[0]
        known = [name for argument in error.argument_collection for name in argument.names]
        return f"unknown option {word}{nearest(word, known)}"
    if isinstance(error, UnknownCommandError) and error.app is not None and error.unused_tokens:
        known = [name for name in error.app if not name.startswith("-")]
        word = error.unused_tokens[0]
        return f"unknown command {word!r}{nearest(word, known)}: must be one of {', '.join(known)}"
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument {(error.unused_tokens or [''])[0]!r}"
    text = " ".join(str(error).split()).removesuffix(".")
    return text[:1].lower() + text[1:]

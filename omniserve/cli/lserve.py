"""Flags of the LServe scripts, in our words, so that their command lines paste."""

from collections.abc import Sequence

from omniserve.base.errors import ConfigError

STATIC = {
    "--static-sparse-attn-load-dir": "--attn-pattern",
    "--ctx-local-token": "--prefill-local",
    "--dec-local-token": "--local",
    "--ctx-sink-token": "--sink",
    "--dec-sink-token": "--sink",
}
DYNAMIC = {"--dynamic-sparse-token-budget": "--token-budget", "--selector-update-interval": "--reuse-interval"}
SWITCHES = ("--sparse-decode-mode", "--sub-chunk-per-block")
CONTEXT = "--sparse-context-mode"


def translated(tokens: Sequence[str]) -> list[str]:
    """Return a command line with LServe's flags replaced; unchanged if it has none.

    `--sparsity` follows from --static-sparsity (above 0: heads stream) and --sparse-decode-mode (1, its default: pages
    are chosen). --sparse-context-mode changes nothing: prompts always follow --prefill-local. Raises ConfigError.
    """
    names = {*STATIC, *DYNAMIC, *SWITCHES, CONTEXT}
    if not any(token.partition("=")[0] in names for token in tokens):
        return list(tokens)
    rest, found = _taken(tokens, names - {CONTEXT})
    sinks = {name: found[name] for name in ("--ctx-sink-token", "--dec-sink-token") if name in found}
    if len(set(sinks.values())) > 1:
        raise ConfigError(
            " and ".join(f"{name} {value}" for name, value in sinks.items()) + ": must be equal, there is one --sink"
        )
    if found.get("--sub-chunk-per-block", "4") != "4":
        raise ConfigError(
            f"--sub-chunk-per-block {found['--sub-chunk-per-block']}: must be 4, logical pages have 16 tokens"
        )
    mode = found.get("--sparse-decode-mode", "1")
    if mode not in ("0", "1"):
        raise ConfigError(f"--sparse-decode-mode {mode}: must be 0 or 1")
    streams, selects = _streams(rest), mode == "1"
    for table, on in ((STATIC, streams), (DYNAMIC, selects)):
        values = {ours: found[theirs] for theirs, ours in table.items() if theirs in found and on}
        rest += [word for flag, value in values.items() for word in (flag, value)]
    if not any(token.partition("=")[0] == "--sparsity" for token in rest):
        rest += ["--sparsity", {(True, True): "lserve", (True, False): "static"}.get((streams, selects), "")]
        rest[-1] = rest[-1] or ("dynamic" if selects else "off")
    return rest if streams else _taken(rest, {"--static-sparsity"})[0]


def _streams(tokens: Sequence[str]) -> bool:
    value = _taken(tokens, {"--static-sparsity"})[1].get("--static-sparsity", "0")
    try:
        return float(value) > 0
    except ValueError:
        return True  # the option itself says what is wrong


def _taken(tokens: Sequence[str], names: set[str]) -> tuple[list[str], dict[str, str]]:
    """Return the tokens without these flags and their values, and the values by flag. Raises ConfigError."""
    rest: list[str] = []
    found: dict[str, str] = {}
    each = iter(tokens)
    for token in each:
        name, equals, value = token.partition("=")
        if name == CONTEXT:
            continue
        if name not in names:
            rest.append(token)
            continue
        found[name] = value if equals else next(each, "")
        if not found[name]:
            raise ConfigError(f"{name}: a value is missing")
    return rest, found

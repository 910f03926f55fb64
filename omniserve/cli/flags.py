"""What commands have in common on their command line: engine flags, sampling flags, `--config`, `--log-level`.

The engine flags are derived from `base.config.Options`; a flag that is not given is None here, so that the
environment and the config file can speak (order: flag, `OMNISERVE_<FLAG>`, file, default).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

from omniserve.base.config import GROUP, Options, Precision, options_from
from omniserve.base.environment import PREFIX, environment, server_environment
from omniserve.base.errors import ConfigError
from omniserve.base.serving import NAMES, ServerLimits, ServerOptions, server_options
from omniserve.base.types import SamplingParams

ENGINE = Group("Engine", sort_key=2)
SAMPLING = Group("Sampling", sort_key=1)
COMMON = Group("Config and output", sort_key=3)


def _whole(type_: Any, tokens: Sequence[Token]) -> int:
    """Convert a number; cyclopts itself would round 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        keyword = tokens[0].keyword or type_.__name__
        raise ConfigError(f"{keyword} {tokens[0].value}: must be a whole number") from None


Whole = Annotated[int, Parameter(converter=_whole, n_tokens=1)]
"""A flag's whole number."""


def _flag(option: Field[Any]) -> tuple[str, Any, Any]:
    choices = option.metadata["choices"]
    words = f" [{', '.join(str(choice) for choice in choices)}]" if choices else ""
    default = "" if option.default in (None, "auto") else f" (default {option.default})"
    parameter = Parameter(help=option.metadata["help"] + words + default, show_default=False)
    kind: Any = option.type
    if kind in (int, int | None):
        kind = Whole
    return option.name, Annotated[kind | None, parameter], field(default=None)


if TYPE_CHECKING:

    class EngineFlags:
        """The engine flags that were given on the command line; the others are None."""
else:
    EngineFlags = Parameter(name="*", group=ENGINE)(
        make_dataclass(
            "EngineFlags",
            [_flag(option) for option in fields(Options)],
            frozen=True,
            kw_only=True,
            namespace={"__module__": __name__},  # cyclopts does not look into classes of the standard library
        )
    )

NO_FLAGS = EngineFlags()

_OF_THE_MODEL = ("revision", "download_dir", "offline", "chat_template")

if TYPE_CHECKING:

    class ModelFlags:
        """The flags that were given about where a model is, for commands that do not run it."""
else:
    ModelFlags = Parameter(name="*", group=ENGINE)(
        make_dataclass(
            "ModelFlags",
            [_flag(option) for option in fields(Options) if option.name in _OF_THE_MODEL],
            frozen=True,
            kw_only=True,
            namespace={"__module__": __name__},
        )
    )

NO_MODEL_FLAGS = ModelFlags()


@Parameter(name="*", group=COMMON)
@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every command.

    Parameters
    ----------
    config
        YAML file with flag names as keys; flags and OMNISERVE_<FLAG> variables win over it.
    log_level
        Lowest level of the log, which goes to standard error (default warning; of serve: info).
    """

    config: Path | None = None
    log_level: Literal["debug", "info", "warning", "error"] | None = None


@Parameter(name="*", group=SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are drawn.

    Parameters
    ----------
    max_tokens
        Most tokens to produce; default: 128 for generate, the rest of the context for chat.
    temperature
        0 to 2; 0 always takes the likeliest token.
    top_p
        Draw from the likeliest tokens that hold this share of the probability.
    top_k
        Draw from this many likeliest tokens; 0 is off.
    min_p
        Drop tokens below this share of the likeliest token's probability.
    stop
        End before this text; may be given several times.
    ignore_eos
        Go on after an end-of-sequence token.
    """

    max_tokens: Whole | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: Whole = 0
    min_p: float = 0.0
    stop: Annotated[list[str] | None, Parameter(negative="", consume_multiple=False, allow_leading_hyphen=True)] = None
    ignore_eos: Annotated[bool, Parameter(negative="")] = False

    def params(self, *, max_tokens: int | None, seed: int | None) -> SamplingParams:
        """Return the parameters of a request; `max_tokens` holds where the flag was not given."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=seed,
            max_tokens=max_tokens if self.max_tokens is None else self.max_tokens,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )


def given(flags: EngineFlags | ModelFlags) -> dict[str, Any]:
    """Return the engine flags that were given on the command line."""
    values = {option.name: getattr(flags, option.name, None) for option in fields(Options)}
    return {name: value for name, value in values.items() if value is not None}


def settings(flags: EngineFlags | ModelFlags, common: Common, *, base: Options | None = None) -> Options:
    """Return the options of an engine: flag, then environment, then `--config` file, then `base`."""
    options = layers(flags, common, base=base)[0]
    if options.precision != "auto":  # before torch is imported and the model is read
        Precision.parse(options.precision, options.group_size or GROUP)
    return options


def layers(
    flags: EngineFlags | ModelFlags, common: Common, *, base: Options | None = None
) -> tuple[Options, dict[str, str]]:
    """Return the options of an engine and where each value comes from.

    Raises ConfigError for an unknown key, a wrong type or a value that is not allowed, with its origin.
    """
    start = base or Options()
    origins = {option.name: "default" for option in fields(Options)}
    in_file, _ = in_config(common)
    from_file = options_from(in_file, origin=str(common.config), base=start)
    in_environment, on_line = environment(), given(flags)
    from_environment = options_from(in_environment, origin="environment", base=from_file)
    options = options_from(on_line, origin="command line", base=from_environment)
    origins |= dict.fromkeys(in_file, str(common.config))
    origins |= {name: PREFIX + name.upper() for name in in_environment}
    origins |= dict.fromkeys(on_line, "command line")
    return options, origins


def server_layers(flags: Mapping[str, Any], common: Common) -> tuple[ServerOptions, dict[str, str]]:
    """Return the options of a server, and where each value comes from; a limit is named `limits.NAME`.

    flags  those that were given on the command line
    Raises ConfigError as `layers`.
    """
    names = [one.name for one in fields(ServerOptions) if one.name != "limits"]
    names += [f"limits.{one.name}" for one in fields(ServerLimits)]
    origins = dict.fromkeys(names, "default")
    _, in_file = in_config(common)
    in_environment = server_environment()
    made = server_options(in_file, origin=str(common.config))
    made = server_options(in_environment, origin="environment", base=made)
    made = server_options(flags, origin="command line", base=made)
    for values, origin, prefix in ((in_file, str(common.config), ""), (in_environment, "", PREFIX)):
        for name in values.keys() - {"limits"}:
            origins[name] = origin or prefix + name.upper()
        for name in values.get("limits", ()):
            origins[f"limits.{name}"] = origin or f"{prefix}LIMIT_{name.upper()}"
    origins |= dict.fromkeys(flags, "command line")
    return made, origins


def in_config(common: Common) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the `--config` file says about the engine and about the server; every command takes both."""
    values = {} if common.config is None else read_config(common.config)
    server = {name: value for name, value in values.items() if name in NAMES}
    return {name: value for name, value in values.items() if name not in NAMES}, server


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a YAML config file by option name; the spelling with dashes and the other are one.

    Raises ConfigError for a missing file, bad YAML, anything but a mapping of names, or a name that comes twice.
    """
    try:
        import yaml
    except ImportError:
        raise ConfigError("--config needs PyYAML: pip install pyyaml") from None
    text = read_text(path, "config file")
    try:
        # BaseLoader would leave every value a string; safe_load builds plain values and nothing else
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(str(error))}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must hold `name: value` lines, for instance `max-model-len: 2048`")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        if not isinstance(key, str):
            raise ConfigError(f"{path}: key {key!r}: must be a flag's name")
        name = key.replace("-", "_")
        if name in values:
            raise ConfigError(f"{path}: {name} is given twice")
        values[name] = value
    return values


def read_text(path: Path, what: str) -> str:
    """Return a UTF-8 file's text; a ConfigError in one sentence if that cannot be done."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: this {what} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this {what}: {error.strerror}") from None


def with_dashes(tokens: Sequence[str]) -> list[str]:
    """Return the command line with `--max_model_len` spelled `--max-model-len`; values stay as they are.

    `--dummy-weights` is another spelling of `--load-format dummy`.
    """
    result: list[str] = []
    for place, token in enumerate(tokens):
        if token == "--":
            return result + list(tokens[place:])
        name, equals, value = token.partition("=")
        if re.fullmatch(r"--[A-Za-z][\w-]*", name):
            token = name.replace("_", "-") + equals + value
        if token == "--dummy-weights":
            token = "--load-format=dummy"
        result.append(token)
    return result


def whole_numbers(text: str, name: str) -> list[int]:
    """Return the numbers of `0,10` or `0-19` (both ends included); ConfigError if it is neither."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ConfigError(f"{name}={text!r}: must be numbers such as 0,10 or a range such as 0-19")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= 1_000_000:
            raise ConfigError(f"{name}={text!r}: must be a range of fewer than 1,000,000 numbers")
        numbers.extend(range(first, last + 1))
    return numbers


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""`omniserve export-tokenizer`: a model's tokenizer as a folder that clients of a server can read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from omniserve.base.errors import ConfigError
from omniserve.cli.flags import NO_MODEL_FLAGS, Common, ModelFlags, settings
from omniserve.cli.loading import leaving_at_once, need_torch
from omniserve.cli.output import Bars, result

if TYPE_CHECKING:
    from omniserve.text import Tokenizer

_KEPT = ("model_type", "architectures", "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id")
"""Keys of config.json that say what kind of model the tokens are for; the rest is about weights."""


def export_tokenizer(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    flags: ModelFlags = NO_MODEL_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Write the tokenizer folder that lm-eval, guidellm, aiperf and transformers' AutoTokenizer read.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME).
    output
        Folder to write; it must not exist.
    """
    options = settings(flags, common)
    need_torch()
    with leaving_at_once():
        from omniserve.engine.build import open_source
        from omniserve.formats.writer import refuse_existing
        from omniserve.text import Tokenizer
    refuse_existing(output)
    with Bars() as bars:
        source = open_source(model, options, bars.update)
    tokenizer = Tokenizer.load(source, options.chat_template)
    files = _files(tokenizer, source.config)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror})") from None
    chat = "with its chat template" if tokenizer.template else "without a chat template: the model has none"
    result(f"{output}: {tokenizer.vocab:,} tokens, {chat}; {', '.join(sorted(files))}")


def _files(tokenizer: "Tokenizer", config: Mapping[str, object]) -> dict[str, bytes]:
    """Return the folder's files by name."""
    longest = config.get("max_position_embeddings")
    kept = {name: config[name] for name in _KEPT if name in config}
    files = tokenizer.files(max_model_len=longest if isinstance(longest, int) else None)
    return {**files, "config.json": json.dumps(kept, indent=2).encode()}

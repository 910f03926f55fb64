"""omniserve: low-bit, long-context serving of large language models."""

from typing import TYPE_CHECKING

from omniserve.base.structured import StructuredOutputs
from omniserve.base.types import SamplingParams
from omniserve.base.version import VERSION

if TYPE_CHECKING:
    from omniserve.llm import LLM

__all__ = ["LLM", "SamplingParams", "StructuredOutputs"]
__version__ = VERSION


def __getattr__(name: str) -> object:
    """Import the engine when it is first asked for: `omniserve --help` does not wait for torch."""
    if name == "LLM":
        from omniserve.llm import LLM

        return LLM
    raise AttributeError(f"module 'omniserve' has no attribute {name!r}")

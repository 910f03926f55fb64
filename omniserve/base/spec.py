"""The numbers that describe a decoder and the device it runs on."""

from dataclasses import dataclass, field
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: kind, base and the parameters of the scaled kinds.

    `original_context` is the trained length that `dynamic`, `llama3` and `yarn` refer to.
    """

    kind: RopeKind = "default"
    base: float = 10000.0
    factor: float = 1.0
    original_context: int | None = None
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts that some layers have in place of one feed-forward part.

    count, chosen  experts of a layer, and how many of them a token goes through
    ffn            inner size of one expert
    shared_ffn     inner size of the expert that every token goes through, behind a sigmoid gate; 0: there is none
    normalize      the weights of the chosen experts are scaled to sum 1
    layers         which layers have experts
    """

    count: int
    chosen: int
    ffn: int
    shared_ffn: int = 0
    normalize: bool = True
    layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer in numbers; the one decoder reads everything from here.

    qk_norm  q and k are normed per head before they are rotated
    windows  per layer the sliding window in tokens, None where attention sees everything; empty: no layer has one
    experts  None: every layer has one feed-forward part
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    rope: RopeSpec = field(default_factory=RopeSpec)
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    experts: Experts | None = None

    @property
    def group(self) -> int:
        """Query heads per key head (G)."""
        return self.heads // self.kv_heads

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused q|k|v weight."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where the engine runs.

    memory_bytes  what the engine may take, of total_bytes; capability: of CUDA devices
    """

    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    capability: tuple[int, int] | None = None
    total_bytes: int = 0

"""Mistral and Mixtral: Llama without biases, with a sliding window, with experts."""

from dataclasses import replace

from omniserve.base.spec import Experts, ModelSpec
from omniserve.models.families.llama import Config, decoder_spec, refuse, whole


def spec(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type mistral. Raises CheckpointError."""
    return _windowed(config, "mistral")


def mixtral(config: Config) -> ModelSpec:
    """Return the numbers of a config of model type mixtral. Raises CheckpointError."""
    made = _windowed(config, "mixtral")
    count, chosen = whole(config, "num_local_experts", 8), whole(config, "num_experts_per_tok", 2)
    if chosen > count:
        raise refuse("num_experts_per_tok", chosen, f"at most num_local_experts={count}")
    experts = Experts(count=count, chosen=chosen, ffn=made.ffn, layers=frozenset(range(made.layers)))
    return replace(made, experts=experts)


def _windowed(config: Config, family: str) -> ModelSpec:
    made = decoder_spec({**config, "attention_bias": False, "mlp_bias": False}, family)
    if config.get("sliding_window") is None:
        return made
    return replace(made, windows=(whole(config, "sliding_window"),) * made.layers)

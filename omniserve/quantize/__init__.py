"""Floor 7: QoQ, the quantizer: 16-bit checkpoints to W4A8KV4 and W8A8KV8, layer by layer; knows no engine."""

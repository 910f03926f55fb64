"""What each pass of the quantizer brings: KL and perplexity of a model, recipe by recipe, on windows of a text.

    python scripts/qoq_table.py MODEL --calibration valid.txt --text test.txt [--windows 0,10] [--device cuda]
                                [--table w4a8kv4-g128] [--rows nearest,default] [--stride 30000] [--out table.jsonl]

Each row quantizes the model into a folder of its own and measures it with int8 activations and the quantized KV cache
simulated in fp32 on plain tensors, on any device; no engine. --served measures through the engine instead (CPU).
A text is a UTF-8 file, or token ids in a .npy file, for machines without a tokenizer library.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import read_linear, scheme_of
from omniserve.formats.checkpoint import Source, open_checkpoint
from omniserve.formats.kv import kv_format
from omniserve.models.families import family
from omniserve.quantize.calibration import Calibration, cut
from omniserve.quantize.forward import PLAIN, Cache, Forward
from omniserve.quantize.layer import Layer, read_layer
from omniserve.quantize.recipe import Recipe, Solve, default
from omniserve.quantize.stream import quantize

CHUNK = 256
"""Predictions whose logits are held at once."""


def rows(table: str) -> dict[str, Recipe]:
    """Recipes of a table: from plain rounding, pass by pass, to the default; then the default without single passes."""
    full = default(table)
    bare = full.without(["rotate", "reorder", "keys", "smooth", "solve"])
    gptq = Solve(search=False, gptq=True, refine=False, descend=0, reaim=0.0)
    made = {"nearest": bare, "+ rotate": replace(bare, rotate=full.rotate)}
    made["+ GPTQ"] = replace(made["+ rotate"], solve=gptq)
    made["+ range search"] = replace(made["+ GPTQ"], solve=replace(gptq, search=True))
    made["+ reorder"] = replace(made["+ range search"], reorder=full.reorder)
    made["+ smooth"] = replace(made["+ reorder"], smooth=full.smooth)
    if full.keys is not None:
        made["+ K-mean"] = replace(made["+ smooth"], keys=replace(full.keys, smooth=()))
        made["+ SmoothAttention"] = replace(made["+ smooth"], keys=full.keys)
    else:
        made["+ SmoothAttention"] = made["+ smooth"]
    assert full.solve is not None, full
    last = made["+ SmoothAttention"]
    made["+ re-aim"] = replace(last, solve=replace(gptq, search=True, reaim=full.solve.reaim))
    made["default"] = full
    for word in ("rotate", "rotate.heads", "reorder", "smooth", "keys", "keys.mean", "keys.smooth", "solve.reaim"):
        if getattr(full, word.partition(".")[0]) is not None:
            made[f"default - {word}"] = full.without([word])
    return _distinct(made)


def _distinct(found: dict[str, Recipe]) -> dict[str, Recipe]:
    """Leave out rows that repeat another: of two, the default stays, else the first."""
    made: dict[str, Recipe] = {}
    for name, recipe in found.items():
        same = [other for other, one in made.items() if replace(one, name="") == replace(recipe, name="")]
        if not same:
            made[name] = recipe
        elif name == "default":
            made = {name if other in same else other: one for other, one in made.items()}
    return made


class Net:
    """A model on plain tensors, layer by layer from its checkpoint; a quantized one with what it rounds simulated."""

    def __init__(self, source: Source, positions: int, device: torch.device) -> None:
        self.spec: ModelSpec = family(source.config).spec(source.config)
        self._source, self._device = source, device
        self._scheme = scheme_of(source)
        self._forward = Forward(self.spec, positions=positions, device=device)

    def hidden(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """The normed residual stream [T, C] behind the last layer, of each window."""
        table = self._plain("model.embed_tokens.weight")
        xs = [table[ids] for ids in windows]
        for number in range(self.spec.layers):
            layer, cache = self._layer(number), self._cache(number)
            for place, x in enumerate(xs):
                at = torch.arange(len(x), device=self._device)
                xs[place] = self._forward(layer, x, at, cache=cache, rounded=self._scheme is not None)
        return [self._forward.norm(x, self._plain("model.norm.weight")) for x in xs]

    def head(self) -> Tensor:
        own = "lm_head.weight" in self._source.names()
        return self._plain("lm_head.weight" if own else "model.embed_tokens.weight")

    def _plain(self, name: str) -> Tensor:
        return self._source.tensor(name).to(self._device, torch.float32)

    def _layer(self, number: int) -> Layer:
        source = self._source if self._scheme is None else _Dense(self._source)
        return read_layer(source, self.spec, number, dtype=torch.float32, device=self._device)

    def _cache(self, number: int) -> Cache:
        if self._scheme is None:
            return PLAIN
        kv, at = self._scheme.kv, f"model.layers.{number}.self_attn."
        form = None if kv.bits == 16 else kv_format("kv4" if kv.bits == 4 else "kv8", static=kv.static)
        mean = self._plain(at + "key_mean") if kv.key_mean else None
        scale = self._plain(at + "kv_scale") if kv.static else None
        return Cache(keys=form, values=form, mean=mean, scale=scale)


class _Dense:
    """A quantized checkpoint of ours as a source of dense weights."""

    def __init__(self, source: Source) -> None:
        self.path, self.config = source.path, source.config
        scheme = scheme_of(source)
        assert scheme is not None
        self._source, self._scheme = source, scheme

    def names(self) -> frozenset[str]:
        return frozenset(name.replace(".codes", ".weight") for name in self._source.names())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        if name in self._source.names():
            return self._source.tensor(name)
        module = name.removesuffix(".weight")
        return self._scheme.form(module).dense(read_linear(self._source, self._scheme, module))


@torch.inference_mode()
def compare(
    wanted: Sequence[Tensor], head: Tensor, given: Sequence[Tensor], own: Tensor, windows: Sequence[Tensor]
) -> list[tuple[float, float]]:
    """Per window: mean negative log-likelihood of `given` and mean KL(wanted || given); the first token is context."""
    found = []
    for a, b, ids in zip(wanted, given, windows, strict=True):
        nll = kl = 0.0
        for at in range(0, len(ids) - 1, CHUNK):
            some = slice(at, min(at + CHUNK, len(ids) - 1))
            p, q = (a[some] @ head.T).log_softmax(-1), (b[some] @ own.T).log_softmax(-1)
            nll -= float(q.gather(1, ids[some.start + 1 : some.stop + 1, None]).sum())
            kl += float((p.exp() * (p - q)).sum())
        found.append((nll / (len(ids) - 1), kl / (len(ids) - 1)))
    return found


def served(model: Path, folder: Path, windows: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The same through the engine."""
    from omniserve import LLM
    from omniserve.base.config import Options
    from omniserve.evals.perplexity import measure

    options = Options(max_model_len=max(map(len, windows)), max_num_seqs=1)
    with LLM(model, options=replace(options, precision="w16a16kv16")) as before, LLM(folder, options=options) as after:
        scores = [measure(after, [ids.tolist()], reference=before) for ids in windows]
    return [(score.nll, score.kl or 0.0) for score in scores]


def tokens(path: Path, model: Path) -> list[int]:
    if path.suffix == ".npy":
        return [int(token) for token in np.load(path)]
    from omniserve.text import Tokenizer

    return Tokenizer.load(open_checkpoint(model)).encode(path.read_text(encoding="utf-8"), special=False)


def measured(args: argparse.Namespace) -> Iterator[tuple[str, float, float, float]]:
    """Yield name, perplexity, KL and seconds of each row as it is done."""
    device = torch.device(args.device)
    source = open_checkpoint(args.model)
    spec = family(source.config).spec(source.config)
    ids, text = tokens(args.calibration, args.model), tokens(args.text, args.model)
    chosen = [int(part) for part in args.windows.split(",")]
    windows = [torch.tensor(text[n * args.length : (n + 1) * args.length], device=device) for n in chosen]
    with torch.inference_mode():
        net = Net(source, args.length, device)
        wanted, head = net.hidden(windows), net.head()
    for name, recipe in rows(args.table).items():
        if args.rows and name not in args.rows.split(","):
            continue
        began = time.perf_counter()
        calibration = samples(recipe, ids, spec, args)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model"
            files: dict[str, bytes] = {}
            if args.served:
                from omniserve.text import Tokenizer

                files = Tokenizer.load(source).files()
            quantize(source, recipe, out, calibration=calibration, files=files, device=device)
            seconds = time.perf_counter() - began
            if args.served:
                pairs = served(args.model, out, windows)
            else:
                with torch.inference_mode():
                    made = Net(open_checkpoint(out), args.length, device)
                    pairs = compare(wanted, head, made.hidden(windows), made.head(), windows)
        yield name, math.exp(_mean([nll for nll, _ in pairs])), _mean([kl for _, kl in pairs]), seconds


def samples(recipe: Recipe, ids: list[int], spec: ModelSpec, args: argparse.Namespace) -> Calibration | None:
    if not recipe.calibrated:
        return None
    assert recipe.calibration is not None, recipe
    given = {name: value for name, value in (("samples", args.samples), ("stride", args.stride)) if value is not None}
    return cut(ids, replace(recipe.calibration, **given), spec, origin=args.calibration.name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--table", default="w4a8kv4-g128", help="w4a8kv4-g128, w4a8kv4-row or w8a8kv8")
    parser.add_argument("--rows", help="names with commas; default: all")
    parser.add_argument("--windows", default="0,10")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--out", type=Path, help="add one JSON object per row to this file")
    args = parser.parse_args()
    print(f"{'row':24} {'ppl':>9} {'KL':>8} {'seconds':>8}", flush=True)
    for name, ppl, kl, seconds in measured(args):
        print(f"{name:24} {ppl:9.3f} {kl:8.4f} {seconds:8.0f}", flush=True)
        if args.out:
            row = {"table": args.table, "row": name, "ppl": ppl, "kl": kl, "seconds": seconds, "windows": args.windows}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

"""Every kernel as it is compiled for every card: what the compile gate builds on a machine without a GPU.

The launches come from the functions that choose them at run time, at the sizes of Llama-3-8B (hidden 4096, 32 query
and 8 key heads, D = 128) and SmolLM2-135M (hidden 576, D = 64, groups of 3).
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton

from omniserve.base.config import TILE
from omniserve.base.numbers import ceil_div
from omniserve.kernels import (
    bounds,
    changes,
    choice,
    clusters,
    combine,
    cuts,
    dense,
    draw,
    few,
    flash,
    hopper,
    keep,
    linear,
    lists,
    nucleus,
    pick,
    prefill,
    produced,
    rows,
    runs,
    select,
    shares,
    statistics,
    write,
)
from omniserve.kernels.ahead import CudaSpec, Spec
from omniserve.kernels.tiles import Tile, choose, default, table

ARCHITECTURES = (80, 86, 89, 90)
"""Compute capabilities times ten."""

SMS = {80: 108, 86: 84, 89: 128, 90: 132}
"""Streaming multiprocessors of an A100, RTX 3090-class, RTX 4090 and H200."""


GEMM_LOOPS = {
    "g128": {16: (280, 250), 64: (260, 310), 128: (270, 270), 2048: (185, 800)},
    "row": {16: (185, 150), 64: (160, 210), 128: (165, 190), 2048: (155, 460)},
    "w8a8": {16: (140, 105), 64: (120, 165), 128: (90, 170), 2048: (90, 170)},
}
"""SASS instructions of one turn of each product's loop, by tokens: on compute capability 9.0, and on the others."""


GLUON_LOOPS = {"g128": 200, "row": 115, "w8a8": 60}
"""The same of the kernel for compute capability 9.0, for a block of each group of warps."""


FEW_LOOPS = {"g128": 175, "row": 115, "w8a8": 105}
"""The same of the kernel for few tokens."""

FEW = Tile(16, 64, 2, 4, 4, 4, "few")
"""A tile of it that cuts K, whatever the tables say."""

CLUSTER_LOOPS = {"g128": 115, "row": 80}
"""The same of the kernel for few tokens in CUDA C++, for a block; it takes two of them, or more, in one turn."""

HELPED = Tile(128, 64, 1, 9, 8, 2, "gluon")
"""A tile of the kernel for compute capability 9.0 that helpers share, whatever the tables say."""


ATTEND_LOOPS = {4: 1500, 8: 1650, 16: 900}
"""SASS instructions of one turn of a produced position's loop, by bits; about 210 are skipped but at a piece's end."""

PROMPT_LOOP = 1000
"""SASS instructions of one turn of a prompt tile's loop."""

FLASH_LOOP = 1400
"""The same of the kernel for compute capability 9.0, with the loop over its tiles."""

BOUND_LOOP, SHARE_LOOP = 750, 1100
"""The same of bounds of pages for tiles of prompts: on compute capability 9.0, and on the others."""

FLOATS = r"mma\S*\.f32\.(f16|bf16)"
"""16-bit products; those of produced positions have 16 rows, too few for Hopper's own."""

CODES = r"mma\S*\.(f32\.f16|s32\.s8)"
"""Codes of keys are int8 factors, those of values 16-bit ones."""

SHAPES = ((4, 128), (3, 64), (1, 128), (8, 256), (1, 80))
"""Query heads per key head, and their dims."""

DENSE_LOOP = (130, 110)
"""SASS instructions of one turn of a 16-bit product's loop: on compute capability 9.0, and on the others."""

SCORE_LOOPS = {64: 400, 128: 400, 256: 700}
"""Budget of the scorer's loop, by head dims."""

KEY_LOOPS = {4: 1000, 8: 800, 16: 300}
"""The same where it reads keys, by their bits."""


def specs(arch: int) -> Iterator[Spec]:
    """Yield all specs of a card; `first` are one per kernel on compute capability 9.0, and a product on the others."""
    yield from _linear(arch)
    yield from _dense(arch)
    yield from _pick(arch)
    yield from _changes(arch)
    yield from _rows(arch)
    yield from _write(arch)
    yield from _lists(arch)
    yield from _attention(arch)
    yield from _selection(arch)
    yield from _tiles(arch)
    yield from _prefill(arch)


def cuda_specs(arch: int) -> Iterator[CudaSpec]:
    """Yield the kernels in CUDA C++: every tile of the tables."""
    tiles = {(one.kind, one.tile) for one in table(arch) if one.tile.language == "cuda"}
    for at, (kind, tile) in enumerate(sorted(tiles, key=str)):
        grouped = kind == "g128"
        yield CudaSpec(
            name=f"cluster gemm {kind} {tile}",
            arch=arch,
            kernel="product",
            source=clusters.source(tile.tokens),
            constants=clusters.constants(tile, torch.bfloat16, grouped=grouped, zero=not grouped, bias=grouped),
            threads=tile.warps * 32,
            programs=tile.programs,
            dynamic=clusters.shared_bytes(tile, torch.bfloat16, grouped=grouped),
            longest=CLUSTER_LOOPS[kind] * max(tile.step, 2),
            first=at % 8 == 0,
        )


def _linear(arch: int) -> Iterator[Spec]:
    types = {
        "x": "*i8", "a": "*fp32", "total": "*i32", "w": "*u8", "scale": "*fp32", "zero": "*fp32", "bias": "*fp32",
        "y": "*fp16", "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32", "blocks": "i32", "each": "i32",
    }  # fmt: skip
    kinds = (("g128", 4, True, False), ("row", 4, False, True), ("w8a8", 8, False, False))
    for name, bits, grouped, zero in kinds:
        for tokens, n, k in ((16, 4096, 14336), (64, 4096, 14336), (128, 4096, 4096), (2048, 28672, 4096)):
            tile = choose(tokens, n, k, name, arch=arch, sms=SMS[arch], cuda=False)
            if tile.language != "triton":
                yield (_few if tile.language == "few" else _gluon)(tile, name, tokens, n, k)
                tile = default(tokens, n, k, name, arch=arch, sms=SMS[arch])
            split = tile.split > 1
            yield Spec(
                name=f"gemm {name} {tokens}x{n}x{k}",
                arch=arch,
                kernel=linear.gemm_kernel,
                types=types | {"w": "*i8" if bits == 8 else "*u8", "y": "*i32" if split else "*fp16"},
                constants=linear.constants(tile, bits=bits, grouped=grouped, zero=zero, bias=False, even=True),
                warps=tile.warps,
                stages=tile.stages,
                loose=("M", "blocks", "each"),
                fusion=False,
                matrix=_int8(arch, packed=bits == 4),
                longest=GEMM_LOOPS[name][tokens][arch != 90],
                first=tokens == 64 and (arch == 90 or name == "g128"),
            )
        if arch == 90:
            yield _few(FEW, name, 16, 4096, 4096)
            yield _gluon(HELPED, name, 128, 4096, 14336)
    yield Spec(
        name="sum of a split",
        arch=arch,
        kernel=linear.sum_kernel,
        types={name: types[name] for name in ("a", "total", "scale", "zero", "bias", "y", "M", "N")} | {"sums": "*i32"},
        constants={"ZERO": True, "BIAS": True, "SPLIT": 8, "BN": linear.FINISH},
        warps=4,
        loose=("M",),
        fusion=False,
        first=arch == 90,
    )


def _gluon(tile: Tile, kind: str, tokens: int, n: int, k: int) -> Spec:
    """Return the launch of a product on compute capability 9.0 with both of its groups of warps."""
    bits, grouped = 8 if kind == "w8a8" else 4, kind == "g128"
    tile = hopper.fitted(tile, 2, bits=bits, grouped=grouped)
    pointers = {"a": "*fp32", "total": "*i32", "scale": "*fp32", "zero": "*fp32", "bias": "*fp32", "sums": "*i32"}
    return Spec(
        name=f"gluon gemm {kind} {tokens}x{n}x{k}",
        arch=90,
        kernel=hopper.hopper_kernel,
        types=hopper.boxes(tile, "bf16", bits=bits)
        | pointers
        | {"tickets": "*i32", "M": "i32", "N": "i32", "blocks": "i32", "lent": "i32"},
        constants=hopper.constants(
            tile, bits=bits, grouped=grouped, zero=kind == "row", bias=False, helped=tile.split > 1
        ),
        warps=4,
        loose=("M", "N", "blocks", "lent"),
        fusion=False,
        matrix=_int8(90, packed=bits == 4),
        longest=GLUON_LOOPS[kind] * tile.step,
        first=tokens == 2048 and kind == "row",
    )


def _few(tile: Tile, kind: str, tokens: int, n: int, k: int) -> Spec:
    """Return the launch of a product of few tokens on compute capability 9.0."""
    bits, grouped = 8 if kind == "w8a8" else 4, kind == "g128"
    pointers = {"a": "*fp32", "total": "*i32", "scale": "*fp32", "zero": "*fp32", "bias": "*fp32", "sums": "*i32"}
    return Spec(
        name=f"few gemm {kind} {tokens}x{n}x{k}",
        arch=90,
        kernel=few.few_kernel,
        types=few.boxes(tile, "bf16", bits=bits, grouped=grouped)
        | pointers
        | {"tickets": "*i32", "M": "i32", "N": "i32", "blocks": "i32", "parts": "i32"},
        constants=few.constants(tile, bits=bits, grouped=grouped, zero=kind == "row", bias=False),
        warps=tile.warps,
        loose=("M", "blocks", "parts"),
        fusion=False,
        matrix=_int8(90, packed=bits == 4),
        longest=FEW_LOOPS[kind] * tile.step * (tile.weights // (16 * tile.warps)),
        most_registers=few.registers(tile),
        first=kind == "row" and tile == FEW,
    )


def _dense(arch: int) -> Iterator[Spec]:
    model = "*bf16"
    for tokens, n in ((16, 128256), (16, 4096), (64, 4096), (64, 28672), (256, 4096), (2048, 4096)):
        tile = dense.choose_dense(tokens, n, arch=arch, sms=SMS[arch])
        yield Spec(
            name=f"dense {tokens}x{n}x4096",
            arch=arch,
            kernel=dense.dense_kernel,
            types={
                "x": model, "w": model, "bias": model, "y": "*fp32" if n == 128256 else model,
                "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32",
            },
            constants=dense.constants(tile, bias=False, columns=4096),
            warps=tile.warps,
            stages=tile.stages,
            loose=("M",),
            matrix=r"wgmma\.mma_async\S*\.f32\.bf16" if arch == 90 else r"mma\.sync\S*m16n8k16\S*\.f32\.bf16",
            longest=DENSE_LOOP[arch != 90],
            first=arch == 90 and tokens == 64,
        )  # fmt: skip


def _pick(arch: int) -> Iterator[Spec]:
    common = {"arch": arch, "first": arch == 90}
    yield Spec(
        name="largest logit of a part",
        kernel=pick.parts_kernel,
        types={"logits": "*fp32", "rows": "*i64", "keys": "*i64", "V": "i32", "stride": "i32", "parts": "i32"},
        constants={"ROWS": False, "BLOCK": pick.PART},
        warps=8,
        **common,
    )
    yield Spec(
        name="largest logit of a row",
        kernel=pick.pick_kernel,
        types={"keys": "*i64", "tokens": "*i64", "parts": "i32", "nothing": "i32"},
        constants={"PARTS": 32},
        warps=1,
        loose=("nothing",),
        **common,
    )
    logits = {"logits": "*fp32", "rows": "*i64", "keys": "*i64", "V": "i32", "stride": "i32"}
    chance = {"out": "*i64", "seed": "*i64", "position": "*i64", "temperature": "*fp64"}
    anywhere = ("rows", "seed", "position", "top_k", "temperature", "top_p", "min_p", "count", "wanted", "parts")
    filters = {"top_k": "*i64", "top_p": "*fp64", "min_p": "*fp64", "count": "i32", "wanted": "i32"}
    yield Spec(
        name="largest logits of places",
        kernel=draw.maxima_kernel,
        types=logits | {"count": "i32"},
        constants={"ROWS": True, "BLOCK": pick.PART},
        warps=8,
        loose=anywhere,
        **common,
    )
    for drawn in (True, False):
        yield Spec(
            name="a draw among the likeliest" if drawn else "the likeliest",
            kernel=draw.top_kernel,
            types=logits | chance | filters,
            constants={"ROWS": drawn, "DRAW": drawn, "COUNT": 2048},
            warps=8,
            loose=anywhere,
            **common,
        )
    yield Spec(
        name="weights of a part",
        kernel=draw.weigh_kernel,
        types=logits | {"sums": "*fp64", "temperature": "*fp64", "parts": "i32"},
        constants={"PARTS": 32, "BLOCK": pick.PART},
        warps=8,
        loose=anywhere,
        **common,
    )
    yield Spec(
        name="a draw",
        kernel=draw.draw_kernel,
        types=logits | chance | {"sums": "*fp64", "parts": "i32"},
        constants={"PARTS": 32, "BLOCK": pick.PART},
        warps=8,
        loose=anywhere,
        **common,
    )
    yield from _nucleus(logits, anywhere, common)


def _nucleus(logits: dict[str, str], anywhere: tuple[str, ...], common: dict[str, Any]) -> Iterator[Spec]:
    filters = {"temperature": "*fp64", "top_p": "*fp64", "min_p": "*fp64", "parts": "i32"}
    shared = logits | filters | {"state": "*i64"}
    parting = shared | {"top_k": "*i64", "sums": "*i64"}
    listing = {"sure": "*i64", "listed": "*i64"}
    size = {"PARTS": 32, "BLOCK": pick.PART}
    alike = common | {"warps": 8, "loose": anywhere, "fusion": False}
    for level in (0, 1):
        yield Spec(
            name=f"filters: level {level}",
            kernel=nucleus.level_kernel,
            types=parting,
            constants={"LEVEL": level, "M": nucleus.BORDERS, **size},
            **alike,
        )
    yield Spec(
        name="filters: list",
        kernel=nucleus.list_kernel,
        types=parting | listing,
        constants={"LEVEL": nucleus.LEVELS, "M": nucleus.BORDERS, **size},
        **alike,
    )
    yield Spec(
        name="filters: a draw",
        kernel=nucleus.nucleus_kernel,
        types=shared | listing | {"out": "*i64", "seed": "*i64", "position": "*i64"},
        constants={"LEVEL": nucleus.LEVELS, **size},
        **alike,
    )


def _changes(arch: int) -> Iterator[Spec]:
    pointers = {"of": "*i64", "table": "*fp32", "bits": "*i32", "counts": "*i32"}
    numbers = {"repetition": "*fp64", "presence": "*fp64", "frequency": "*fp64"}
    yield Spec(
        name="changes of logits",
        kernel=changes.change_kernel,
        types={"logits": "*fp32", "out": "*fp32"} | pointers | numbers | {"V": "i32", "stride": "i32", "words": "i32"},
        constants={"BLOCK": changes.BLOCK},
        warps=changes.WARPS,
        loose=("of", "repetition", "presence", "frequency", "words"),
        fusion=False,
        arch=arch,
        first=arch == 90,
    )


def _rows(arch: int) -> Iterator[Spec]:
    model = "*bf16"
    emitted = {"plain": model, "codes": "*i8", "scale": "*fp32", "total": "*i32"}
    flags = {"INT8": True, "SUM": True, "ASM": True, "PDL": arch == 90}
    for columns in (576, 4096, 14336, 28672):
        block, warps = rows.block_of(columns)
        common = {"arch": arch, "warps": warps, "fusion": False, "first": arch == 90 and columns == 4096}
        yield Spec(
            name=f"quantize {columns}",
            kernel=rows.quantize_kernel,
            types={"x": model, "codes": "*i8", "scale": "*fp32", "total": "*i32", "C": "i32", "x_stride": "i32"},
            constants={"SUM": True, "BLOCK": block, "ASM": True, "PDL": arch == 90},
            **common,
        )
        chunk, chunks = rows.chunks_of(columns, 4)
        yield Spec(
            name=f"swiglu {columns}",
            kernel=rows.swiglu_kernel,
            types={"x": "*fp32", **emitted, "C": "i32", "x_stride": "i32"},
            constants={"PLAIN": False, "CHUNK": chunk, "CHUNKS": chunks, **flags},
            **(common | {"warps": rows.CHUNK_WARPS}),
        )
        if arch == 90 and columns > rows.PART:
            yield Spec(
                name=f"swiglu {columns} in parts",
                kernel=rows.swiglu_parts_kernel,
                types={"x": model, **emitted, "board": "*i64", "C": "i32", "x_stride": "i32", "parts": "i32"},
                constants={
                    "PLAIN": False, "SUM": True, "CHUNK": rows.PART,
                    "PARTS": triton.next_power_of_2(ceil_div(columns, rows.PART)),
                },
                loose=("parts",),
                **(common | {"warps": rows.PART_WARPS}),
            )  # fmt: skip
        yield Spec(
            name=f"add_norm {columns}",
            kernel=rows.add_norm_kernel,
            types={
                "x": model, "delta": model, "weight": model, "residual": model, **emitted,
                "C": "i32", "x_stride": "i32", "delta_stride": "i32", "eps": "fp32",
            },
            constants={"DELTA": True, "PLAIN": False, "BLOCK": block, **flags},
            **common,
        )  # fmt: skip


def _write(arch: int) -> Iterator[Spec]:
    model = "*bf16"
    for group, head_dim in ((4, 128), (3, 64), (8, 256)):
        for bits, two, norm in ((4, True, False), (8, False, True), (16, False, False)):
            element = model if bits == 16 else "*u8"
            types = {
                "qkv": model, "positions": "*i64", "table": "*fp32", "q_gain": model, "k_gain": model, "q": model,
                "slots0": "*i64", "slots1": "*i64", "codes0": element, "codes1": element, "params0": "*fp16",
                "params1": "*fp16", "scale0": "*fp32", "scale1": "*fp32", "mean0": "*fp32", "mean1": "*fp32",
                "stride": "i32", "kv_heads": "i32", "share0": "i32", "eps": "fp32",
            }  # fmt: skip
            yield Spec(
                name=f"rope_write kv{bits}, {group} heads of {head_dim}",
                arch=arch,
                kernel=write.rope_write_kernel,
                types=types,
                constants=write.constants(
                    group, head_dim, bits, norm=norm, static=False, mean=True, two=two, few=bits == 16
                )
                | {"PDL": arch == 90},
                warps=write.WARPS,
                loose=("kv_heads", "share0"),
                fusion=False,
                first=arch == 90 and (head_dim, bits) == (128, 4),
            )


def _lists(arch: int) -> Iterator[Spec]:
    common = {"arch": arch, "warps": 4, "first": arch == 90}
    yield Spec(
        name="produced",
        kernel=lists.produced_kernel,
        types={
            "last": "*i64", "positions": "*i64", "slots": "*i64", "table0": "*i32", "table1": "*i32", "tokens": "*i64",
            "seq_len": "*i32", "pages": "*i32", "places0": "*i64", "places1": "*i64", "rows": "i32", "stride": "i32",
        },
        constants={"TWO": True, "BLOCK": lists.ROWS, "PDL": arch == 90},
        loose=("rows", "stride"),
        **common,
    )  # fmt: skip
    yield Spec(
        name="window",
        kernel=lists.window_kernel,
        types={
            "table": "*i32", "slots": "*i64", "cu_q": "*i32", "seq_len": "*i32", "ids": "*i32", "index": "*i32",
            "count": "*i32", "stride": "i32", "max_pages": "i32", "width": "i32", "sink": "i32", "local": "i32",
        },
        constants={"BLOCK": lists.PLACES, "PDL": arch == 90},
        loose=("slots", "cu_q", "seq_len", "stride", "max_pages", "width", "sink", "local"),
        **common,
    )  # fmt: skip


def _attention(arch: int) -> Iterator[Spec]:
    model = "*bf16"
    for group, head_dim in SHAPES:
        for bits in (4, 8, 16):
            sparse = group == 4 and bits == 4
            flags = produced.constants(
                group, head_dim, bits, arch, listed=sparse, slots=not sparse, to=sparse, window=False, two=sparse,
                window2=sparse,
            )  # fmt: skip
            options = produced.options_of(bits, head_dim, arch)
            element = model if bits == 16 else "*u8"
            yield Spec(
                name=f"attend kv{bits}, {group} heads of {head_dim}, produced",
                arch=arch,
                kernel=runs.attend_kernel,
                types={
                    "q": model, "out": model, "parts": "*fp32", "norms": "*fp32", "codes": element, "words": "*i32",
                    "scales": "*fp16", "ids": "*i32", "index": "*i32", "count": "*i32", "cuts": "*i32",
                    "slots": "*i64", "to": "*i64", "seq_len": "*i32", "rows": "i32", "kv_heads": "i32",
                    "q_stride": "i32", "out_stride": "i32", "out_head": "i32", "ids_row": "i32", "ids_head": "i32",
                    "places": "i32", "span": "i32", "offered": "i32", "full": "i32", "scale": "fp32", "sink": "i32",
                    "local": "i32",
                    "q2": model, "parts2": "*fp32", "norms2": "*fp32", "codes2": element, "words2": "*i32",
                    "scales2": "*fp16", "ids2": "*i32", "index2": "*i32", "count2": "*i32", "to2": "*i64",
                    "kv_heads2": "i32", "out_head2": "i32", "ids_row2": "i32", "ids_head2": "i32", "places2": "i32",
                    "span2": "i32", "sink2": "i32", "local2": "i32",
                },
                constants=flags | {"PDL": arch == 90},
                warps=options["num_warps"],
                stages=options["num_stages"],
                most_registers=options.get("maxnreg"),
                loose=("rows", "kv_heads", "out_head", "ids_row", "ids_head", "places", "span", "offered", "full",
                       "sink", "local", "cuts", "seq_len", "count", "kv_heads2", "out_head2", "ids_row2", "ids_head2",
                       "places2", "span2", "sink2", "local2", "count2", "to", "to2", "slots"),
                matrix=FLOATS if bits == 16 else CODES,
                longest=ATTEND_LOOPS[bits],
                first=arch == 90 and (group, bits) == (4, 4),
            )  # fmt: skip
    yield Spec(
        name="combine 128",
        arch=arch,
        kernel=combine.combine_kernel,
        types={
            "out": model, "parts": "*fp32", "norms": "*fp32", "to": "*i64", "count": "*i32", "cuts": "*i32",
            "rows": "i32", "out_stride": "i32", "out_head": "i32", "heads": "i32", "kv_heads": "i32", "group": "i32",
            "places": "i32", "span": "i32", "full": "i32", "parts2": "*fp32", "norms2": "*fp32", "to2": "*i64",
            "count2": "*i32", "out_head2": "i32", "heads2": "i32", "kv_heads2": "i32", "places2": "i32", "span2": "i32",
        },
        constants=produced.combine_constants(128, listed=False, to=True, two=True) | {"PDL": arch == 90},
        warps=8,
        loose=("rows", "out_head", "heads", "kv_heads", "group", "places", "span", "full", "count", "cuts", "out_head2",
               "heads2", "kv_heads2", "places2", "span2", "to", "to2", "count2"),
        first=arch == 90,
    )  # fmt: skip
    yield Spec(
        name="cut rows",
        arch=arch,
        kernel=cuts.cut_kernel,
        types={"pages": "*i32", "cuts": "*i32", "rows": "i32"},
        constants=cuts.cut_constants(),
        warps=4,
        loose=("rows", "pages"),
        first=arch == 90,
    )


def _selection(arch: int) -> Iterator[Spec]:
    lists = {
        "table": "*i32", "slots": "*i64", "prompts": "*i64", "seq_len": "*i32", "memo": "*i32", "scores": "*fp32",
        "beside": "*fp32", "ids": "*i32", "index": "*i32", "count": "*i32", "kv_heads": "i32", "table_stride": "i32",
        "memo_stride": "i32", "interval": "i32", "budget": "i32", "pages": "i32", "units": "i32",
    }  # fmt: skip
    loose = ("slots", "prompts", "seq_len", "count", "ids", "index", "memo", "rows", "kv_heads", "table_stride",
             "memo_stride", "interval", "budget", "pages", "units")  # fmt: skip
    unused = ("scores", "beside", "kv_heads", "pages", "units")
    yield Spec(
        name="lists of all layers",
        arch=arch,
        kernel=keep.keep_kernel,
        types={name: kind for name, kind in lists.items() if name not in unused} | {"list_stride": "i32"},
        constants=keep.keep_constants(64),
        warps=1,
        loose=(*(name for name in loose if name not in (*unused, "rows")), "list_stride"),
        first=arch == 90,
    )
    for group, head_dim, pages in ((4, 128, 4096), (3, 64, 128), (8, 256, 16384)):
        first = arch == 90 and head_dim == 128
        yield Spec(
            name=f"scores of pages, {group} heads of {head_dim}",
            arch=arch,
            kernel=select.score_kernel,
            types={"q": "*bf16", "statistics": "*fp16", "q_stride": "i32", **lists},
            constants=select.score_constants(group, head_dim, 64) | {"PDL": arch == 90},
            warps=select.SCORE_WARPS,
            loose=loose,
            matrix=r"mma\S*\.f32\.f16",
            longest=SCORE_LOOPS[head_dim],
            first=first,
        )
        for bits in (4, 8, 16):
            yield Spec(
                name=f"scores of kv{bits} keys, {group} heads of {head_dim}",
                arch=arch,
                kernel=select.key_score_kernel,
                types={
                    "q": "*fp16", "codes": "*fp16" if bits == 16 else "*u8", "scales": "*fp16", "q_stride": "i32",
                    "factor": "fp32", **lists,
                },
                constants=select.key_constants(group, head_dim, 64, bits) | {"PDL": arch == 90},
                warps=select.key_warps(head_dim),
                loose=loose,
                matrix=r"mma\S*\.f32\.(f16|bf16)",
                longest=KEY_LOOPS[bits],
                first=first and bits == 4,
            )  # fmt: skip
        names = ("slots", "prompts", "seq_len", "scores", "beside", "kv_heads", "interval", "budget", "pages", "units")
        yield Spec(
            name=f"units of {group} heads",
            arch=arch,
            kernel=choice.unit_kernel,
            types={name: lists[name] for name in names},
            constants={"G": group, "PDL": arch == 90},
            warps=1,
            loose=tuple(name for name in loose if name in names),
            first=first,
        )
        for apart in (0, group):
            narrow = choice.choose_constants(pages, 64, apart)
            yield Spec(
                name=f"choice of {pages} pages by {'keys' if apart else 'bounds'}",
                arch=arch,
                kernel=choice.choose_kernel,
                types={**lists, "rows": "i32"},
                constants=narrow | {"PDL": arch == 90},
                warps=choice.choose_warps(narrow["WIDE"]),
                loose=loose,
                counting=2 * narrow["EACH"],
                first=first and not apart,
            )
        for bits in (4, 8, 16):
            yield Spec(
                name=f"statistics kv{bits}, heads of {head_dim}",
                arch=arch,
                kernel=statistics.statistics_kernel,
                types={
                    "slots": "*i64", "codes": "*bf16" if bits == 16 else "*u8", "scales": "*fp16",
                    "statistics": "*fp16", "tokens": "i32", "kv_heads": "i32", "each": "i32",
                },
                constants=statistics.constants(head_dim, bits) | {"PDL": arch == 90},
                warps=statistics.warps_of(head_dim),
                loose=("slots", "tokens", "kv_heads", "each"),
                fusion=False,
                first=first and bits == 4,
            )  # fmt: skip


def _tiles(arch: int) -> Iterator[Spec]:
    lists = {
        "table": "*i32", "slots": "*i64", "cu_q": "*i32", "seq_len": "*i32", "shares": "*fp32", "kv_heads": "i32",
        "table_stride": "i32", "pages": "i32",
    }  # fmt: skip
    more = {"q": "*bf16", "statistics": "*fp16", "sums": "*fp32", "q_stride": "i32", "segments": "i32", "scale": "fp32"}
    loose = ("slots", "cu_q", "seq_len", "kv_heads", "table_stride", "pages")
    for group, head_dim, pages in ((4, 128, 4096), (3, 64, 128), (8, 256, 16384)):
        flags = shares.share_constants(group, head_dim, arch)
        for last in (False, True):
            name = f"{'shares' if last else 'sums'} of pages, {group} heads of {head_dim}, prompts"
            if arch == 90 and bounds.serves(group, head_dim):
                yield Spec(
                    name=f"gluon {name}",
                    arch=arch,
                    kernel=bounds.bound_kernel,
                    types=lists | more,
                    constants={"SHARES": last, "G": group, "D": head_dim},
                    warps=4,
                    loose=(*loose, "segments"),
                    matrix="wgmma",
                    longest=BOUND_LOOP,
                    first=True,
                )
            yield Spec(
                name=name,
                arch=arch,
                kernel=shares.share_kernel,
                types=lists | more,
                constants={"SHARES": last, **flags},
                warps=shares.share_warps(flags),
                loose=(*loose, "segments"),
                matrix="wgmma" if arch == 90 else FLOATS,
                longest=SHARE_LOOP,
                first=arch == 90 and group == 4,
            )
        narrow = shares.take_constants(pages, 128, group * TILE // flags["QUERIES"])
        yield Spec(
            name=f"choice of {pages} pages for prompts",
            arch=arch,
            kernel=shares.take_kernel,
            types=lists | {"ids": "*i32", "index": "*i32", "count": "*i32", "budget": "i32", "places": "i32"},
            constants=narrow,
            warps=shares.take_warps(narrow),
            loose=(*loose, "budget", "places"),
            first=arch == 90 and group == 4,
        )


def _prefill(arch: int) -> Iterator[Spec]:
    model = "*bf16"
    for group, head_dim in SHAPES:
        for bits in (4, 8, 16):
            sparse = group == 4
            yield Spec(
                name=f"gather kv{bits}, heads of {head_dim}",
                arch=arch,
                kernel=prefill.gather_kernel,
                types={
                    "k": model, "v": model, "plan": "*i32", "codes": model if bits == 16 else "*u8", "scales": "*fp16",
                    "ids": "*i32", "index": "*i32", "count": "*i32", "slots": "*i64", "cu_q": "*i32",
                    "seq_len": "*i32", "rows": "i32", "pages": "i32", "tiles": "i32", "places": "i32", "heads": "i32",
                    "head0": "i32", "ids_row": "i32", "ids_head": "i32", "sink": "i32", "local": "i32",
                },
                constants=prefill.gather_constants(
                    head_dim, bits, slots=not sparse, listed=group != 4, shared=group == 8, some=sparse, window=sparse
                ),
                warps=4,
                loose=("rows", "pages", "tiles", "places", "heads", "head0", "ids_row", "ids_head", "sink", "local",
                       "ids", "index", "slots", "count", "cu_q", "seq_len"),
                first=arch == 90 and (group, bits) == (4, 4),
            )  # fmt: skip
        for window, shared in ((False, False), (True, False), (False, True)):
            what = ", window" if window else ", chosen pages" if shared else ""
            if arch == 90 and flash.serves(head_dim):
                yield Spec(
                    name=f"gluon attend {group} heads of {head_dim}, prompts{what}",
                    arch=arch,
                    kernel=flash.flash_gluon_kernel,
                    types=flash.boxes(head_dim, "bf16", shared=shared)
                    | {
                        "out": model, "plan": "*i32", "to": "*i64", "index": "*i32", "out_stride": "i32",
                        "out_head": "i32", "keys": "i32", "heads": "i32", "together": "i32", "tiles": "i32",
                        "head0": "i32", "index_row": "i32", "index_head": "i32", "places": "i32", "scale": "fp32",
                        "sink": "i32", "local": "i32",
                    },
                    constants={"TO": window, "WINDOW": window, "SHARED": shared, "G": group, "D": head_dim},
                    warps=4,
                    loose=("out_head", "keys", "heads", "together", "tiles", "head0", "index_row", "index_head",
                           "places", "sink", "local", "to", "index"),
                    matrix="wgmma",
                    longest=FLASH_LOOP,
                    first=group == 4,
                )  # fmt: skip
            flags = prefill.constants(group, head_dim, arch=arch, to=window, window=window, shared=shared)
            yield Spec(
                name=f"attend {group} heads of {head_dim}, prompts{what}",
                arch=arch,
                kernel=prefill.flash_kernel,
                types={
                    "q": model, "k": model, "v": model, "out": model, "plan": "*i32", "to": "*i64", "index": "*i32",
                    "q_stride": "i32", "out_stride": "i32", "out_head": "i32", "keys": "i32", "heads": "i32",
                    "head0": "i32", "index_row": "i32", "index_head": "i32", "places": "i32", "scale": "fp32",
                    "sink": "i32", "local": "i32",
                },
                constants=flags,
                warps=prefill.warps_of(flags),
                stages=prefill.stages_of(flags),
                loose=("out_head", "keys", "heads", "head0", "index_row", "index_head", "places", "sink", "local",
                       "to", "index"),
                matrix="wgmma" if arch == 90 else FLOATS,
                longest=PROMPT_LOOP,
                first=arch == 90 and group == 4,
            )  # fmt: skip


def _int8(arch: int, *, packed: bool) -> str:
    """Return the pattern of int8 products: Hopper's, 4-bit weights from registers, or those of all other cards."""
    if arch == 90:
        return r"wgmma\.mma_async\S*\.s32\.s8\.s8 " + ("A=registers" if packed else "A=shared")
    return r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8\.s32"

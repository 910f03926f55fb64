"""Kernels in CUDA C++, as far as a machine without a GPU goes: NVRTC compiles them, tables choose them."""

from pathlib import Path

import pytest
import torch
import triton

from omniserve.kernels import clusters, cuda, tune
from omniserve.kernels.tiles import Entry, Tile, choose, nearest

TILE = Tile(16, 64, 2, 5, 4, 2, "cuda", programs=2)


def flags(tile: Tile) -> dict[str, int]:
    return clusters.constants(tile, torch.bfloat16, grouped=False, zero=True, bias=False)


def test_machine_code_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    first = cuda.kept(clusters.source(16), clusters.ARCH, flags(TILE))
    (path,) = tmp_path.glob("cuda/*.cubin")
    assert path.read_bytes() == first
    monkeypatch.setattr(cuda, "compiled", None)  # nothing is compiled again
    assert cuda.kept(clusters.source(16), clusters.ARCH, flags(TILE)) == first


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file"))
    code = cuda.kept(clusters.source(16), clusters.ARCH, flags(TILE))
    assert code[:4] == b"\x7fELF"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_the_compiler_refuses_is_told() -> None:
    with pytest.raises(cuda.CompileError, match=r"for sm_90a with \{'BM': 16.*identifier \"multiply\" is undefined"):
        cuda.compiled(clusters.SOURCE.read_text(), clusters.ARCH, flags(TILE))


def test_every_output_and_every_number_of_tokens_compiles_without_spills() -> None:
    for tokens in clusters.TOKENS:
        for dtype in clusters.OUTPUTS:
            tile = Tile(tokens, 64, 1, 5, 3, 2, "cuda", programs=2)
            code, said = cuda.compiled(
                clusters.source(tokens),
                clusters.ARCH,
                clusters.constants(tile, dtype, grouped=True, zero=False, bias=True),
            )
            assert code[:4] == b"\x7fELF", (tokens, dtype)
            assert "0 bytes spill stores" in said, (tokens, dtype)
            assert "Performance Loss" not in said, (tokens, dtype)


def test_without_the_compiler_another_kernel_serves() -> None:
    shape = (16, 28672, 4096, "row")
    assert choose(*shape, arch=90, sms=132).language == "cuda"
    assert choose(*shape, arch=90, sms=132, cuda=False).language in ("few", "gluon")


def test_the_faster_of_two_rows_counts() -> None:
    slow, fast = (Entry("row", 4096, 4096, 16, TILE, us) for us in (5.0, 4.0))
    assert nearest([slow, fast], 9, 4096, 4096) is fast


@pytest.mark.parametrize("kind", ["row", "g128"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 128])
def test_candidates_fit_a_multiprocessor(kind: str, tokens: int) -> None:
    found = list(tune.cuda_candidates(kind, tokens, 6144, 4096, 132))
    assert found
    for tile in found:
        taken = clusters.shared_bytes(tile, torch.bfloat16, grouped=kind == "g128") + clusters.static_bytes(tile) + 1024
        assert taken * tile.programs <= 228 * 1024, tile
        assert tile.split <= 8, "programs of a cluster"
        assert tile.stages % clusters.turns(tile) == 0, tile
    assert not list(tune.cuda_candidates("w8a8", tokens, 6144, 4096, 132))

"""Kernels in CUDA C++: NVRTC, which comes with CUDA builds of torch, compiles them; the driver launches them.

For what Triton and Gluon cannot say (`clusters.cu`). Nothing is built when omniserve is installed, and no compiler is
needed but the library: a kernel takes a fraction of a second once and is then kept beside Triton's.
"""

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniserve.kernels.device import cache_folder

OLDEST = (12, 3)
"""The first NVRTC that the kernels were written for; 13.0 is the one they were tested with."""

LINE = 128
"""Bytes of a line of a copied tile, which are swizzled."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_CLUSTER, _EARLY = 4, 6
"""Launch attributes: cluster dimension; programmatic stream serialization."""

_MOST_SHARED = 8
"""Function attribute: dynamic shared memory."""


class CompileError(RuntimeError):
    """NVRTC refused a source; the message ends with what it said."""


@functools.cache
def compiler() -> Any:
    """Return NVRTC, or None where no version of `OLDEST` or newer is found.

    Searched: the packages that come with torch, its own version first; then what the system's loader knows.
    """
    wanted = [torch.version.cuda.split(".")[0]] if torch.version.cuda else []
    majors = list(dict.fromkeys([*wanted, "13", "12"]))
    found: list[str] = []
    for major in majors:
        for folder in sys.path:
            found += map(str, sorted(Path(folder or ".").glob(f"nvidia/*/lib/libnvrtc.so.{major}")))
        found.append(f"libnvrtc.so.{major}")
    for name in found:
        try:
            for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")) if "/" in name else ():
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # the compiler looks for it by name alone
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if version(library) >= OLDEST:
            return library
    return None


def version(library: Any) -> tuple[int, int]:
    """Return the version of an NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compiled(source: str, arch: str, constants: Mapping[str, int]) -> tuple[bytes, str]:
    """Return the machine code of a source for a card ("sm_90a"), and what the compiler said about it.

    constants: macros. Multiply and add are never fused. Raises CompileError.
    """
    library = compiler()
    if library is None:
        raise CompileError(f"no NVRTC {OLDEST[0]}.{OLDEST[1]} or newer is installed")
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    try:
        options = [f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false", "--ptxas-options=-v"]
        options += [f"-D{name}={int(value)}" for name, value in sorted(constants.items())]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        said = _read(library, program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(f"NVRTC does not compile a kernel for {arch} with {dict(constants)}: {said}")
        return _read(library, program, "CUBIN"), said
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.raw


def kept(source: str, arch: str, constants: Mapping[str, int]) -> bytes:
    """Return machine code from the cache on disk; it is compiled and put there if it is not."""
    name = repr((source, arch, sorted(constants.items()), version(compiler()) if compiler() else None))
    path = Path(cache_folder()) / "cuda" / f"{hashlib.sha256(name.encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code, _ = compiled(source, arch, constants)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)  # whole or not at all: others may compile the same
    except OSError:  # a cache that cannot be written costs time, not results
        pass
    return code


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status}, {(text.value or b'unknown').decode()}")


Kernel = Callable[[int, Sequence[Any]], None]
"""Launches a kernel: how many clusters, and its arguments: tensors, numbers of 32 bits, `Map`s."""


def kernel(source: str, arch: str, name: str, constants: Mapping[str, int], *, threads: int, cluster: int,
           shared: int) -> Kernel:  # fmt: skip
    """Return a kernel of a source, loaded for the current device.

    threads  of a program; cluster: programs of a cluster; shared: bytes of dynamic shared memory
    It may start while the kernel before it ends (programmatic dependent launch), and runs on torch's current stream.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), kept(source, arch, constants)), f"loading {name}")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    _check(_driver().cuFuncSetAttribute(function, _MOST_SHARED, shared), f"{shared} bytes of shared memory for {name}")
    attributes = (_Attribute * 2)()
    attributes[0].id, attributes[0].value[0] = _EARLY, 1
    attributes[1].id = _CLUSTER
    attributes[1].value[:3] = (cluster, 1, 1)
    block = (ctypes.c_uint * 3)(threads, 1, 1)

    def launch(clusters: int, arguments: Sequence[Any]) -> None:
        held = [_argument(one) for one in arguments]
        places = (ctypes.c_void_p * len(held))(
            *(one.at if isinstance(one, Map) else ctypes.addressof(one) for one in held)
        )
        stream = torch.cuda.current_stream().cuda_stream
        grid = (ctypes.c_uint * 3)(clusters * cluster, 1, 1)
        config = _Config(grid, block, shared, stream, attributes, 2)
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), function, places, None), f"launching {name}")

    return launch


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return value if isinstance(value, Map) else ctypes.c_int(value)


class Map:
    """Says how boxes of lines are copied out of a matrix of bytes: a tensor map of the driver, 128-byte swizzle.

    at: where it stands
    """

    def __init__(self, pointer: int, rows: int, columns: int, stride: int, box: int) -> None:
        self._words = (ctypes.c_uint64 * 24)()
        self.at = (ctypes.addressof(self._words) + 63) // 64 * 64
        status = _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(self.at), 0, 2, ctypes.c_void_p(pointer), (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(stride), (ctypes.c_uint32 * 2)(LINE, box), (ctypes.c_uint32 * 2)(1, 1),
            0, 3, 2, 0,  # not interleaved, swizzled over 128 bytes, 128 bytes into the L2 cache, zeros outside
        )  # fmt: skip
        _check(status, f"a tensor map of {rows} x {columns} bytes")


@functools.lru_cache(maxsize=4096)
def tensor_map(pointer: int, rows: int, columns: int, stride: int, box: int) -> Map:
    """Return the map of bytes [rows, columns] at an address, rows `stride` apart, in boxes [box, LINE]."""
    return Map(pointer, rows, columns, stride, box)

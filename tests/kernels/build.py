"""Compile the kernels for cards that are not there, in a process of its own.

    python -m tests.kernels.build 90 all          every launch of the catalogue; `first`: one per kernel

Prints a JSON object per launch: what it became, and what is wrong with it.
"""

import dataclasses
import itertools
import json
import sys

from omniserve.kernels.ahead import CudaSpec, Spec, compile_cuda, compile_spec
from omniserve.kernels.catalog import cuda_specs, specs


def name_of(spec: Spec | CudaSpec) -> str:
    return spec.kernel if isinstance(spec, CudaSpec) else spec.kernel.__name__


def main(arch: int, which: str) -> None:
    for spec in itertools.chain(specs(arch), cuda_specs(arch)):
        if which == "first" and not spec.first:
            continue
        try:
            report = dataclasses.asdict(compile_cuda(spec) if isinstance(spec, CudaSpec) else compile_spec(spec))
        except Exception as error:  # a compiler's refusal is one launch's result
            report = {"problems": [f"does not compile: {type(error).__name__}: {str(error)[-400:]}"]}
        print(json.dumps({"arch": arch, "name": spec.name, "kernel": name_of(spec)} | report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

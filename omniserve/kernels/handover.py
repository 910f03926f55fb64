"""Starting before the kernel before has ended: programmatic dependent launch, from compute capability 9.0 on."""

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def handed_over():
    """Let the next kernel begin, then wait until all kernels before have ended and their results are seen.

    Nothing that a kernel before wrote is read above this, and nothing written. The next kernel may take its place on
    the card at once, since it waits in the same way: what it fetches meanwhile, nobody writes.
    """
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def held_back():
    """Wait as `handed_over` does, then let the next kernel begin: it may read at once what this one waited for."""
    gdc_wait()
    gdc_launch_dependents()

"""Starting before the kernel before has ended: programmatic dependent launch, from compute capability 9.0 on."""

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def handed_over():
    """Wait until all kernels before have ended and their results are seen; then let the next one begin.

    Nothing that a kernel before wrote is read above this, and nothing written: whoever comes next waits in the same
    way, so that no two kernels that depend on each other overlap by more than what stands above.
    """
    gdc_wait()
    gdc_launch_dependents()

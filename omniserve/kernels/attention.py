"""`attend` on the GPU: rows of produced positions in `produced.py`, rows of prompt positions in `prefill.py`."""

import torch
from torch import Tensor

from omniserve.kernels.device import kernel_of, need
from omniserve.kernels.prefill import Prompts, attend_prompts, serving
from omniserve.kernels.produced import attend_produced
from omniserve.kernels.write import checked
from omniserve.ops.batch import Reading, Rows, Workspace
from omniserve.ops.pages import HeadGroup, attend


@kernel_of(attend, inside=serving)
def attend_triton(
    q: Tensor, groups: tuple[HeadGroup, ...], rows: Rows, out: Tensor, work: Workspace, *, scale: float
) -> None:
    """One launch for rows of produced positions and its combine, for one head group or two; prompts: by head group."""
    assert q.shape == out.shape, f"attend: q is {tuple(q.shape)}, out is {tuple(out.shape)}"
    need(
        q.dtype in (torch.float16, torch.bfloat16) and out.dtype == q.dtype,
        f"attend of {q.dtype} into {out.dtype} on a GPU: float16 or bfloat16, the same for both, are there",
    )
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1) == out.stride()[1:], (q.stride(), out.stride())
    produced: dict[range, list[tuple[HeadGroup, Reading]]] = {}
    for group in groups:
        checked([group.store], head_dim)
        plain = group.store.format.bits == 16
        need(not plain or group.store.format.element == q.dtype, f"kv16 pages of {group.store.format.element}: as q is")
        for reading in group.reads:
            border = min(max(rows.singles, reading.rows.start), reading.rows.stop)
            if reading.rows.start < border:
                produced.setdefault(range(reading.rows.start, border), []).append((group, reading))
            if border < reading.rows.stop:
                attend_prompts(Prompts(q, out, group, reading, range(border, reading.rows.stop), rows, scale))
    for run, sides in produced.items():
        attend_produced(q, sides, run, rows, out, scale)

"""Operations on a GPU, one by one: microseconds, share of the physical limit, and torch's own kernels beside them.

The one measurement that looks below the public API, because its subject is the contracts of `ops/`.
"""

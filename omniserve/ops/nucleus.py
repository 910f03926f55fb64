"""Which tokens filters leave, and a draw among them, in whole numbers.

A token's weight, exp((logit - largest) / temperature), is rounded down to a whole number of 2^-38. Sums of whole
numbers have no order, so that an implementation may add up as it likes and still keeps the same tokens and draws the
same one. What leads to the weights are single operations of IEEE arithmetic, the same on every device.
"""

import torch
from torch import Tensor

UNITS = 38
"""The weight of the likeliest token is 2^38. What is less than 2^-38 as likely is never drawn."""
LOG2_E = 1.4426950408889634
POLYNOMIAL = (
    0.6931471824645996, 0.24022647738456726, 0.055503323674201965, 0.00961843691766262, 0.0013398875016719103,
    0.00015353361959569156,
)  # fmt: skip
"""c in 2^f = 1 + c[0] f + c[1] f^2 + ..., fitted for |f| <= 1/2: 2e-9 off, in fp32 1e-7."""
LEAST = -63.0
"""Binary logarithm of the smallest weights that are told apart."""


def weights(x: Tensor, temperature: Tensor) -> Tensor:
    """Return weights int64 [s, V] of logits [s, V] fp32 or fp64; temperature fp64 [s], greater than 0."""
    heat = (torch.full_like(temperature, LOG2_E) / temperature).to(x.dtype)
    power = (x - x.amax(-1, keepdim=True)).mul_(heat[:, None])
    power = torch.where(power > LEAST, power, LEAST)  # NaN as well
    whole = power.round()
    part = power.sub_(whole)
    value = torch.full_like(part, POLYNOMIAL[-1])
    for factor in (*POLYNOMIAL[-2::-1], 1.0):
        value.mul_(part).add_(factor)
    bits = value.mul_(2.0**30).long()
    return (bits << UNITS - 30) >> -whole.long()


def kept(weight: Tensor, order: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Return the weights int64 [s, V] with 0 for what filters drop.

    order  int64 [s, V]: ids, the likeliest first, of equals the smaller id
    top_k  int64 [s], 0: off; top_p, min_p fp64 [s], 1 and 0: off

    What min_p drops does not count for top_k, and what top_k drops not for top_p.
    """
    least = (min_p * 2.0**UNITS).ceil().long()[:, None]
    ordered = weight.gather(1, order)
    ordered *= (ordered > 0) & (ordered >= least)
    ahead = (ordered > 0).cumsum(-1) - 1
    ordered *= (ahead < top_k[:, None]) | (top_k[:, None] == 0)
    limit = _limit(ordered.sum(-1), top_p)
    ordered *= ordered.cumsum(-1) - ordered < limit[:, None]
    return torch.empty_like(ordered).scatter_(1, order, ordered)


def _limit(total: Tensor, top_p: Tensor) -> Tensor:
    """Return int64 [s]: a token stays while those before it weigh less."""
    some = (top_p * total.double()).ceil().long().clamp(min=1)
    return torch.where(top_p < 1, some, total)


def chosen(weight: Tensor, u: Tensor) -> Tensor:
    """Return the ids int64 [s] at which the sums of weights int64 [s, V] pass the share u fp64 [s] of their total."""
    cumulative = weight.cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum((u * total.double()).long(), total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=weight.shape[1] - 1)

"""Cheap dropout masks: one byte an element, drawn eight (or four) at a time from 64-bit random words.

On CPU `F.dropout` draws one random number an element, one after the other, which costs as much as the layer's own
matrix product. Here p is rounded to a multiple of 1/256, or of 1/65536 where 1/256 would be more than 2 % off; the
survivors are scaled by the exact inverse of that p, so the expectation is exact.
"""

import torch


def keep_mask(shape, p, device):
    """(mask, survivor scale): mask is integer 0/1 of `shape`, 0 with probability p."""
    bits = 8 if abs(round(p * 256) / 256 - p) <= 0.02 * min(p, 1 - p) else 16
    threshold = round(p * (1 << bits))
    if threshold == 1 << bits:
        return torch.zeros(shape, dtype=torch.uint8, device=device), 1.0
    count = 1
    for n in shape:
        count *= n
    lanes = 64 // bits
    words = torch.empty((count + lanes - 1) // lanes, dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None)
    if bits == 8:  # comparing in place keeps the integer dtype, which is ten times faster than a bool result
        mask = words.view(torch.uint8)[:count].ge_(threshold)
    else:
        mask = words.view(torch.int16)[:count].ge_(threshold - (1 << 15))
    return mask.view(shape), 1 / (1 - threshold / (1 << bits))

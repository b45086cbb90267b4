"""Selects the rows of a training step. They depend only on the step number, so resuming needs no other state."""

import hashlib

import torch


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The permutation of ``range(count)`` for one epoch (0-based); the same for the same (seed, epoch)."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    digest = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(count, generator=generator).tolist()


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The ``batch_size`` rows of optimisation step ``step`` (0-based) out of ``count`` rows.

    Every epoch has a new shuffle. A batch may span two epochs, so no row is left out and every batch is full. A batch
    larger than the data contains whole epochs.
    """
    if count < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"expected count >= 1, batch_size >= 1, step >= 0; got {count}, {batch_size}, {step}")
    first, end = step * batch_size, (step + 1) * batch_size
    indices: list[int] = []
    for epoch in range(first // count, (end - 1) // count + 1):
        start = epoch * count
        indices += epoch_order(count, seed, epoch)[max(first - start, 0) : end - start]
    return indices

"""Augmentation of images read as sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_sequences(inputs: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Move every sample by its own random -reach..reach steps and features, filling with zeros.

    Args:
        inputs: [n, T, C], any dtype and device.
        reach: largest shift in either direction; 0 returns ``inputs``.
        generator: CPU source of the shifts, so that they are the same on every device.

    Returns:
        A tensor like ``inputs``.
    """
    if reach == 0:
        return inputs
    n, steps, channels = inputs.shape
    shifts = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator).to(inputs.device)
    from_step = torch.arange(steps, device=inputs.device) + reach - shifts[0]
    from_channel = torch.arange(channels, device=inputs.device) + reach - shifts[1]
    padded = torch.nn.functional.pad(inputs, (reach, reach, reach, reach))
    sample = torch.arange(n, device=inputs.device)
    return padded[sample[:, None, None], from_step[:, :, None], from_channel[:, None, :]]


def jitter_values(inputs: Tensor, reach: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Add a random integer in -reach..reach to every non-zero value, and clamp to low..high.

    Args:
        inputs: integers [n, T, C], any device. reach: 0 returns ``inputs``.
        generator: CPU source of the noise, so that it is the same on every device.
    """
    if reach == 0:
        return inputs
    noise = torch.randint(-reach, reach + 1, inputs.shape, generator=generator).to(inputs.device)
    return (inputs + noise * (inputs != 0)).clamp(low, high)

"""The device of a run."""

from __future__ import annotations

import torch

from mamba_int.errors import MambaintError


def resolve_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; anything else is a PyTorch device name.

    Raises:
        MambaintError: if the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MambaintError(f"device '{device}' is not available here", "choose auto, cpu or cuda") from error
    return chosen

"""Between float models in PyTorch and their folders; see ``mamba_int.float_models.checkpoint``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mamba_int.errors import MambaintError
from mamba_int.files import replacing, write_json
from mamba_int.float_models.checkpoint import CONFIG_FILE, FORMAT, VERSION, WEIGHTS_FILE, listed
from mamba_int.float_models.config import MambaConfig


def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill all parameters of a model from tensors of the same names, one after the other.

    A tied weight may be missing, or be there twice and equal.

    Raises:
        MambaintError: listing keys that are missing, too many, or of a wrong shape or dtype, and naming a
            tensor that is not finite.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing, seen = [], set()
    for name, parameter in parameters.items():
        if name in tensors:
            seen.add(id(parameter))
    for name, parameter in parameters.items():
        if name not in tensors and id(parameter) not in seen:
            missing.append(name)
    extra = [name for name in tensors if name not in parameters]
    if missing or extra:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has unknown {listed(extra)}"] if extra else []
        raise MambaintError(f"{source} {' and '.join(parts)}", "give the weights of this configuration")
    filled: set[int] = set()
    misshapen: list[str] = []
    for name, parameter in parameters.items():
        if name not in tensors:
            continue
        value = tensors[name]
        if value.shape != parameter.shape:
            misshapen.append(f"{name} {tuple(value.shape)} instead of {tuple(parameter.shape)}")
            continue
        if not value.dtype.is_floating_point:
            raise MambaintError(f"{source}: {name} has dtype {value.dtype}", "give weights of floats")
        if not torch.isfinite(value).all():
            raise MambaintError(f"{source}: {name} has values that are not finite", "give a sound checkpoint")
        with torch.no_grad():
            if id(parameter) in filled:
                if not torch.equal(parameter, value.to(parameter)):
                    raise MambaintError(
                        f"{source}: {name} is tied and has another value", "set tie_embeddings = false"
                    )
            else:
                parameter.copy_(value)
        filled.add(id(parameter))
    if misshapen:
        raise MambaintError(
            f"{source} has wrong shapes: {listed(misshapen)}", "give the configuration of these weights"
        )


def save_pretrained(model: nn.Module, config: MambaConfig, architecture: str, folder: Path) -> None:
    """Write the weights and the configuration of a model to a folder, each file atomically."""
    # Tied weights come once, under their first name.
    tensors = {name: value.detach().contiguous().cpu() for name, value in model.named_parameters()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    document = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture,
        "model": config.to_dict(),
    }
    write_json(folder / CONFIG_FILE, document)

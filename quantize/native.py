"""Native checkpoint to integer graph: nothing is computed anew, the frozen integers are the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_int.config import MambaIntConfig
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.native import activation_names, build_nodes, weight_names
from mamba_int.passes import optimize

if TYPE_CHECKING:
    from mamba_int.training import Checkpoint

MAX_BITS = 24
"""Native models keep every intermediate inside 24 bits: float32 holds it exactly."""
_REMEDY = "give a checkpoint written by 'mambaint train'"


def quantize_native(checkpoint: Path) -> Graph:
    """Make the integer graph of a checkpoint file.

    Raises:
        MambaintError: if it is no checkpoint, or one of :func:`native_graph`'s faults.
    """
    from mamba_int.training import load_checkpoint

    return native_graph(load_checkpoint(checkpoint))


def native_graph(checkpoint: Checkpoint) -> Graph:
    """Make the integer graph of a checkpoint.

    Returns:
        The optimized graph, verified to stay inside 24 bits.

    Raises:
        MambaintError: for a float model or twin, a checkpoint from before its scales were frozen, integers
            that do not fit the configuration, or intermediates beyond 24 bits.
    """
    config = checkpoint.model_config
    if not isinstance(config, MambaIntConfig):
        raise MambaintError(
            "the checkpoint is of a float model, which has no integers", "convert it with 'mambaint quantize'"
        )
    if config.arithmetic != "integer":
        raise MambaintError(
            "the checkpoint is a float twin, which has no integers",
            "give the checkpoint of the run beside it",
        )
    scales = _scales(config, checkpoint.model_state)
    integers = {name: value.numpy() for name, value in checkpoint.integers.items()}
    used: set[str] = set()

    def constant(name: str, frac: int) -> IntArray:
        if name not in integers:
            raise MambaintError(f"the checkpoint lacks the integers '{name}'", _REMEDY)
        used.add(name)
        value: IntArray = integers[name]
        # Also keeps the interval arithmetic itself from overflowing.
        if value.size and (value.max() > 1 << MAX_BITS or value.min() < -(1 << MAX_BITS)):
            raise MambaintError(f"the integers '{name}' exceed {MAX_BITS} bits", _REMEDY)
        return value

    built = build_nodes(config, scales, constant)
    unused = sorted(set(integers) - used)
    if unused:
        raise MambaintError(f"the checkpoint has integers '{unused[0]}' its configuration lacks", _REMEDY)
    logits_frac = next(node.frac for node in built.nodes if node.name == built.output)
    card = _card(config, checkpoint, logits_frac)
    graph = optimize(Graph(tuple(built.nodes), built.output, config.seq_len, card), MAX_BITS)
    found = graph.types[graph.output].shape[-1]
    if found != config.n_outputs:
        raise MambaintError(f"the checkpoint has {found} logits, not {config.n_outputs}", _REMEDY)
    return graph


def _scales(config: MambaIntConfig, state: Mapping[str, Any]) -> dict[str, int]:
    """Binary places by name of every static scale."""
    names = [*weight_names(config), *activation_names(config)]
    fracs, frozen = state.get("fracs"), state.get("frozen")
    if fracs is None or frozen is None or tuple(fracs.shape) != (len(names),) or frozen.numel() != 1:
        raise MambaintError("the scales of the checkpoint do not fit its configuration", _REMEDY)
    if not bool(frozen):
        raise MambaintError(
            "the scales of the checkpoint are not frozen: its training is not half done",
            "let 'mambaint train' finish",
        )
    return {name: int(frac) for name, frac in zip(names, fracs.tolist(), strict=True)}


def _card(config: MambaIntConfig, checkpoint: Checkpoint, logits_frac: int) -> dict[str, Any]:
    """What goes with the model, as JSON values; part of its id."""
    data = checkpoint.data
    classes = list(data.class_names)
    if config.task == "classification":
        consistent = len(classes) == config.n_classes and len(data.feature_offset) == config.n_features
        shape = f"{config.seq_len} steps of {config.n_features} features"
    else:
        consistent = data.tokenizer is not None and data.tokenizer.vocab_size == config.vocab_size
        shape = f"{config.seq_len} token ids"
    if not consistent:
        raise MambaintError("the checkpoint's data does not fit its configuration", _REMEDY)
    return {
        "task": config.task,
        "classes": classes,
        "input": {
            "description": shape,
            "low": config.input_low if config.task == "classification" else 0,
            "high": config.input_high if config.task == "classification" else config.vocab_size - 1,
            "feature_offset": list(data.feature_offset),
            "feature_scale": list(data.feature_scale),
        },
        "dataset": {"name": data.name, "fingerprint": data.fingerprint},
        "checkpoint_sha256": checkpoint.sha256,
        "logits_frac": logits_frac,
        "config": config.to_dict(),
    }

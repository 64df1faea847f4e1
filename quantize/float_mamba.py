"""Post-training quantization: a float Mamba model and sample inputs to an integer graph.

The graph has the operations of native graphs only. ``quantize.blocks`` has a module for every mixer;
``quantize.pieces`` and ``quantize.state_space`` say where float models differ from native ones and what
integers make of that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.float_models.models import MambaForSequenceClassification
from mamba_int.graph import Graph
from quantize.blocks.registry import block_conversion
from quantize.calibration import FloatModel, Progress, calibrate, named_layers
from quantize.conversion_config import PROVABLE, ConversionConfig, InputFormat
from quantize.counterpart import Counterpart
from quantize.embedding_and_head import embed, head
from quantize.fits import DecayFit, TableFit
from quantize.observations import Observations
from quantize.pieces import Pieces

__all__ = ["PROVABLE", "Conversion", "ConversionConfig", "InputFormat", "build", "convert"]


@dataclass(frozen=True)
class Conversion:
    """A converted model.

    Attributes:
        graph: the integer model.
        tables: what every activation is at each of its indices, by its name in ``counterparts``, or that of
            its node if the float model does not have it.
        decays: the tables of every layer's decay and gain, by the name of the decay's node.
        counterparts: what of the graph stands for which tensor of the float model, by the tensor's name as
            ``quantize.calibration.trace`` has it.
    """

    graph: Graph
    tables: dict[str, TableFit]
    decays: dict[str, DecayFit]
    counterparts: dict[str, Counterpart]


def convert(
    model: FloatModel,
    calibration: Tensor,
    input_format: InputFormat | None = None,
    config: ConversionConfig | None = None,
    card: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Calibrate a float model and build its integer graph.

    Args:
        model: Mamba or Mamba-2, a classifier or a language model.
        calibration: sample inputs as the float model takes them: token ids int64 [n, T] or reals
            [n, T, n_features].
        input_format: what the integers of the graph's input stand for; None for token ids.
        config: bits.
        card: entries of the graph's card beyond those that follow from the model.
        progress: of the calibration.

    Raises:
        MambaintError: for a form of model that has no integer form here, calibration data that does not fit,
            or a budget of bits that does not hold the model: it names the node.
    """
    options = config or ConversionConfig()
    options = dataclasses.replace(options, seq_len=options.seq_len or calibration.shape[1])
    _check_model(model, input_format)
    observations = calibrate(model, calibration, progress)
    return build(model, observations, input_format, options, card)


def build(
    model: FloatModel,
    observations: Observations,
    input_format: InputFormat | None,
    config: ConversionConfig,
    card: dict[str, Any] | None = None,
) -> Conversion:
    """The integer graph of a calibrated model; see :func:`convert`. ``config.seq_len`` must be set."""
    classify = isinstance(model, MambaForSequenceClassification)
    p = Pieces(observations, config, carries_state=not classify or config.seq_len > config.chunk_size)
    block = block_conversion(model.config.mixer)
    residual = embed(p, model, input_format)
    for name, layer in named_layers(model):
        residual = p.add_to_residual(name, residual, block.build(p, name, layer, residual))
    output = head(p, model, residual)
    graph = p.graph.finish(output, _card(p, model, output) | (card or {}))
    return Conversion(graph, p.tables, p.decays, p.counterparts(graph))


def _check_model(model: FloatModel, input_format: InputFormat | None) -> None:
    c = model.config

    def need(condition: bool, cause: str, remedy: str) -> None:
        if not condition:
            raise MambaintError(cause, remedy)

    remedy = "convert another model"
    block_conversion(c.mixer)
    need(
        bool(c.n_features) == (input_format is not None),
        "real inputs need an input_format, token ids have none",
        "give input_format exactly if the model has n_features",
    )
    for name, parameter in model.named_parameters():
        need(bool(parameter.isfinite().all()), f"the weights '{name}' are not finite", remedy)


def _card(p: Pieces, model: FloatModel, output: str) -> dict[str, Any]:
    c, classify = model.config, isinstance(model, MambaForSequenceClassification)
    source = p.graph.nodes[0]
    features = source.integer("features")
    frac = source.frac
    steps = p.config.seq_len
    return {
        "task": "classification" if classify else "language_model",
        "classes": [str(i) for i in range(c.num_labels)] if classify else [],
        "input": {
            "description": f"{steps} steps of {features} features" if features else f"{steps} token ids",
            "low": source.integer("low"),
            "high": source.integer("high"),
            "frac": frac,
        },
        "logits_frac": p.graph.frac[output],
        "float_config": c.to_dict(),
        "conversion": dataclasses.asdict(p.config),
    }

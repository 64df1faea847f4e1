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
from mamba_int.float_models.mixer import Mixer
from mamba_int.float_models.models import MambaForCausalLM, MambaForSequenceClassification
from mamba_int.graph import Graph
from quantize.blocks.registry import block_conversion
from quantize.calibration import Convertible, Progress, calibrate, input_features, named_layers
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
    model: Convertible,
    calibration: Tensor,
    input_format: InputFormat | None = None,
    config: ConversionConfig | None = None,
    card: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Calibrate a float model and build its integer graph.

    Args:
        model: Mamba, Mamba-2 or Mamba-Integer: a classifier, a language model, or hidden states of all steps;
            or a mixer alone, which reads and gives vectors of d_model.
        calibration: sample inputs as the float model takes them: token ids int64 [n, T] or reals
            [n, T, n_features].
        input_format: what the integers of the graph's input stand for; None for token ids.
        config: bits.
        card: entries of the graph's card beyond those that follow from the model.
        progress: told after every batch of the calibration and every layer; a whole is an input or a layer,
            and two more for the head and for the proof that all intervals hold.

    Raises:
        MambaintError: for a form of model that has no integer form here, calibration data that does not fit,
            or a budget of bits that does not hold the model: it names the node.
    """
    options = config or ConversionConfig()
    options = dataclasses.replace(options, seq_len=options.seq_len or calibration.shape[1])
    _check_model(model, input_format)
    inputs = len(calibration)
    whole = inputs + _build_stages(model)

    def after_calibration(done: int, _: int) -> None:
        if progress is not None:
            progress(inputs + done, whole)

    def of_calibration(done: int, _: int) -> None:
        if progress is not None:
            progress(done, whole)

    observations = calibrate(model, calibration, of_calibration, options.reconstruct)
    return build(model, observations, input_format, options, card, after_calibration)


def _build_stages(model: Convertible) -> int:
    """Layers, the head and the proof of the whole."""
    return len(list(named_layers(model))) + 2


def build(
    model: Convertible,
    observations: Observations,
    input_format: InputFormat | None,
    config: ConversionConfig,
    card: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """The integer graph of a calibrated model; see :func:`convert`.

    ``config.seq_len`` must be set; with ``config.reconstruct`` the observations need their moments.
    """

    def done(stages: int) -> None:
        if progress is not None:
            progress(stages, _build_stages(model))

    classify = isinstance(model, MambaForSequenceClassification)
    p = Pieces(observations, config, carries_state=not classify or config.seq_len > config.chunk_size)
    block = block_conversion(model.config.mixer)
    residual = embed(p, model, input_format)
    for i, (name, layer) in enumerate(named_layers(model)):
        out = block.build(p, name, layer, residual)
        residual = out if isinstance(model, Mixer) else p.add_to_residual(name, residual, out)
        done(i + 1)
    output = residual if isinstance(model, Mixer) else head(p, model, residual)
    done(_build_stages(model) - 1)
    graph = p.graph.finish(output, _card(p, model, output) | (card or {}))
    done(_build_stages(model))
    return Conversion(graph, p.tables, p.decays, p.counterparts(graph))


def _check_model(model: Convertible, input_format: InputFormat | None) -> None:
    def need(condition: bool, cause: str, remedy: str) -> None:
        if not condition:
            raise MambaintError(cause, remedy)

    remedy = "convert another model"
    c = model.config
    block_conversion(c.mixer)
    need(
        (c.norm == "bit_shift") == c.mixer.startswith("mamba_integer"),
        f"norm = '{c.norm}' of a '{c.mixer}' has no integer form here",
        remedy,
    )
    need(
        bool(input_features(model)) == (input_format is not None),
        "real inputs need an input_format, token ids have none",
        "give input_format exactly if the model reads real numbers",
    )
    for name, parameter in model.named_parameters():
        need(bool(parameter.isfinite().all()), f"the weights '{name}' are not finite", remedy)


def _card(p: Pieces, model: Convertible, output: str) -> dict[str, Any]:
    c, classify = model.config, isinstance(model, MambaForSequenceClassification)
    task = (
        "classification"
        if classify
        else "language_model"
        if isinstance(model, MambaForCausalLM)
        else "features"
    )
    source = p.graph.nodes[0]
    features = source.integer("features")
    frac = source.frac
    steps = p.config.seq_len
    return {
        "task": task,
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

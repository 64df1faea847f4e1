"""The Python side of ``mambaint quantize``: a model or a path in, an integer model out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mamba_int.config import MambaIntConfig
from mamba_int.datasets import quantize_features
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import check_input, evaluate
from mamba_int.training import load_checkpoint
from quantize.calibration import Convertible, Progress, check_calibration, input_features
from quantize.conversion_config import ConversionConfig, InputFormat
from quantize.float_checkpoint import (
    describe_features,
    is_foreign,
    pair_with_data,
    read_float_checkpoint,
)
from quantize.float_mamba import convert
from quantize.input_file import scaling
from quantize.latest import resolve_checkpoint
from quantize.native import native_graph

if TYPE_CHECKING:
    from zk.verify import Verdict

INPUT_LIMIT = 127
"""Largest magnitude of the integers that stand for real inputs whose format is not given."""


@dataclass(frozen=True)
class InputProof:
    """A proof that a model gives its answer on an input, as two files.

    Attributes:
        proof: to show. verifier: what checks it; whoever checks must get it from someone they trust.
        logits: float64, what is proved that the model answers.
        prove_seconds: time for the proof. rows: of its circuit, of which there are 2^logrows.
    """

    proof: Path
    verifier: Path
    logits: NDArray[np.float64]
    prove_seconds: float
    rows: int
    logrows: int

    def verify(self) -> Verdict:
        """Check the proof; see ``zk.verify.verify``."""
        from zk.verify import verify

        return verify(self.proof, self.verifier)


class IntegerModel:
    """An integer graph with the inputs and answers of the float model that it stands for.

    Args:
        graph: the integers; their SHA-256 is the model's id.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @property
    def model_id(self) -> str:
        """SHA-256 of the graph, in hexadecimal."""
        return self.graph.model_id

    @classmethod
    def load(cls, path: Path | str) -> IntegerModel:
        """Read a ``.mint`` file.

        Raises:
            MambaintError: if it is missing, damaged or none.
        """
        return cls(Graph.load(Path(path)))

    def save(self, path: Path | str) -> None:
        """Write a ``.mint`` file, atomically: the commands take it.

        Raises:
            MambaintError: if ``path`` cannot be written.
        """
        self.graph.save(Path(path))

    def integers(self, inputs: ArrayLike | Tensor) -> IntArray:
        """Inputs as the graph reads them.

        Args:
            inputs: reals [n, T, features] in the units of the data, or token ids [n, T].

        Returns:
            int64 of the same shape: where the card gives a scale, rounded and clamped to the domain.

        Raises:
            MambaintError: for another shape, and for what is no finite number or no integer of the domain.
        """
        array = inputs.detach().cpu().numpy() if isinstance(inputs, Tensor) else np.asarray(inputs)
        scaled = scaling(self.graph)
        if scaled is not None:
            node = self.graph.input
            array = quantize_features(array, *scaled, node.integer("low"), node.integer("high")).numpy()
        return check_input(self.graph, array)

    def run(self, inputs: ArrayLike | Tensor) -> NDArray[np.float64]:
        """Real-valued logits [n, classes] or [n, T, vocabulary] by the NumPy interpreter.

        Args:
            inputs: see :meth:`integers`.
        """
        return self._reals(evaluate(self.graph, self.integers(inputs)))

    def _reals(self, logits: IntArray) -> NDArray[np.float64]:
        return logits.astype(np.float64) * 2.0 ** -self.graph.by_name[self.graph.output].frac

    def prove(self, inputs: ArrayLike | Tensor, folder: Path | str, public_input: bool = False) -> InputProof:
        """Prove the answer on one input; keys are made on first use, with an SRS for development.

        Writes ``proof.json`` and ``verifier.zip`` into the folder. For ceremony files, commitments and
        circuits without lookups see ``mambaint prove``.

        Args:
            inputs: one input, [T, features] or [T].
            folder: where to; made if missing.
            public_input: show the input in the proof.

        Raises:
            MambaintError: for an input that does not fit, a graph without a circuit, or too little memory.
        """
        # A model that is only run needs no circuits: this one way leads up from here to the layers above.
        from mamba_int.files import write_bytes
        from zk.provable import prepare, witness_of
        from zk.prove import prove

        integers = self.integers(np.asarray(inputs)[None])[0]
        ready = prepare(self.graph, public_input)
        witness = witness_of(self.graph, ready.lowered, integers)
        result = prove(ready.lowered.circuit, witness, ready.keys, ready.package)
        proof, verifier = Path(folder) / "proof.json", Path(folder) / "verifier.zip"
        write_bytes(verifier, ready.package)
        write_bytes(proof, result.file)
        circuit = ready.lowered.circuit
        logits = self._reals(evaluate(self.graph, integers[None])[0])
        return InputProof(proof, verifier, logits, result.prove_seconds, circuit.rows, circuit.logrows)


def quantize(
    model: Convertible | Path | str,
    calibration: ArrayLike | Tensor | Path | str | None = None,
    config: ConversionConfig | None = None,
    *,
    input_format: InputFormat | None = None,
    format: str | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> IntegerModel:
    """Make the integer model of a float model or of a checkpoint.

    Args:
        model: a model of ``mamba_int.float_models`` or a mixer of one, or the path of a checkpoint: a
            run of ``mambaint train``, or whatever ``quantize.importers`` reads. Of a native run the frozen
            integers are taken as they are.
        calibration: sample inputs as the float model takes them, token ids [n, T] or reals [n, T, features];
            for a path also a data file, or None for a run's own data.
        config: bits of the conversion; ``PROVABLE`` is made for small circuits.
        input_format: what the integers stand for that replace real inputs; unless given they have 8 bits
            (more for inputs beyond 64) and the finest power-of-two scale that holds the calibration data.
        format: of a foreign checkpoint, if it is not recognised.
        samples: most sequences of a data file to calibrate on.
        progress: of the calibration.

    Raises:
        MambaintError: for checkpoints and data that cannot be read or do not fit, and models that have no
            integer form or do not fit their budget of bits.
    """
    options = config or ConversionConfig()
    if not isinstance(model, Path | str):
        if calibration is None or isinstance(calibration, Path | str):
            raise MambaintError("there is no calibration data", "give sample inputs as an array")
        return _from_arrays(model, calibration, options, input_format, progress)
    path = Path(model)
    if format is None and not is_foreign(path):
        checkpoint = load_checkpoint(resolve_checkpoint(path))
        if isinstance(checkpoint.model_config, MambaIntConfig):
            if calibration is not None or config is not None:
                raise MambaintError(
                    f"{path} is of a native model, which is its frozen integers",
                    "leave out calibration and config",
                )
            return IntegerModel(native_graph(checkpoint))
    source = read_float_checkpoint(path, format)
    if calibration is not None and not isinstance(calibration, Path | str):
        return _from_arrays(source.model, calibration, options, input_format, progress)
    task = pair_with_data(source, None if calibration is None else Path(calibration))
    integers = task.calibration(samples, options.seq_len or None)
    card = task.card(options.seq_len or integers.shape[1])
    converted = convert(task.model, task.inputs(integers), task.input_format, options, card, progress)
    return IntegerModel(converted.graph)


def _from_arrays(
    model: Convertible,
    calibration: ArrayLike | Tensor,
    config: ConversionConfig,
    input_format: InputFormat | None,
    progress: Progress | None,
) -> IntegerModel:
    samples = calibration if isinstance(calibration, Tensor) else torch.from_numpy(np.array(calibration))
    card: dict[str, Any] = {}
    features = input_features(model)
    if features:
        samples = samples.to(torch.get_default_dtype())
        check_calibration(model, samples)
        kind = input_format or _format_of(samples)
        steps = config.seq_len or samples.shape[1]
        card["input"] = describe_features(steps, kind, [0.0] * features, [2.0**kind.frac] * features)
    else:
        kind = None
    return IntegerModel(convert(model, samples, kind, config, card, progress).graph)


def _format_of(samples: Tensor) -> InputFormat:
    """Integers of 8 bits for real samples, but with one binary place at least: without any, inputs would have
    to be integers themselves (see ``quantize.input_file.scaling``)."""
    largest = float(samples.abs().max())
    frac = min(24, max(1, math.floor(math.log2(INPUT_LIMIT / max(largest, 2.0**-24)))))
    limit = max(1, math.ceil(largest * 2.0**frac))
    return InputFormat(0 if float(samples.min()) >= 0 else -limit, limit, frac)

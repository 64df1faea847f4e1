"""A converted model beside the float model that it comes from, tensor by tensor.

Two errors of every tensor are told apart. The *cumulative* one is that of the integer graph against the float
model, both run from the same inputs. The tensor's *own* is what the nodes between it and the tensors before
it add: those hold, for it, the float model's values, rounded and saturated as their nodes hold them. Noise
that a tensor inherits is in its cumulative error alone, so the own error says where to look; only what the
tensors just before it lose by that rounding and saturation is in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from mamba_int.errors import MambaintError
from mamba_int.executor import Executor, Step, Values, execute_plan
from mamba_int.graph import Graph, IntArray, Node
from mamba_int.interpreter import check_input
from mamba_int.operations import OPERATIONS
from mamba_int.operations.base import nobody
from quantize.calibration import FloatModel, Progress, trace
from quantize.counterpart import Counterpart
from quantize.fits import DecayFit, TableFit
from quantize.float_mamba import Conversion
from quantize.operation_counts import Counts, count_operations
from quantize.sqnr import sqnr_db
from quantize.summary import magnitude_bits, summarize

BATCH_VALUES = 1 << 23
"""About as many integers of the graph are computed in a batch, though few are held at a time."""
EMBEDDING, HEAD = "embedding", "head"
"""Names for what comes before the first and after the last layer."""


@dataclass(frozen=True)
class TensorComparison:
    """One tensor of the float model, and what stands for it.

    Attributes:
        tensor: its name, as ``quantize.calibration.trace`` has it. node: of the graph.
        layer: the layer it is in. position: its place in the order of computation.
        frac: binary places of the node.
        bits: of the largest magnitude proven. observed_bits: of the largest seen; both without the sign.
        values: how many were compared.
        sqnr_db: signal to quantization noise, 10 log10(sum x^2 / sum (x^ - x)^2), cumulative; within
            +-``quantize.sqnr.LARGEST_DB``.
        cosine: similarity sum x x^ / sqrt(sum x^2 sum x^2^), cumulative.
        own_sqnr_db: the SQNR of what the tensor itself adds.
        largest_error: largest |x^ - x|, cumulative.
        saturation: of a node that saturates: share of values at either end.
    """

    tensor: str
    node: str
    layer: str
    position: int
    frac: int
    bits: int
    observed_bits: int
    values: int
    sqnr_db: float
    cosine: float
    own_sqnr_db: float
    largest_error: float
    saturation: float | None


@dataclass(frozen=True)
class LayerComparison:
    """One layer, or what comes before the first (``embedding``) or after the last (``head``).

    Attributes:
        layer: its name.
        sqnr_db, cosine: of the tensor that it ends with, cumulative.
        worst: the tensor whose own error is the largest. own_sqnr_db: that of ``worst``.
        saturation: largest share of values at an end of one of its clamps. saturated: that clamp; None if
            nothing saturates.
        peak_bits: of its largest proven intermediate.
        parameters: integers that it holds. size_bytes: what they take.
        shifts, adds, multiplies: of one step, on average over a sequence.
    """

    layer: str
    sqnr_db: float
    cosine: float
    worst: str
    own_sqnr_db: float
    saturation: float
    saturated: str | None
    peak_bits: int
    parameters: int
    size_bytes: int
    shifts: float
    adds: float
    multiplies: float


@dataclass(frozen=True)
class ActivationForm:
    """A real function as integers, with the proven bound of its error.

    Attributes:
        name: of the function in ``Conversion.tables``; a gain stands beside its decay. layer: it is in.
        form: ``table`` or ``lines``. size: entries of the table, or straight lines.
        error: no real number of the range is further from what it gives.
        relative: whether ``error`` is a share of the exact value, not in units of it.
    """

    name: str
    layer: str
    form: str
    size: int
    error: float
    relative: bool


@dataclass(frozen=True)
class Comparison:
    """A converted model beside its float model.

    Attributes:
        model_id: of the integer graph.
        inputs: how many were compared. steps: of each.
        float_parameters: of the float model. float_bytes: what they take as float32.
        size_bytes: of the integers of the graph, ternary ones at 2 bits.
        layers, tensors: worst own error first.
        activations: layer by layer.
    """

    model_id: str
    inputs: int
    steps: int
    float_parameters: int
    float_bytes: int
    size_bytes: int
    layers: tuple[LayerComparison, ...]
    tensors: tuple[TensorComparison, ...]
    activations: tuple[ActivationForm, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


def compare_with_float(
    conversion: Conversion,
    model: FloatModel,
    inputs: Tensor,
    integers: IntArray,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models on the same inputs and compare every tensor that both have.

    Only sums are kept from batch to batch, and of a batch only the float tensors: a graph's values go as soon
    as they are read.

    Args:
        conversion: the integer model.
        model: the float model that it was made from; the graph runs on its device.
        inputs: as the float model takes them: token ids int64 [n, T] or reals [n, T, n_features].
        integers: the same as the graph takes them, of the same shape.
        progress: told after every batch.

    Raises:
        MambaintError: if there are no inputs, the two differ in shape or do not fit the graph, or the float
            model is not finite on them.
    """
    graph = conversion.graph
    integers = check_input(graph, integers)
    if len(inputs) == 0 or tuple(inputs.shape) != integers.shape:
        raise MambaintError(
            f"inputs {list(inputs.shape)} of the float model beside integers {list(integers.shape)}",
            "give the same inputs, at least one, in both forms",
        )
    steps = integers.shape[1]
    device = next(model.parameters()).device
    comparer = _Comparer(graph, conversion.counterparts, device)
    per_step = sum(prod(kind.shape) for kind in graph.types.values()) / graph.seq_len
    size = max(1, int(BATCH_VALUES / (per_step * steps)))
    with torch.inference_mode():
        for start in range(0, len(inputs), size):
            stop = min(start + size, len(inputs))
            comparer.add(model, inputs[start:stop].to(device), torch.from_numpy(integers[start:stop]))
            if progress is not None:
                progress(stop, len(inputs))
    tensors = comparer.tensors()
    # A tied head is one parameter.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Comparison(
        graph.model_id,
        len(inputs),
        steps,
        parameters,
        4 * parameters,
        summarize(graph).size_bytes,
        tuple(sorted(_layers(graph, tensors, comparer.saturation), key=lambda layer: layer.own_sqnr_db)),
        tuple(sorted(tensors, key=lambda tensor: (tensor.own_sqnr_db, tensor.position))),
        tuple(_activations(conversion)),
    )


def layers_of(graph: Graph) -> dict[str, str]:
    """The layer of every node, by name: that before the dot; ``embedding`` and ``head`` around them."""
    layers, current = {}, EMBEDDING
    for node in graph.nodes:
        layer, dot, _ = node.name.partition(".")
        current = layer if dot else (current if current == EMBEDDING else HEAD)
        layers[node.name] = current
    return layers


@dataclass
class _Sums:
    """What the batches have added up to; x are the exact values, x^ those found.

    Attributes:
        signal: of x^2. found: of x^2^. product: of x x^. noise, own_noise: of (x^ - x)^2, cumulative and own.
        largest_error: largest |x^ - x|. values: how many. low, high: integers seen.
    """

    signal: float = 0.0
    found: float = 0.0
    product: float = 0.0
    noise: float = 0.0
    own_noise: float = 0.0
    largest_error: float = 0.0
    values: int = 0
    low: int = 0
    high: int = 0

    @property
    def cosine(self) -> float:
        """Two tensors of zeros are alike."""
        if self.signal == 0 or self.found == 0:
            return float(self.signal == self.found)
        return round(self.product / math.sqrt(self.signal) / math.sqrt(self.found), 6)


@dataclass
class _Ends:
    """Of a clamp: how many of its values were at an end."""

    values: int = 0
    saturated: int = 0


@dataclass
class _Comparer:
    """Sums over batches.

    Args:
        graph: the integer model. counterparts: by name of the float tensor. device: where to run.
    """

    graph: Graph
    counterparts: dict[str, Counterpart]
    device: torch.device
    sums: dict[str, _Sums] = field(default_factory=dict)
    ends: dict[str, _Ends] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.executor = Executor(self.graph, self.device)
        self.tensor_of = {counterpart.node: name for name, counterpart in self.counterparts.items()}
        self.units: dict[str, Tensor] = {}
        for name, counterpart in self.counterparts.items():
            unit = torch.tensor(2.0 ** -self.graph.by_name[counterpart.node].frac, dtype=torch.float64)
            if counterpart.scales is not None:
                unit = unit / torch.from_numpy(counterpart.scales)
            self.units[name] = unit.to(self.device)

    def add(self, model: FloatModel, inputs: Tensor, integers: Tensor) -> None:
        """Another batch."""
        exact: dict[str, Tensor] = {}

        def record(name: str, value: Tensor) -> None:
            if name not in self.counterparts:
                return
            if not bool(value.isfinite().all()):
                raise MambaintError(
                    f"'{name}' of the float model is not finite on the inputs that are compared",
                    "give inputs on which the model computes finite numbers",
                )
            exact[name] = value

        trace(model, inputs, record)

        def cumulative(node: Node, value: Tensor) -> Tensor:
            if node.op == "clamp":
                self._add_ends(node, value)
            name = self.tensor_of.get(node.name)
            if name is not None:
                self._add_values(name, exact[name].double(), value.double())
            return value

        def own(node: Node, value: Tensor) -> Tensor:
            name = self.tensor_of.get(node.name)
            if name is None:
                return value
            x, unit = exact.pop(name).double(), self.units[name]
            self.sums[name].own_noise += _power(value.double() * unit - x)
            # What the nodes after it read is exact, but for its own rounding.
            kind = self.graph.types[node.name]
            return (x / unit + 0.5).floor().clamp(kind.low, kind.high).to(value.dtype)

        for see in (cumulative, own):
            _run(self.executor, integers, see)

    def _add_ends(self, node: Node, value: Tensor) -> None:
        ends = self.ends.setdefault(node.name, _Ends())
        ends.values += value.numel()
        ends.saturated += int(((value == node.integer("low")) | (value == node.integer("high"))).sum())

    def _add_values(self, name: str, x: Tensor, integers: Tensor) -> None:
        found = integers * self.units[name]
        error = found - x
        sums = self.sums.setdefault(name, _Sums())
        sums.signal += _power(x)
        sums.found += _power(found)
        sums.product += float((x * found).sum())
        sums.noise += _power(error)
        sums.largest_error = max(sums.largest_error, float(error.abs().max()))
        sums.low = min(sums.low, int(integers.min()))
        sums.high = max(sums.high, int(integers.max()))
        sums.values += x.numel()

    def saturation(self, node: str) -> float | None:
        """Share of values at an end of a clamp, None of other nodes."""
        ends = self.ends.get(node)
        return None if ends is None else round(ends.saturated / ends.values, 6)

    def tensors(self) -> list[TensorComparison]:
        """What is known now, in the order of computation."""
        layers = layers_of(self.graph)
        tensors: list[TensorComparison] = []
        for node in self.graph.nodes:
            name = self.tensor_of.get(node.name)
            if name is None:
                continue
            sums, kind = self.sums[name], self.graph.types[node.name]
            tensors.append(
                TensorComparison(
                    tensor=name,
                    node=node.name,
                    layer=layers[node.name],
                    position=len(tensors),
                    frac=node.frac,
                    bits=magnitude_bits(kind.low, kind.high),
                    observed_bits=magnitude_bits(sums.low, sums.high),
                    values=sums.values,
                    sqnr_db=sqnr_db(sums.signal, sums.noise),
                    cosine=sums.cosine,
                    own_sqnr_db=sqnr_db(sums.signal, sums.own_noise),
                    largest_error=sums.largest_error,
                    saturation=self.saturation(node.name),
                )
            )
        return tensors


def _power(x: Tensor) -> float:
    return float(x.square().sum())


def _run(executor: Executor, integers: Tensor, see: Callable[[Node, Tensor], Tensor]) -> None:
    """Run a batch; ``see`` gets every node and its value, and returns what the nodes after it read."""
    last = {source: node.name for node in executor.nodes for source in node.inputs}

    def step(node: Node) -> Step:
        def run(values: Values, by_name: dict[str, Node]) -> None:
            operands = [values[name] for name in (node.inputs or (node.name,))]
            value = OPERATIONS[node.op].execute(by_name[node.name], operands, nobody, True)
            values[node.name] = see(node, value)
            for source in set(node.inputs):
                if last[source] == node.name:
                    del values[source]

        return Step((node.name,), run)

    inputs = integers.to(executor.device, executor.dtype)
    execute_plan([step(node) for node in executor.nodes], executor.nodes, inputs)


def _layers(
    graph: Graph, tensors: Iterable[TensorComparison], saturation: Callable[[str], float | None]
) -> list[LayerComparison]:
    """In the order of computation."""
    compared: dict[str, list[TensorComparison]] = {}
    for tensor in tensors:
        compared.setdefault(tensor.layer, []).append(tensor)
    summaries = {tensor.name: tensor for tensor in summarize(graph).tensors}
    counts, nodes = count_operations(graph), layers_of(graph)
    layers = []
    for layer, members in compared.items():
        names = [name for name, of in nodes.items() if of == layer]
        shares = [(share, name) for name in names if (share := saturation(name)) is not None]
        most, saturated = max(shares, default=(0.0, None), key=lambda pair: pair[0])
        worst = min(members, key=lambda tensor: tensor.own_sqnr_db)
        total = sum((counts[name] for name in names), Counts())
        layers.append(
            LayerComparison(
                layer=layer,
                sqnr_db=members[-1].sqnr_db,
                cosine=members[-1].cosine,
                worst=worst.tensor,
                own_sqnr_db=worst.own_sqnr_db,
                saturation=most,
                saturated=saturated if most else None,
                peak_bits=max(summaries[name].peak_bits for name in names),
                parameters=sum(summaries[name].parameters for name in names),
                size_bytes=-(-sum(summaries[name].parameter_bits for name in names) // 8),
                shifts=round(total.shifts / graph.seq_len, 1),
                adds=round(total.adds / graph.seq_len, 1),
                multiplies=round(total.multiplies / graph.seq_len, 1),
            )
        )
    return layers


def _activations(conversion: Conversion) -> list[ActivationForm]:
    """Every real function of the graph, layer by layer."""
    forms = []

    def add(name: str, fit: TableFit | DecayFit, entries: int, error: float, relative: bool = False) -> None:
        form, size = ("lines", fit.pieces) if fit.pieces else ("table", entries)
        forms.append(ActivationForm(name, name.partition(".")[0], form, size, error, relative))

    for name, fit in conversion.tables.items():
        add(name, fit, len(fit.values), fit.error)
    for name, decay in conversion.decays.items():
        add(name, decay, len(decay.decay), decay.decay_error)
        # What the gain is for is that the step size is right, whatever became of the decay.
        gain = f"{name.removesuffix('decay')}gain"
        add(gain, decay, len(decay.gain), decay.step_error, relative=True)
    order = {layer: i for i, layer in enumerate(dict.fromkeys(layers_of(conversion.graph).values()))}
    return sorted(forms, key=lambda form: order[form.layer])

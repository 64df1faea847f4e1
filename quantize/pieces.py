"""Pieces that every block is made of, as nodes of the integer graph: matrices, indices, activations, norms.

- Norms are true root mean squares: squares, a sum, ``isqrt`` and ``div`` once a step; their learned weights
  are in the matrices that follow.
- Activations are tables, or straight lines, of an index that the accumulator is rounded to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.float_models.config import Activation
from mamba_int.graph import Graph, IntArray
from quantize.conversion_config import ConversionConfig, WeightForm
from quantize.counterpart import Counterpart
from quantize.fits import ACTIVATIONS, Curve, DecayFit, DecayLines, TableFit, fit_decay
from quantize.forms import choose_decay_form, choose_form
from quantize.graph_builder import GraphBuilder, exceeded
from quantize.matrices import int8_rows, ternary_rows
from quantize.observations import Observations, Observed
from quantize.scales import (
    FloatArray,
    activation_places,
    activation_scale,
    equalisation,
    largest_integer,
    places_for,
    rounded,
)

SPREAD = 4
"""Most places between the coarsest and the finest scale of rows, channels or heads."""
_LOWEST = {"squareplus": -50.0, "algebraic_sigmoid": -math.inf}
NORM_ROOM = 2
"""Binary orders of root mean squares beyond those seen, each way, that a norm still takes exactly."""
STEADY_ROOM = 1
"""The same of what does not grow from layer to layer."""
LARGEST_INDEX_BITS = 14
"""Of an index that lines read without a clamp: a circuit looks it up, and the table of 2^16 rows holds it."""
MERGED_PLACES = 2
"""So much coarser may a norm's source be in a circuit, where it is its own square's."""


def lowest(activation: Activation) -> float:
    """What the activation makes of less than this is as good as what it makes of this."""
    return _LOWEST.get(activation, -16.0)


class Pieces:
    """An integer graph in the making, and what it is made from.

    Args:
        observations: of the float model.
        config: bits.
        carries_state: whether scans keep their state from chunk to chunk.

    Attributes:
        graph, seen, config, carries_state: these.
        residual_frac: binary places of the residual stream.
        tables, decays: see ``quantize.float_mamba.Conversion``.
    """

    def __init__(self, observations: Observations, config: ConversionConfig, carries_state: bool) -> None:
        self.seen = observations
        self.config = config
        self.carries_state = carries_state
        self.graph = GraphBuilder(config.seq_len, config.max_bits)
        self.tables: dict[str, TableFit] = {}
        self.decays: dict[str, DecayFit] = {}
        self._counterparts: dict[str, Counterpart] = {}
        # Twice what was seen: layers add up, and a saturated residual is lost for good.
        limit = config.residual_limit // 2
        self.residual_frac = min(places_for(self.seen["residual"].largest, limit), 16)

    def stands_for(self, node: str, tensor: str, scales: FloatArray | None = None) -> None:
        """Note which tensor of the float model a node holds, where they differ in name or scale.

        Args:
            node: its name. tensor: as ``quantize.calibration.trace`` names it.
            scales: see ``Counterpart``.
        """
        self._counterparts[tensor] = Counterpart(node, scales)

    def counterparts(self, graph: Graph) -> dict[str, Counterpart]:
        """What stands for every tensor of the float model in the finished graph, by the tensor's name.

        A node that was not noted with :meth:`stands_for` holds the tensor of its own name.
        """
        made = {node.name: node for node in self.graph.nodes}
        noted = {counterpart.node for counterpart in self._counterparts.values()}
        plain = {name: Counterpart(name) for name in self.seen if name in made and name not in noted}
        found = {}
        for tensor, counterpart in (plain | self._counterparts).items():
            node = made[counterpart.node]
            while node.name not in graph.by_name and node.op == "clamp":
                # It was proven to change nothing: its argument has its values.
                node = made[node.inputs[0]]
            if node.name in graph.by_name:
                found[tensor] = Counterpart(node.name, counterpart.scales)
        return found

    def add_to_residual(self, layer: str, residual: str, out: str) -> str:
        """residual + out, saturated: the residual stream after a layer."""
        b, limit = self.graph, self.config.residual_limit
        out = b.requantize(f"{layer}.out", out, self.residual_frac, limit)
        total = b.add(f"{layer}.residual_sum", "add", residual, out, frac=self.residual_frac)
        return b.saturate(f"{layer}.residual", total, -limit, limit)

    def part(self, name: str, source: str, start: int, width: int) -> str:
        """Channels start to start + width, not included."""
        b = self.graph
        return b.add(name, "slice", source, frac=b.frac[source], start=start, stop=start + width)

    def zero(self, name: str, source: str) -> str:
        """Zeros of the shape of ``source``: a clamp, for EZKL leaves out a multiplication by zero."""
        return self.graph.saturate(name, source, 0, 0)

    def concat(self, name: str, parts: Sequence[str]) -> str:
        """Channels of tensors one after the other, all rounded to the places of the coarsest."""
        b = self.graph
        if len(parts) == 1:
            return parts[0]
        frac = min(b.frac[part] for part in parts)
        aligned = [b.shift(f"{part}_aligned", part, frac) for part in parts]
        return b.add(name, "concat", *aligned, frac=frac)

    def places(self, observed: Observed, limit: int, channels: FloatArray | None = None) -> int:
        """Binary places of an activation; of its channels times 2^channels, if given."""
        if channels is not None:
            sample = observed.sample * np.exp2(channels)
            largest = float((observed.channels * np.exp2(channels)).max())
            return activation_places(sample, largest, limit, self.config.scales, self.config.percentile)
        return activation_places(
            observed.sample, observed.largest, limit, self.config.scales, self.config.percentile
        )

    def gains(self, channels: FloatArray, weight: FloatArray, form: WeightForm) -> IntArray:
        """By how many places the channels that a matrix reads are made larger; see ``equalisation``.

        Ternary rows have no column that could be smaller for it.
        """
        if form == "ternary":
            return np.zeros(len(channels), np.int64)
        return equalisation(channels, weight, SPREAD)

    def linear(
        self,
        name: str,
        source: str,
        weight: FloatArray,
        bias: FloatArray | None,
        scales: FloatArray | None = None,
        reads: str = "",
        form: WeightForm = "int8",
    ) -> str:
        """weight . x + bias, of integer rows with a scale each, all rows brought to one.

        Args:
            scales: by how much the channels of the source are larger than x; None where they are not.
            reads: the traced tensor that x is, from whose moments the integers may be chosen; none if empty.
            form: of the rows.

        Raises:
            MambaintError: if even rows of a few bits less exceed the budget.
        """
        b, f = self.graph, self.graph.frac[source]
        if scales is not None:
            weight = weight / scales
        covariance = None
        if reads and self.config.reconstruct:
            mean, covariance = self._moments(reads, np.ones(weight.shape[1]) if scales is None else scales)
        # In a circuit a weight costs the same whatever its bits, and so spares the factor of its row.
        folded = self.config.target == "circuit"
        limit = largest_integer(self.config.weight_bits)
        ternary = form == "ternary"
        forms = ternary_rows(weight, covariance) if ternary else int8_rows(weight, limit, SPREAD, covariance)
        for rows in forms:
            offset = np.zeros(len(weight)) if bias is None else bias
            if covariance is not None:
                offset = offset + (weight - rows.reals) @ mean
            offsets = rounded(offset / rows.units, f)
            reach = np.abs(rows.integers).sum(1) * b.types[source].magnitude + np.abs(offsets)
            # A product with factors is bounded by the largest row and the largest factor.
            most = int((reach * rows.factors).max() if folded else reach.max() * rows.factors.max())
            if most < 1 << (b.max_bits - 1):
                break
        else:
            raise exceeded(name, "linear", most, b.max_bits)
        constants: dict[str, Any] = {"weight": rows.integers}
        if bias is not None or covariance is not None:
            constants["bias"] = offsets
        frac = f + rows.places
        if folded:
            constants = {key: (value.T * rows.factors).T for key, value in constants.items()}
        if folded or (rows.factors == 1).all():
            return b.add(name, "linear", source, frac=frac, constants=constants)
        # The scales of the rows differ: the places of the product are nominal until the rows are aligned.
        b.add(f"{name}_rows", "linear", source, frac=frac, constants=constants)
        return b.add(name, "mul", f"{name}_rows", frac=frac, constants={"value": rows.factors})

    def _moments(self, reads: str, scales: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and covariance of a traced tensor times scales of its channels."""
        moments = self.seen[reads].moments
        if moments is None:
            raise MambaintError(
                f"nothing is known of how the channels of '{reads}' move together",
                "calibrate with moments=True for reconstruction",
            )
        return moments.mean * scales, moments.covariance * np.outer(scales, scales)

    def index(self, name: str, source: str, bits: int, low: float) -> str:
        """Round to an index that covers what was seen, and a tenth more, from ``low`` on."""
        b, entries, observed = self.graph, 1 << bits, self.seen[name]
        slack = (observed.high - observed.low) / 10
        bottom = max(observed.low - slack, low)
        top = max(observed.high + slack, bottom + 1)
        # Rounding the ends may take an entry more.
        frac = min(math.floor(math.log2((entries - 2) / (top - bottom))), b.frac[source])
        first, last = math.floor(bottom * 2.0**frac), math.ceil(top * 2.0**frac)
        wide = b.shift(f"{name}_wide", source, frac)
        return b.saturate(name, wide, first, last)

    def activation(self, name: str, index: str, kind: str, frac: int, limit: int) -> str:
        """An activation of an index: see :meth:`curve`."""
        return self.curve(name, index, ACTIVATIONS[kind], frac, limit)

    def curve(self, name: str, index: str, curve: Curve, frac: int, limit: int, floor: float = 0.0) -> str:
        """A function of an index, in the form that ``quantize.forms`` chooses.

        Args:
            index: node of :meth:`index`. frac: places of the result, which saturates at +-limit.
            floor: see ``quantize.forms.choose_form``.
        """
        b, tensor, index_frac = self.graph, self.graph.types[index], self.graph.frac[index]
        fit = choose_form(curve, tensor.low, tensor.high, index_frac, frac, limit, self.config, floor)
        if isinstance(fit, TableFit):
            self.tables[name] = fit
            return b.add(name, "table", index, frac=frac, constants={"values": fit.values}, low=fit.low)
        self.tables[name] = fit.table
        lines = self.lines(name, self._unclamped(index, fit.reach, fit.slope_frac - frac), fit.knots)
        total = self.sum_of_lines(name, lines, fit.slopes, fit.offset, fit.slope_frac)
        return b.requantize(name, total, frac, limit)

    def _unclamped(self, index: str, reach: Callable[[int, int], int], places: int) -> str:
        """What an index is clamped from, where lines of it stay inside the budget: below its range the first
        line gives the same, and beyond it the last goes on."""
        b = self.graph
        (wide,) = b.by_name[index].inputs
        tensor = b.types[wide]
        fits = reach(tensor.low, tensor.high) + (1 << places) < 1 << (b.max_bits - 1)
        return wide if fits and tensor.magnitude < 1 << LARGEST_INDEX_BITS else index

    def lines(self, name: str, index: str, knots: Sequence[int]) -> list[str]:
        """max(index - knot, 0) for every knot."""
        b, frac, found = self.graph, self.graph.frac[index], []
        for i, knot in enumerate(knots):
            above = b.add(f"{name}_from{i}", "sub", index, frac=frac, constants={"value": knot})
            found.append(b.add(f"{name}_above{i}", "relu", above, frac=frac))
        return found

    def sum_of_lines(
        self, name: str, lines: Sequence[str], slopes: Sequence[int], offset: int, frac: int
    ) -> str:
        """offset + sum_i slopes[i] lines[i]."""
        b, total = self.graph, ""
        for i, (line, slope) in enumerate(zip(lines, slopes, strict=True)):
            if slope:
                scaled = b.add(f"{name}_line{i}", "mul", line, frac=frac, constants={"value": slope})
                total = b.add(f"{name}_sum{i}", "add", total, scaled, frac=frac) if total else scaled
        total = total or self.zero(f"{name}_none", lines[0])
        return b.add(f"{name}_lines", "add", total, frac=frac, constants={"value": offset})

    def decay_and_gain(self, name: str, index: str, stepless: bool = False) -> tuple[str, str]:
        """The nodes name.decay and name.gain of an index log(step size times -A); see ``quantize.fits``.

        Without a step size they are tables, and the gain has the range of 1 / (1 - a) and more bits for it.
        """
        b, c, tensor, frac = self.graph, self.config, self.graph.types[index], self.graph.frac[index]
        if stepless:
            ends = tensor.low, tensor.high
            fit: DecayFit | DecayLines = fit_decay(*ends, frac, c.decay_bits, c.internal_bits, stepless=True)
        else:
            fit = choose_decay_form(tensor.low, tensor.high, frac, c)
        decay, gain = f"{name}.decay", f"{name}.gain"
        if isinstance(fit, DecayFit):
            self.decays[decay] = fit
            constants = ({"values": fit.decay}, {"values": fit.gain})
            b.add(decay, "table", index, frac=c.decay_bits, constants=constants[0], low=fit.low)
            b.add(gain, "table", index, frac=fit.gain_frac, constants=constants[1], low=fit.low)
            return decay, gain
        self.decays[decay] = fit.fit

        def reach(low: int, high: int) -> int:
            return max(fit.decay.reach(low, high), fit.gain.reach(low, high))

        places = fit.decay.slope_frac - c.decay_bits
        lines = self.lines(decay, self._unclamped(index, reach, places), fit.decay.knots)
        for node, part, fine, most in (
            (decay, fit.decay, c.decay_bits, (1 << c.decay_bits) - 1),
            (gain, fit.gain, fit.fit.gain_frac, (1 << c.gain_bits) - 1),
        ):
            total = self.sum_of_lines(node, lines, part.slopes, part.offset, part.slope_frac)
            b.saturate(node, b.shift(f"{node}_wide", total, fine), 0, most)
        return decay, gain

    def norm(
        self,
        name: str,
        source: str,
        eps: float,
        weight: FloatArray | None,
        form: WeightForm = "int8",
        steady: bool = False,
    ) -> tuple[str, FloatArray]:
        """x over its root mean square times a scale, and that scale of every channel of the result.

        The scale fills the result's bits, which the matrix that reads it undoes. Channels that are small have
        whole places more. Where no matrix follows (``weight`` is None), it is a power of two.

        Args:
            steady: as of :meth:`over_root_mean_square`.
        """
        b, c = self.graph, self.config
        d = b.types[source].shape[-1]
        gains = np.zeros(d, np.int64)
        if weight is not None:
            gains = self.gains(np.broadcast_to(self.seen[name].channels, d), weight, form)
        limit = c.activation_limit
        samples = self.seen[name].sample * np.exp2(gains)
        whole = activation_scale(samples, limit, c.scales, c.percentile)
        places = math.floor(math.log2(whole))
        scale = whole * 2.0**-places if weight is not None else 1.0
        product = self.over_root_mean_square(name, source, eps, scale, gains, steady)
        normed = b.requantize(name, product, min(places, b.frac[product]), limit)
        scales = scale * np.exp2(gains)
        self.stands_for(normed, name, scales)
        return normed, scales

    def over_root_mean_square(
        self,
        name: str,
        source: str,
        eps: float,
        scale: float,
        gains: IntArray,
        steady: bool = False,
    ) -> str:
        """x times scale 2^gains over its root mean square.

        With S = 2^t (sum xs^2 + d eps), R = isqrt(S) and K = s sqrt(d) 2^(t/2 + kappa): x K / R is
        2^kappa s x / rms, for any t and kappa that keep R exact and K / R inside the budget, and for any s.

        Args:
            steady: no residual stream that may double: less room beyond what was seen, and more places.
        """
        self.stands_for(source, f"{name}.source")
        b, c = self.graph, self.config
        d = b.types[source].shape[-1]
        room = b.max_bits - 1
        square_limit = math.isqrt((1 << room) // (2 * d))
        seen = self.seen[f"{name}.source"].largest
        # Residuals may double, and what a square loses to saturation falsifies the whole vector.
        growth, orders = (1, STEADY_ROOM) if steady else (2, NORM_ROOM)
        # Nor may eps exceed the budget where almost nothing was seen.
        finest = math.floor(math.log2((1 << (room - 2)) / (eps * d)) / 2)
        square_frac = min(places_for(growth * seen, square_limit), b.frac[source], finest)
        wide = b.types[source].magnitude > max(c.internal_limit, c.residual_limit)
        if c.target == "circuit" and (wide or b.frac[source] - square_frac <= MERGED_PLACES):
            # One rounding and one clamp instead of two.
            source = b.requantize(f"{name}_source", source, square_frac, square_limit)
        xs = b.requantize(f"{name}_xs", source, square_frac, square_limit)
        squares = b.add(f"{name}_squares", "mul", xs, xs, frac=2 * square_frac)
        offset = max(1, round(eps * d * 4.0**square_frac))
        ones = {"weight": np.ones((1, d), np.int64), "bias": [offset]}
        total = b.add(f"{name}_sum", "linear", squares, frac=2 * square_frac, constants=ones)

        mean = self.seen[f"{name}.square"]
        unit = d * 4.0**square_frac
        highest = min(b.types[total].high, math.ceil(mean.high * unit * 4.0**orders) + offset)
        lower = max(0, highest.bit_length() + 1 - min(c.norm_bits, b.max_bits))
        lowest = max(1, (math.floor(mean.low * unit / 4.0**orders) + offset) >> lower)
        total = b.shift(f"{name}_rounded", total, 2 * square_frac - lower)
        total = b.saturate(f"{name}_bounded", total, lowest, max(lowest, highest >> lower))
        t = room - b.types[total].high.bit_length()
        scaled = b.shift(f"{name}_scaled", total, 2 * square_frac - lower + t)
        t -= lower
        root = b.add(f"{name}_root", "isqrt", scaled, frac=0)
        smallest = b.types[root].low

        inverse_bits = room - int(gains.max()) - b.types[source].magnitude.bit_length()
        largest = min(smallest << inverse_bits, 1 << room)
        unit = scale * math.sqrt(d * 2.0**t)
        kappa = math.floor(math.log2(largest / unit))
        numerator = round(unit * 2.0**kappa)
        held = {"weight": np.zeros((1, 1), np.int64), "bias": [numerator]}
        constant = b.add(f"{name}_numerator", "linear", root, frac=0, constants=held)
        inverse = b.add(f"{name}_inverse", "div", constant, root, frac=kappa - square_frac)
        spread = b.add(
            f"{name}_gains",
            "linear",
            inverse,
            frac=kappa - square_frac,
            constants={"weight": (1 << gains)[:, None]},
        )
        frac = b.frac[source] + kappa - square_frac
        return b.add(f"{name}_product", "mul", source, spread, frac=frac)

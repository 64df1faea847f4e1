"""Pieces that every block is made of, as nodes of the integer graph: matrices, indices, activations, norms.

- Norms are true root mean squares: squares, a sum, ``isqrt`` and ``div`` once a step; their learned weights
  are in the matrices that follow.
- Activations are tables of an index that the accumulator is rounded to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mamba_int.errors import MambaintError
from mamba_int.graph import Graph
from quantize.conversion_config import ConversionConfig
from quantize.counterpart import Counterpart
from quantize.fits import ACTIVATIONS, DecayFit, TableFit, fit_piecewise, fit_table
from quantize.graph_builder import GraphBuilder
from quantize.observations import Observations, Observed
from quantize.scales import (
    FloatArray,
    activation_places,
    activation_scale,
    equalisation,
    largest_integer,
    places_for,
    rounded,
    weight_places,
)

SPREAD = 4
"""Most places between the coarsest and the finest scale of rows, channels or heads."""
LOWEST = -16.0
"""What activations make of less is as good as zero."""
NORM_ROOM = 2
"""Binary orders of root mean squares beyond those seen, each way, that a norm still takes exactly."""


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

    def linear(
        self,
        name: str,
        source: str,
        weight: FloatArray,
        bias: FloatArray | None,
        scales: FloatArray | None = None,
    ) -> str:
        """weight . x + bias, of int8 rows with a power-of-two scale each, all rows brought to the finest.

        ``scales`` says by how much the channels of the source are larger than x.
        """
        b, f = self.graph, self.graph.frac[source]
        if scales is not None:
            weight = weight / scales
        limit = largest_integer(self.config.weight_bits)
        # What the coarsest row may reach, times 2^spread, must stay inside the budget.
        reach = weight.shape[1] * limit * b.types[source].magnitude
        spread = min(SPREAD, b.max_bits - 1 - reach.bit_length())
        if spread < 0:
            raise MambaintError(
                f"'{name}' sums {weight.shape[1]} products, beyond {b.max_bits} bits",
                "lower weight_bits or activation_bits",
            )
        places = weight_places(weight, limit, spread)
        integers = np.clip(rounded(weight, places[:, None].astype(np.float64)), -limit, limit)
        constants: dict[str, Any] = {"weight": integers}
        if bias is not None:
            constants["bias"] = rounded(bias, (f + places).astype(np.float64))
        finest = int(places.max())
        if (places == finest).all():
            return b.add(name, "linear", source, frac=f + finest, constants=constants)
        # The places of the rows differ: those of the product are nominal until the rows are aligned.
        b.add(f"{name}_rows", "linear", source, frac=f + finest, constants=constants)
        factors = 1 << (finest - places)
        return b.add(name, "mul", f"{name}_rows", frac=f + finest, constants={"value": factors})

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
        b = self.graph
        tensor = b.types[index]
        curve, index_frac = ACTIVATIONS[kind], b.frac[index]
        if not self.config.pieces:
            fit = fit_table(curve, tensor.low, tensor.high, index_frac, frac, limit)
            self.tables[name] = fit
            return b.add(name, "table", index, frac=frac, constants={"values": fit.values}, low=fit.low)
        lines = fit_piecewise(curve, tensor.low, tensor.high, index_frac, frac, limit, self.config.pieces)
        self.tables[name] = lines.table
        total, wide = "", lines.slope_frac
        for i, (knot, slope) in enumerate(zip(lines.knots, lines.slopes, strict=True)):
            above = b.add(f"{name}_from{i}", "sub", index, frac=index_frac, constants={"value": knot})
            above = b.add(f"{name}_above{i}", "relu", above, frac=index_frac)
            line = b.add(f"{name}_line{i}", "mul", above, frac=wide, constants={"value": slope})
            total = b.add(f"{name}_lines{i}", "add", total, line, frac=wide) if total else line
        total = b.add(f"{name}_lines", "add", total, frac=wide, constants={"value": lines.offset})
        return b.requantize(name, total, frac, limit)

    def norm(self, name: str, source: str, eps: float, weight: FloatArray | None) -> tuple[str, FloatArray]:
        """x over its root mean square times a scale, and that scale of every channel of the result.

        With S = 2^t (sum xs^2 + d eps), R = isqrt(S) and K = s sqrt(d) 2^(t/2 + kappa): x K / R is
        2^kappa s x / rms, for any t and kappa that keep R exact and K / R inside the budget, and for any s:
        the one that fills the result's bits, which the matrix that reads it undoes. Channels that are small
        have whole places more. Where no matrix follows (``weight`` is None), s is a power of two.
        """
        self.stands_for(source, f"{name}.source")
        b, c = self.graph, self.config
        d = b.types[source].shape[-1]
        room = b.max_bits - 1
        square_limit = math.isqrt((1 << room) // (2 * d))
        seen = self.seen[f"{name}.source"].largest
        # Residuals may double, and what a square loses to saturation falsifies the whole vector.
        square_frac = min(places_for(2 * seen, square_limit), b.frac[source])
        xs = b.requantize(f"{name}_xs", source, square_frac, square_limit)
        squares = b.add(f"{name}_squares", "mul", xs, xs, frac=2 * square_frac)
        offset = max(1, round(eps * d * 4.0**square_frac))
        ones = {"weight": np.ones((1, d), np.int64), "bias": [offset]}
        total = b.add(f"{name}_sum", "linear", squares, frac=2 * square_frac, constants=ones)

        mean = self.seen[f"{name}.square"]
        unit = d * 4.0**square_frac
        highest = min(b.types[total].high, math.ceil(mean.high * unit * 4.0**NORM_ROOM) + offset)
        lower = max(0, highest.bit_length() + 1 - min(c.norm_bits, b.max_bits))
        lowest = max(1, (math.floor(mean.low * unit / 4.0**NORM_ROOM) + offset) >> lower)
        total = b.shift(f"{name}_rounded", total, 2 * square_frac - lower)
        total = b.saturate(f"{name}_bounded", total, lowest, max(lowest, highest >> lower))
        t = room - b.types[total].high.bit_length()
        scaled = b.shift(f"{name}_scaled", total, 2 * square_frac - lower + t)
        t -= lower
        root = b.add(f"{name}_root", "isqrt", scaled, frac=0)
        smallest = b.types[root].low

        gains = np.zeros(d, np.int64)
        if weight is not None:
            gains = equalisation(np.broadcast_to(self.seen[name].channels, d), weight, SPREAD)
        limit = c.activation_limit
        samples = self.seen[name].sample * np.exp2(gains)
        whole = activation_scale(samples, limit, c.scales, c.percentile)
        places = math.floor(math.log2(whole))
        scale = whole * 2.0**-places if weight is not None else 1.0
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
        product = b.add(f"{name}_product", "mul", source, spread, frac=frac)
        scales = scale * np.exp2(gains)
        normed = b.requantize(name, product, min(places, frac), limit)
        self.stands_for(normed, name, scales)
        return normed, scales

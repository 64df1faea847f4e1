"""Post-training quantization: a float Mamba or Mamba-2 model and sample inputs to an integer graph.

The graph has the operations of native graphs only. Where a float model differs from those:

- Norms are true root mean squares: squares, a sum, ``isqrt`` and ``div`` once a step; their learned weights
  are in the matrices that follow.
- Activations are tables of an index that the accumulator is rounded to.
- h' = e^(dt A) h + dt B x becomes h' = a h + (1 - a) B x', the recurrence of ``ssd``, with
  x' = x dt / (1 - a): a and dt |A| / (1 - a) are tables of one index, log(dt |A|); see
  ``quantize.fits.fit_decay``.
- B and C are not rotated: B^ = B' = B, C^ = C.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from mamba_int.errors import MambaintError
from mamba_int.float_models.mamba import MambaMixer
from mamba_int.float_models.mamba2 import Mamba2Mixer
from mamba_int.float_models.models import MambaForSequenceClassification, RMSNorm
from mamba_int.graph import Graph
from quantize.calibration import FloatModel, Observations, Observed, Progress, calibrate, mixers
from quantize.fits import ACTIVATIONS, DecayFit, TableFit, fit_decay, fit_piecewise, fit_table, log_step
from quantize.graph_builder import GraphBuilder
from quantize.scales import (
    FloatArray,
    Method,
    activation_places,
    activation_scale,
    equalisation,
    places_for,
    rounded,
    weight_places,
)
from quantize.scan_fit import ScanShape, fit_scan

SPREAD = 4
"""Most places between the coarsest and the finest scale of rows, channels or heads."""
LOWEST = -16.0
"""What activations make of less is as good as zero."""
NORM_ROOM = 2
"""Binary orders of root mean squares beyond those seen, each way, that a norm still takes exactly."""


@dataclass(frozen=True)
class InputFormat:
    """Integers that stand for a model's real inputs: reals are integer * 2**-frac.

    Attributes:
        low, high: range of the integers. frac: their binary places.
    """

    low: int
    high: int
    frac: int = 0

    def __post_init__(self) -> None:
        if not -(1 << 15) <= self.low < self.high <= 1 << 15 or not 0 <= self.frac <= 24:
            raise MambaintError(
                f"inputs of {self.low}..{self.high} with {self.frac} binary places",
                "choose low < high inside 16 bits and 0 to 24 places",
            )


@dataclass(frozen=True)
class ConversionConfig:
    """Bits of a converted model. All counts include the sign.

    Attributes:
        seq_len: steps that the graph is exported and proved at; 0 for those of the calibration data.
        weight_bits: of the matrices, with a power-of-two scale for every row.
        activation_bits: of what matrices and the scan's B and C are multiplied with.
        internal_bits: of what is only multiplied elementwise: inputs of convolutions, y and its gating.
        residual_bits: of the residual stream.
        norm_bits: of a norm's sum of squares once it is bounded, which in a circuit a lookup must hold.
        index_bits: of the index of an activation. pieces: straight lines that an activation is made of, or 0
            for a table: in a circuit every element pays for every entry of a table, but once for a line.
        decay_index_bits: of the indices of step size and decay, always of tables.
        decay_bits, A_bits: of a decay and of products of decays; see ``mamba_int.operations.ssd``.
        scan_bits: of x in the scan. gain_bits: of dt / (1 - a).
        chunk_size: steps of a chunk of the scan.
        max_bits: no intermediate exceeds 2**max_bits; 29 is what ONNX Runtime computes in int32, 24 what
            float32 holds.
        scales: how an activation's scale is found; see ``quantize.scales.activation_places``.
        percentile: share of magnitudes that must not saturate, if ``scales`` is ``percentile``.
    """

    seq_len: int = 0
    weight_bits: int = 8
    activation_bits: int = 8
    internal_bits: int = 14
    residual_bits: int = 15
    norm_bits: int = 29
    index_bits: int = 10
    pieces: int = 0
    decay_index_bits: int = 10
    decay_bits: int = 12
    A_bits: int = 16
    scan_bits: int = 10
    gain_bits: int = 9
    chunk_size: int = 16
    max_bits: int = 29
    scales: Method = "mse"
    percentile: float = 0.9999

    def __post_init__(self) -> None:
        ranges = {
            "weight_bits": (2, 12),
            "activation_bits": (3, 12),
            "internal_bits": (4, 16),
            "residual_bits": (6, 20),
            "norm_bits": (8, 40),
            "index_bits": (4, 10),
            "pieces": (0, 64),
            "decay_index_bits": (4, 10),
            "decay_bits": (2, 20),
            "A_bits": (self.decay_bits, 24),
            "scan_bits": (3, 16),
            "gain_bits": (3, 16),
            "chunk_size": (1, 256),
            "max_bits": (16, 53),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise MambaintError(f"[conversion] {name} = {value}", f"choose {low} to {high}")
        if self.scales not in ("mse", "percentile", "minmax"):
            raise MambaintError(f"[conversion] scales = {self.scales!r}", "choose mse, percentile or minmax")
        if not 0.5 < self.percentile <= 1:
            raise MambaintError(f"[conversion] percentile = {self.percentile}", "choose 0.5 to 1")

    @property
    def activation_limit(self) -> int:
        """Largest magnitude of an activation."""
        return _limit(self.activation_bits)

    @property
    def internal_limit(self) -> int:
        """Largest magnitude of what is multiplied elementwise."""
        return _limit(self.internal_bits)


PROVABLE = ConversionConfig(
    internal_bits=10,
    residual_bits=12,
    norm_bits=16,
    index_bits=8,
    pieces=8,
    decay_index_bits=6,
    decay_bits=8,
    A_bits=12,
    scan_bits=8,
    gain_bits=7,
    max_bits=24,
)
"""For small circuits: all within 24 bits, activations of straight lines, tables of 64 entries."""


@dataclass(frozen=True)
class Conversion:
    """A converted model.

    Attributes:
        graph: the integer model.
        tables: what every activation is at each of its indices, by the name of its node.
        decays: the tables of every layer's decay and gain, by the name of the decay's node.
    """

    graph: Graph
    tables: dict[str, TableFit]
    decays: dict[str, DecayFit]


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
    return _Builder(model, observations, input_format, config).build(card or {})


def _check_model(model: FloatModel, input_format: InputFormat | None) -> None:
    c = model.config

    def need(condition: bool, cause: str, remedy: str) -> None:
        if not condition:
            raise MambaintError(cause, remedy)

    remedy = "convert another model"
    if c.mixer == "mamba":
        need(not c.BCdt_norm, "BCdt_norm has no integer form here", remedy)
    else:
        need(c.n_groups == 1, f"n_groups = {c.n_groups} has no integer form here", remedy)
        need(c.d_state % 2 == 0, f"d_state = {c.d_state} is odd", "give a model whose d_state is even")
    need(
        not isinstance(model, MambaForSequenceClassification) or c.pooling != "max",
        "pooling = 'max' has no integer form here",
        remedy,
    )
    need(
        bool(c.n_features) == (input_format is not None),
        "real inputs need an input_format, token ids have none",
        "give input_format exactly if the model has n_features",
    )
    for name, parameter in model.named_parameters():
        need(bool(parameter.isfinite().all()), f"the weights '{name}' are not finite", remedy)


def _limit(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _array(parameter: Tensor) -> FloatArray:
    # A copy: of a float64 model it would be the parameter itself.
    return np.array(parameter.detach().double().cpu().numpy())


def _bias(linear: nn.Linear) -> FloatArray | None:
    # nn.Linear declares its bias a tensor, but it may be absent.
    bias: Tensor | None = linear.bias
    return None if bias is None else _array(bias)


def _conv_parameters(mixer: MambaMixer | Mamba2Mixer) -> tuple[FloatArray, FloatArray]:
    """Taps [channels, width] and biases."""
    taps, bias = _array(mixer.conv1d.weight)[:, 0], mixer.conv1d.bias
    return taps, np.zeros(len(taps)) if bias is None else _array(bias)


class _Builder:
    def __init__(
        self,
        model: FloatModel,
        observations: Observations,
        input_format: InputFormat | None,
        config: ConversionConfig,
    ) -> None:
        self.model = model
        self.seen = observations
        self.input_format = input_format
        self.c = config
        self.graph = GraphBuilder(config.seq_len, config.max_bits)
        self.tables: dict[str, TableFit] = {}
        self.decays: dict[str, DecayFit] = {}
        # Twice what was seen: layers add up, and a saturated residual is lost for good.
        limit = _limit(config.residual_bits) // 2
        self.residual_frac = min(places_for(self.seen["residual"].largest, limit), 16)

    def build(self, card: dict[str, Any]) -> Conversion:
        residual = self._embed()
        for i, norm, mixer in mixers(self.model):
            residual = self._block(f"layer{i}", residual, mixer, norm)
        output = self._head(residual)
        graph = self.graph.finish(output, self._card(output) | card)
        kept = graph.by_name
        return Conversion(
            graph,
            {name: fit for name, fit in self.tables.items() if name in kept},
            {name: fit for name, fit in self.decays.items() if name in kept},
        )

    def _card(self, output: str) -> dict[str, Any]:
        c, classify = self.model.config, isinstance(self.model, MambaForSequenceClassification)
        source = self.graph.nodes[0]
        features = source.integer("features")
        frac = source.frac
        steps = self.c.seq_len
        return {
            "task": "classification" if classify else "language_model",
            "classes": [str(i) for i in range(c.num_labels)] if classify else [],
            "input": {
                "description": f"{steps} steps of {features} features" if features else f"{steps} token ids",
                "low": source.integer("low"),
                "high": source.integer("high"),
                "frac": frac,
            },
            "logits_frac": self.graph.frac[output],
            "float_config": c.to_dict(),
            "conversion": dataclasses.asdict(self.c),
        }

    # -- scales -------------------------------------------------------------------------------------------

    def _places(self, observed: Observed, limit: int, channels: FloatArray | None = None) -> int:
        """Binary places of an activation; of its channels times 2^channels, if given."""
        if channels is not None:
            sample = observed.sample * np.exp2(channels)
            largest = float((observed.channels * np.exp2(channels)).max())
            return activation_places(sample, largest, limit, self.c.scales, self.c.percentile)
        return activation_places(observed.sample, observed.largest, limit, self.c.scales, self.c.percentile)

    # -- pieces -------------------------------------------------------------------------------------------

    def _linear(
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
        limit = _limit(self.c.weight_bits)
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

    def _index(self, name: str, source: str, bits: int, low: float) -> str:
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

    def _activation(self, name: str, index: str, kind: str, frac: int, limit: int) -> str:
        b = self.graph
        tensor = b.types[index]
        curve, index_frac = ACTIVATIONS[kind], b.frac[index]
        if not self.c.pieces:
            fit = fit_table(curve, tensor.low, tensor.high, index_frac, frac, limit)
            self.tables[name] = fit
            return b.add(name, "table", index, frac=frac, constants={"values": fit.values}, low=fit.low)
        lines = fit_piecewise(curve, tensor.low, tensor.high, index_frac, frac, limit, self.c.pieces)
        self.tables[name] = lines.table
        total, wide = "", lines.slope_frac
        for i, (knot, slope) in enumerate(zip(lines.knots, lines.slopes, strict=True)):
            above = b.add(f"{name}_from{i}", "sub", index, frac=index_frac, constants={"value": knot})
            above = b.add(f"{name}_above{i}", "relu", above, frac=index_frac)
            line = b.add(f"{name}_line{i}", "mul", above, frac=wide, constants={"value": slope})
            total = b.add(f"{name}_lines{i}", "add", total, line, frac=wide) if total else line
        total = b.add(f"{name}_lines", "add", total, frac=wide, constants={"value": lines.offset})
        return b.requantize(name, total, frac, limit)

    def _norm(
        self, name: str, source: str, observed: str, eps: float, weight: FloatArray
    ) -> tuple[str, FloatArray]:
        """x over its root mean square times a scale, and that scale of every channel of the result.

        With S = 2^t (sum xs^2 + d eps), R = isqrt(S) and K = s sqrt(d) 2^(t/2 + kappa): x K / R is
        2^kappa s x / rms, for any t and kappa that keep R exact and K / R inside the budget, and for any s:
        the one that fills the result's bits, which the matrix that reads it undoes. Channels that are small
        have whole places more.
        """
        b, c = self.graph, self.c
        d = b.types[source].shape[-1]
        room = b.max_bits - 1
        square_limit = math.isqrt((1 << room) // (2 * d))
        seen = self.seen[f"{observed}.source"].largest
        # Residuals may double, and what a square loses to saturation falsifies the whole vector.
        square_frac = min(places_for(2 * seen, square_limit), b.frac[source])
        xs = b.requantize(f"{name}_xs", source, square_frac, square_limit)
        squares = b.add(f"{name}_squares", "mul", xs, xs, frac=2 * square_frac)
        offset = max(1, round(eps * d * 4.0**square_frac))
        ones = {"weight": np.ones((1, d), np.int64), "bias": [offset]}
        total = b.add(f"{name}_sum", "linear", squares, frac=2 * square_frac, constants=ones)

        mean = self.seen[f"{observed}.square"]
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

        gains = equalisation(np.broadcast_to(self.seen[observed].channels, d), weight, SPREAD)
        limit = c.activation_limit
        samples = self.seen[observed].sample * np.exp2(gains)
        whole = activation_scale(samples, limit, c.scales, c.percentile)
        places = math.floor(math.log2(whole))
        scale = whole * 2.0**-places
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
        return b.requantize(name, product, min(places, frac), limit), scale * np.exp2(gains)

    # -- the model ----------------------------------------------------------------------------------------

    def _embed(self) -> str:
        b, embeddings = self.graph, self.model.backbone.embeddings
        assert isinstance(embeddings, nn.Linear | nn.Embedding)
        limit = _limit(self.c.residual_bits)
        weight = _array(embeddings.weight)
        if self.input_format is None or isinstance(embeddings, nn.Embedding):
            vocabulary = self.model.config.vocab_size
            source = b.add("input", "input", frac=0, low=0, high=vocabulary - 1, features=0)
            rows = np.clip(rounded(weight, self.residual_frac), -limit, limit)
            return b.add("residual", "embedding", source, frac=self.residual_frac, constants={"table": rows})
        form = self.input_format
        source = b.add(
            "input", "input", frac=form.frac, low=form.low, high=form.high, features=weight.shape[1]
        )
        embedded = self._linear("embed", source, weight, _array(embeddings.bias))
        return b.requantize("residual", embedded, self.residual_frac, limit)

    def _block(self, layer: str, residual: str, mixer: MambaMixer | Mamba2Mixer, norm: RMSNorm) -> str:
        b, limit = self.graph, _limit(self.c.residual_bits)
        weight = _array(mixer.in_proj.weight) * _array(norm.weight)
        name = f"{layer}.norm"
        normed, scales = self._norm(name, residual, name, norm.eps, weight)
        bias = np.zeros(len(weight)) if mixer.in_proj.bias is None else _array(mixer.in_proj.bias)
        if isinstance(mixer, Mamba2Mixer):
            bias[-mixer.config.n_heads :] += _array(mixer.dt_bias)
        projected = self._linear(f"{layer}.in_proj", normed, weight, bias, scales)
        mix = self._mamba2 if isinstance(mixer, Mamba2Mixer) else self._mamba
        out = mix(layer, projected, mixer)  # type: ignore[arg-type]
        out = b.requantize(f"{layer}.out", out, self.residual_frac, limit)
        total = b.add(f"{layer}.residual_sum", "add", residual, out, frac=self.residual_frac)
        return b.saturate(f"{layer}.residual", total, -limit, limit)

    def _part(self, name: str, source: str, start: int, width: int) -> str:
        b = self.graph
        return b.add(name, "slice", source, frac=b.frac[source], start=start, stop=start + width)

    def _mamba2(self, layer: str, projected: str, mixer: Mamba2Mixer) -> str:
        """out_proj(norm(SSD(x, dt, B, C) act(z))), before the residual."""
        b, c, m = self.graph, self.c, mixer.config
        at = f"{layer}.{{}}".format
        E, N, H = m.d_inner, m.d_state, m.n_heads
        taps, bias = _conv_parameters(mixer)
        parts, start = {}, 0
        for name, width in (("x", E), ("B", N), ("C", N)):
            source = self._part(at(f"{name}_projected"), projected, E + start, width)
            rows = slice(start, start + width)
            parts[name] = self._convolve(layer, name, source, taps[rows], bias[rows])
            start += width
        x, B, C = (parts[name] for name in "xBC")
        dt = self._part(at("dt"), projected, E + start, H)
        log_dt = self._log_step(layer, dt, [at("decay_index")])
        rates = np.exp(_array(mixer.A_log))
        largest_G = self.seen[at("G")].largest
        scanned = self._scan(layer, layer, (x, B, C, log_dt), rates, m.headdim, largest_G)
        D = _array(mixer.D)
        y = self._skip(layer, scanned, x, D if m.D_has_hdim else np.repeat(D, m.headdim))
        gated = self._gate(layer, y, self._part(at("z_in"), projected, 0, E))
        seen = self.seen[at("gated_norm.source")]
        gated_frac = min(places_for(seen.largest, c.internal_limit), b.frac[gated])
        gated = b.requantize(at("gated"), gated, gated_frac, c.internal_limit)
        weight = _array(mixer.out_proj.weight) * _array(mixer.norm.weight)
        v, scales = self._norm(at("gated_norm"), gated, at("gated_norm"), m.norm_epsilon, weight)
        return self._linear(at("out_proj"), v, weight, _bias(mixer.out_proj), scales)

    def _mamba(self, layer: str, projected: str, mixer: MambaMixer) -> str:
        """out_proj(S6(x, dt, B, C) act(z)), before the residual: for every entry of the state a scan whose
        heads are the channels, for each of them decays by itself."""
        b, c, m = self.graph, self.c, mixer.config
        at = f"{layer}.{{}}".format
        E, N, limit = m.d_inner, m.d_state, c.activation_limit
        source = self._part(at("x_projected"), projected, 0, E)
        x = self._convolve(layer, "x", source, *_conv_parameters(mixer))
        low_rank = self._linear(at("x_proj"), x, _array(mixer.x_proj.weight), None)
        parts, start = {}, 0
        for name, width in (("dt", m.rank), ("B", N), ("C", N)):
            part = self._part(at(f"{name}_projected"), low_rank, start, width)
            frac = min(self._places(self.seen[at(name)], limit), b.frac[part])
            parts[name] = b.requantize(at(name), part, frac, limit)
            start += width
        weight, bias = _array(mixer.dt_proj.weight), _bias(mixer.dt_proj)
        dt = self._linear(at("dt_proj"), parts["dt"], weight, bias)
        states = [at(f"state{n}") for n in range(N)]
        log_dt = self._log_step(layer, dt, [f"{state}.decay_index" for state in states])
        rates, total = np.exp(_array(mixer.A_log)), ""
        for n, state in enumerate(states):
            # A state of the operation is made of pairs: this entry and one that stays zero.
            chosen = np.zeros((2, N), np.int64)
            chosen[0, n] = 1
            B, C = (
                b.add(f"{state}.{name}", "linear", part, frac=b.frac[part], constants={"weight": chosen})
                for name, part in (("B", parts["B"]), ("C", parts["C"]))
            )
            largest_G = float(self.seen[at("B")].channels[n] * self.seen[at("C")].channels[n])
            y = self._scan(layer, state, (x, B, C, log_dt), rates[:, n], 1, largest_G)
            if total:
                y = b.shift(f"{state}.aligned", y, b.frac[total])
            total = b.add(f"{state}.sum", "add", total, y, frac=b.frac[y]) if total else y
        y = self._skip(layer, total, x, _array(mixer.D))
        gated = self._gate(layer, y, self._part(at("z_in"), projected, E, E))
        # Nothing normalizes this: the large channels would leave the others few bits.
        weight, seen = _array(mixer.out_proj.weight), self.seen[at("gated")]
        gains = equalisation(seen.channels, weight, SPREAD)
        if gains.any():
            lifts = {"value": 1 << gains}
            gated = b.add(at("gated_channels"), "mul", gated, frac=b.frac[gated], constants=lifts)
        frac = min(self._places(seen, limit, gains.astype(np.float64)), b.frac[gated])
        v = b.requantize(at("gated"), gated, frac, limit)
        return self._linear(at("out_proj"), v, weight, _bias(mixer.out_proj), np.exp2(gains))

    def _gate(self, layer: str, y: str, z_in: str) -> str:
        """y act(z)."""
        b, c = self.graph, self.c
        at = f"{layer}.{{}}".format
        y_frac = min(self._places(self.seen[at("y")], c.internal_limit), b.frac[y])
        y = b.requantize(at("y"), y, y_frac, c.internal_limit)
        z = self._index(at("z"), z_in, c.index_bits, LOWEST)
        gate_frac = self._places(self.seen[at("gate")], c.activation_limit)
        kind = self.model.config.gate_activation
        gate = self._activation(at("gate"), z, kind, gate_frac, c.activation_limit)
        return b.add(at("gated_product"), "mul", y, gate, frac=y_frac + gate_frac)

    def _convolve(self, layer: str, name: str, source: str, taps: FloatArray, bias: FloatArray) -> str:
        """The convolution and its activation: x, B or C."""
        b, c = self.graph, self.c
        at = f"{layer}.{name}"
        limit = c.internal_limit
        frac = min(self._places(self.seen[f"{at}_in"], limit), b.frac[source])
        x = b.requantize(f"{at}_in", source, frac, limit)
        # Taps as fine as the budget of a sum of so many products allows.
        largest = min(limit, ((1 << (b.max_bits - 2)) // limit) // taps.shape[1])
        tap_frac = places_for(float(np.abs(taps).max()), largest)
        constants = {"taps": rounded(taps, tap_frac), "bias": rounded(bias, frac + tap_frac)}
        linear = b.add(f"{at}_conv", "conv", x, frac=frac + tap_frac, constants=constants)
        index = self._index(f"{at}_index", linear, c.index_bits, LOWEST)
        out = self._places(self.seen[at], c.activation_limit)
        return self._activation(at, index, self.model.config.activation, out, c.activation_limit)

    def _log_step(self, layer: str, dt: str, decay_indices: list[str]) -> str:
        """log softplus(dt), so fine that the index of a decay has its bits."""
        b, c, m = self.graph, self.c, self.model.config
        name = f"{layer}.log_dt"
        span = max(self.seen[index].high - self.seen[index].low for index in decay_indices)
        frac = math.floor(math.log2(((1 << c.decay_index_bits) - 2) / max(span + 0.5, 1.0)))
        t = self._index(f"{layer}.step_index", dt, c.decay_index_bits, -math.inf)
        tensor, limited = b.types[t], m.mixer == "mamba2"
        curve = log_step(m.dt_limit_low, m.dt_limit_high) if limited else log_step()
        fit = fit_table(curve, tensor.low, tensor.high, b.frac[t], frac, 1 << 14)
        self.tables[name] = fit
        return b.add(name, "table", t, frac=frac, constants={"values": fit.values}, low=fit.low)

    def _scan(
        self,
        layer: str,
        name: str,
        inputs: tuple[str, str, str, str],
        rates: FloatArray,
        headdim: int,
        largest_G: float,
    ) -> str:
        """C h of every step.

        Args:
            layer: whose y says how fine this must be. name: of the scan.
            inputs: x, B, C and log softplus(dt). rates: -A of every head.
            largest_G: magnitude of C . B that was seen.
        """
        b, c = self.graph, self.c
        at = f"{name}.{{}}".format
        x, B, C, log_dt = inputs
        # log(dt |A|) = log softplus(t) + log |A|
        seen, frac = self.seen[at("decay_index")], b.frac[log_dt]
        offset = np.broadcast_to(rounded(np.log(rates), frac), b.types[log_dt].shape[-1:])
        v = b.add(at("log_decay_wide"), "add", log_dt, frac=frac, constants={"value": offset})
        first, last = math.floor((seen.low - 0.2) * 2.0**frac), math.ceil((seen.high + 0.2) * 2.0**frac)
        v = b.saturate(at("log_decay"), v, first, last)
        tensor = b.types[v]
        decays = fit_decay(tensor.low, tensor.high, frac, c.decay_bits, c.gain_bits)
        self.decays[at("decay")] = decays
        n = b.add(
            at("decay"), "table", v, frac=c.decay_bits, constants={"values": decays.decay}, low=decays.low
        )
        gain = b.add(
            at("gain"), "table", v, frac=decays.gain_frac, constants={"values": decays.gain}, low=decays.low
        )

        # x' = x g / |A|, every head times the power of two that brings it near the largest.
        seen = self.seen[at("scan_x")]
        heads = np.maximum(seen.channels.reshape(len(rates), -1).max(1), 2.0**-40)
        lifts = np.minimum(np.floor(np.log2(heads.max() / heads)), SPREAD)
        factors = np.exp2(lifts) / rates
        width = b.max_bits - 1 - b.types[x].magnitude.bit_length() - b.types[gain].magnitude.bit_length()
        factor_frac = places_for(float(factors.max()), (1 << min(width, 12)) - 1)
        whole, fine = rounded(factors, factor_frac), decays.gain_frac + factor_frac
        if headdim == 1:
            factor = b.add(at("factor"), "mul", gain, frac=fine, constants={"value": whole})
        else:
            columns = np.kron(np.diag(whole), np.ones((headdim, 1), np.int64))
            factor = b.add(at("factor"), "linear", gain, frac=fine, constants={"weight": columns})
        product = b.add(at("scan_x_product"), "mul", x, factor, frac=b.frac[x] + fine)
        limit = _limit(c.scan_bits)
        lifted = np.repeat(lifts, headdim)
        scan_frac = min(self._places(seen, limit, lifted), b.frac[product])
        scan_x = b.requantize(at("scan_x"), product, scan_frac, limit)

        carried = not isinstance(self.model, MambaForSequenceClassification) or c.seq_len > c.chunk_size
        G = math.ceil(2 * largest_G * 2.0 ** (b.frac[B] + b.frac[C])) + 1
        shape = ScanShape(
            x=b.types[scan_x],
            B=b.types[B],
            C=b.types[C],
            n=b.types[n],
            x_frac=b.frac[scan_x],
            B_frac=b.frac[B],
            C_frac=b.frac[C],
            headdim=headdim,
            chunk_size=c.chunk_size,
            decay_bits=c.decay_bits,
            A_bits=c.A_bits,
            largest_G=G,
            seq_len=c.seq_len,
            carried=carried,
            max_bits=b.max_bits,
        )
        fit_ = fit_scan(shape)
        operands = [scan_x, B, C, n, B] if carried else [scan_x, B, C, n]
        y = b.add(
            at("ssd"), "ssd", *operands, frac=fit_.frac, constants=dict(fit_.constants), **fit_.attributes
        )
        # Every head keeps its lift until here; bring all to the largest.
        largest = int(lifts.max())
        limit = (1 << (c.internal_bits + largest)) - 1
        frac = min(self._places(self.seen[f"{layer}.y"], c.internal_limit) + 1, fit_.frac)
        y = b.requantize(at("scanned"), y, frac, limit)
        if largest:
            aligned = {"value": 1 << (largest - lifted.astype(np.int64))}
            y = b.add(at("scanned_heads"), "mul", y, frac=frac + largest, constants=aligned)
        return y

    def _skip(self, layer: str, scanned: str, x: str, D: FloatArray) -> str:
        """C h + D x."""
        b = self.graph
        frac = places_for(float(np.abs(D).max()), 1 << 10)
        product = b.add(
            f"{layer}.Dx_product", "mul", x, frac=b.frac[x] + frac, constants={"value": rounded(D, frac)}
        )
        product = b.shift(f"{layer}.Dx", product, b.frac[scanned])
        return b.add(f"{layer}.y_sum", "add", scanned, product, frac=b.frac[scanned])

    def _head(self, residual: str) -> str:
        b, model, c = self.graph, self.model, self.c
        gamma = _array(model.backbone.norm_f.weight)
        classify = isinstance(model, MambaForSequenceClassification)
        last = classify and model.config.pooling == "last"
        source = residual
        if last:
            source = b.add("last", "reduce", residual, frac=b.frac[residual], kind="last")
        head = model.classifier if isinstance(model, MambaForSequenceClassification) else model.lm_head
        weight = _array(head.weight)
        if not classify:
            weight = weight[: model.config.vocab_size]
        weight = weight * gamma
        eps = model.backbone.norm_f.eps
        pooled, scales = self._norm("final_norm", source, "final_norm", eps, weight)
        if classify and not last:
            pooled = b.add("pool_sum", "reduce", pooled, frac=b.frac[pooled], kind="sum")
            # The mean's division is in the weights; eight bits more than a step has are enough.
            places = max(0, (c.seq_len - 1).bit_length() - 8)
            pooled = b.shift("pool", pooled, b.frac[pooled] - places)
            weight = weight / c.seq_len
        bias = None if head.bias is None else _array(head.bias)
        return self._linear("logits", pooled, weight, bias, scales)

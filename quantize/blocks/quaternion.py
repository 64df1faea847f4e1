"""The blocks of Quaternion Mamba-2 (``mamba_int.float_models.quaternion``) as integers.

The recurrence is the operation ``scan``; q is an exact quotient (``quantize.cayley``), the same for fixed and
selective axes.

**A fixed axis is complex.** Where the axis u of a state does not depend on the input, a unit quaternion g
with g i g* = u makes q = g (re + im i) g*. The state g* h then fades and turns by the complex number
re + im i: in the basis 1, i | j, k it is two complex states, with half the products of a quaternion one. g*
goes into the rows of B, g into those of C (C h = (C g) (g* h)), before they are rounded; nothing is left of
it in the integers, which differ from those of the quaternion form by rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_int.float_models.quaternion import QuaternionFullBlock, QuaternionMamba2Block
from quantize.blocks.entrance import Layer, enter, record_entrance
from quantize.cayley import CayleyFit, cayley, fit_cayley
from quantize.fits import SIGMOID, SOFTPLUS
from quantize.graph_builder import exceeded
from quantize.observations import Record
from quantize.parameters import array, bias_of, conv_parameters
from quantize.pieces import Pieces
from quantize.quaternion_layer_norm import folded, quaternion_layer_norm, record_quaternion_layer_norm
from quantize.scales import FloatArray, largest_integer, places_for, rounded
from quantize.state_space import D_BITS, convolve
from triton_kernels.activation import activate
from triton_kernels.causal_conv1d import causal_conv1d
from triton_kernels.quaternion import cayley_reference, quaternion_left_matrix, quaternion_product_reference

QuaternionMixer = QuaternionMamba2Block | QuaternionFullBlock
SIGMOID_LOW = -16.0
"""The sigmoid of less is as good as that of this."""
STATE_ROOM = 1.25
"""Times the largest state that was seen still fit."""
LEAST_Q_BITS = 6
SMALLEST_STEP = 2.0**-6
"""Of the largest: errors of step sizes less than this share count as if they had it."""
LEAST_C = 7
"""Most magnitude of C is at least this: four bits, its sign included."""


@dataclass(frozen=True)
class Modes:
    """What makes q, B and C of a mixer, for states (group, state) in the basis of their form.

    Attributes:
        groups, channels, states: G, P and N.
        A_rate: A = dt A_rate [G N]. b_rates: b = dt b_rate, one [G N] for every imaginary component of q.
        b: matrices [G N, d_inner] of what the input adds to b, of as many components; empty with fixed axes.
        B, C: matrices [components G N, d_inner], components in planes.
        euler: whether dt multiplies B.
    """

    groups: int
    channels: int
    states: int
    A_rate: FloatArray
    b_rates: tuple[FloatArray, ...]
    b: tuple[FloatArray, ...]
    B: FloatArray
    C: FloatArray
    euler: bool

    @property
    def count(self) -> int:
        """G N."""
        return self.groups * self.states

    @property
    def turning(self) -> int:
        """Components of q."""
        return 1 + len(self.b_rates)

    @property
    def components(self) -> int:
        """Components of B and of a state."""
        return len(self.B) // self.count

    @classmethod
    def of(cls, mixer: QuaternionMixer, turning: int) -> Modes:
        """Of a mixer whose q shall have so many components: 1 where states are real, else 2 or 4."""
        c = mixer.config
        full = isinstance(mixer, QuaternionFullBlock)
        groups = c.d_inner if full else c.n_groups
        E, N = c.d_inner, c.d_state
        if full:
            B, C = (
                array(proj.weight).reshape(groups, N, 4, E).transpose(2, 0, 1, 3)
                for proj in (mixer.B_proj, mixer.C_proj)
            )
            B = B[:1] if mixer.real else B
        else:
            B, C = (
                array(proj.weight).reshape(groups, -1, N, E).transpose(1, 0, 2, 3)
                for proj in (mixer.B_proj, mixer.C_proj)
            )
        half: FloatArray = array(F.softplus(mixer.Lambda_alpha.double())).ravel() / 2
        rates: tuple[FloatArray, ...] = ()
        added: tuple[FloatArray, ...] = ()
        if not mixer.real:
            imaginary = mixer.Lambda_imag.double()
            axes = array(torch.tanh(imaginary) if full else imaginary).reshape(groups, N, 3)
            if turning == 2:
                g = _turned_onto(axes)
                B, C = _product(_conjugate(g)[..., None], B), _product(C, g[..., None])
                rates = (np.linalg.norm(axes, axis=-1).ravel() / 2,)
            else:
                rates = tuple(axes[..., i].ravel() / 2 for i in range(3))
        if c.selective_axis:
            assert isinstance(mixer.axis_proj, nn.Linear)
            weight = array(mixer.axis_proj.weight).reshape(groups, 3, N, E)
            added = tuple(weight[:, i].reshape(-1, E) / 2 for i in range(3))
        return cls(
            groups, E // groups, N, half, rates, added, B.reshape(-1, E), C.reshape(-1, E), euler=not full
        )


def _conjugate(q: FloatArray) -> FloatArray:
    conjugate: FloatArray = q * np.array([1, -1, -1, -1]).reshape(4, *[1] * (q.ndim - 1))
    return conjugate


def _product(p: FloatArray, q: FloatArray) -> FloatArray:
    """Products of quaternions whose components are on the first axis."""
    factors = (torch.from_numpy(v.copy()).movedim(0, -1) for v in np.broadcast_arrays(p, q))
    product: FloatArray = quaternion_product_reference(*factors).movedim(-1, 0).numpy()
    return product


def _turned_onto(axes: FloatArray) -> FloatArray:
    """Unit quaternions g [4, ...] with g i g* = u, for axes [..., 3] of direction u: the shortest turns."""
    length = np.linalg.norm(axes, axis=-1, keepdims=True)
    u = np.where(length > 0, axes / np.maximum(length, 1e-300), np.array([1.0, 0.0, 0.0]))
    # (1 + i . u, i x u); where u is -i, a half turn about j.
    g = np.stack([1 + u[..., 0], np.zeros_like(u[..., 0]), -u[..., 2], u[..., 1]])
    opposite = np.linalg.norm(g, axis=0) < 1e-6
    g[:, opposite] = np.array([0.0, 0.0, 1.0, 0.0])[:, None]
    unit: FloatArray = g / np.linalg.norm(g, axis=0)
    return unit


class QuaternionConversion:
    """norm; in_proj; convolution; gated values; scan of quaternions; skip; norm; out_proj; gate.

    Args:
        fixed_axis: components of q where axes are fixed: 2 for complex states, 4 for quaternions as they are,
            which takes more operations in a runtime and more cells in a circuit, whatever the shape.
    """

    matrix_inputs: tuple[str, ...] = ("norm", "x", "y_norm")

    def __init__(self, fixed_axis: int = 2) -> None:
        self.fixed_axis = fixed_axis

    def modes(self, mixer: QuaternionMixer) -> Modes:
        """Of a mixer, in the cheaper form."""
        turning = 1 if mixer.real else 4 if mixer.config.selective_axis else self.fixed_axis
        return Modes.of(mixer, turning)

    def trace(self, record: Record, name: str, layer: Layer, residual: Tensor) -> Tensor:
        """See ``BlockConversion``."""

        def at(part: str, value: Tensor) -> Tensor:
            record(f"{name}.{part}", value)
            return value

        mixer = layer.mixer
        assert isinstance(mixer, QuaternionMixer)
        c, modes = mixer.config, self.modes(mixer)
        projected = mixer.in_proj(record_entrance(record, name, layer, residual))
        u, z = projected[..., : c.d_inner], projected[..., c.d_inner : c.d_inner + c.d_model]
        taps = mixer.conv1d.weight[:, 0]
        index = at("x_index", causal_conv1d(at("x_in", u), taps, mixer.conv1d.bias, "identity"))
        x = at("x", activate(index, c.activation))
        S = at("S", x * at("S_gate", torch.sigmoid(at("S_index", mixer.gate_proj(x)))))

        def linear(weight: FloatArray) -> Tensor:
            return x @ torch.from_numpy(weight.T.copy()).to(x)

        dt = at("dt", F.softplus(at("step_index", mixer.dt_proj(x))))
        dt = dt.repeat_interleave(modes.count // dt.shape[-1], -1)
        parts = [at("A", dt * dt.new_tensor(modes.A_rate))]
        for i, rate in enumerate(modes.b_rates):
            b = dt * dt.new_tensor(rate)
            parts.append(at(f"b{i}", b + linear(modes.b[i]) if modes.b else b))
        half = torch.stack([-parts[0], *parts[1:]], -1)
        q = cayley_reference(2 * F.pad(half, (0, 4 - modes.turning)))
        at("q", q[..., : modes.turning].transpose(-1, -2).flatten(-2))
        B, C = at("B_projected", linear(modes.B)), at("C", linear(modes.C))
        B = at("B", B * dt.repeat(1, 1, modes.components) if modes.euler else B)
        y, reach = _scanned(modes, S, q, B, C)
        at("reach", reach)
        skipped = F.pad(mixer.D * S, (0, 3 * c.d_inner))
        normed = record_quaternion_layer_norm(record, f"{name}.y_norm", at("y", y + skipped), mixer.norm)
        weight, bias = folded(mixer.norm, array(mixer.out_proj.weight))
        bias = bias if mixer.out_proj.bias is None else bias + array(mixer.out_proj.bias)
        out = F.linear(normed, *(torch.from_numpy(value).to(x) for value in (weight, bias)))
        return at("out_projected", out) * at("gate", torch.sigmoid(at("z", z)))

    def projections(self, layer: Layer) -> list[tuple[nn.Linear, nn.Parameter | None]]:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, QuaternionMixer)
        return [(mixer.in_proj, layer.norm_weight)]

    def build(self, p: Pieces, name: str, layer: Layer, residual: str) -> str:
        """See ``BlockConversion``."""
        mixer = layer.mixer
        assert isinstance(mixer, QuaternionMixer)
        b, c, m = p.graph, p.config, mixer.config
        at = f"{name}.{{}}".format
        E, limit = m.d_inner, c.activation_limit
        # Of the gate, the full form has channels that nothing reads.
        rows = E + m.d_model
        bias = bias_of(mixer.in_proj)
        normed, weight, scales = enter(
            p, name, layer, residual, array(mixer.in_proj.weight)[:rows], c.weights
        )
        bias = None if bias is None else bias[:rows]
        projected = p.linear(at("in_proj"), normed, weight, bias, scales, at("norm"), c.weights)
        source = p.part(at("x_projected"), projected, 0, E)
        x = convolve(p, at("x"), source, *conv_parameters(mixer.conv1d), m.activation)
        y = self._scan(p, name, mixer, x, self._values(p, name, mixer, x))
        weight, bias = folded(mixer.norm, array(mixer.out_proj.weight))
        own = bias_of(mixer.out_proj)
        bias = bias if own is None else bias + own
        # Never ternary: it holds what its norm has learned.
        normed, scales = quaternion_layer_norm(p, at("y_norm"), y, mixer.norm, weight)
        out = p.linear(at("out_proj"), normed, weight, bias, scales, at("y_norm"))
        out_frac = min(p.places(p.seen[at("out_projected")], c.internal_limit), b.frac[out])
        out = b.requantize(at("out_projected"), out, out_frac, c.internal_limit)
        z_in = p.part(at("z_in"), projected, E, m.d_model)
        index = p.index(at("z"), z_in, c.index_bits, SIGMOID_LOW)
        gate_frac = p.places(p.seen[at("gate")], limit)
        opened = p.curve(at("gate"), index, SIGMOID, gate_frac, limit)
        return b.add(at("gated"), "mul", out, opened, frac=out_frac + gate_frac)

    def _values(self, p: Pieces, name: str, mixer: QuaternionMixer, x: str) -> str:
        """S = sigmoid(gate_proj x) x."""
        b, c = p.graph, p.config
        at = f"{name}.{{}}".format
        wide = p.linear(at("gate_proj"), x, array(mixer.gate_proj.weight), None, reads=at("x"))
        index = p.index(at("S_index"), wide, c.index_bits, SIGMOID_LOW)
        frac = p.places(p.seen[at("S_gate")], c.activation_limit)
        opened = p.curve(at("S_gate"), index, SIGMOID, frac, c.activation_limit)
        product = b.add(at("S_product"), "mul", x, opened, frac=b.frac[x] + frac)
        limit = largest_integer(c.scan_bits)
        return b.requantize(at("S"), product, min(p.places(p.seen[at("S")], limit), b.frac[product]), limit)

    def _scan(self, p: Pieces, name: str, mixer: QuaternionMixer, x: str, S: str) -> str:
        """y = sum C h + D S of h' = q h + B S."""
        b, c, modes = p.graph, p.config, self.modes(mixer)
        at = f"{name}.{{}}".format
        room = b.max_bits - 1
        dt_bits = room // 2 + 1
        dt = self._step_sizes(p, name, mixer, modes, x, (1 << dt_bits) - 1)

        # States and C share what D S leaves of their products; a quarter of the budget is for that.
        C_wide = p.linear(at("C_proj"), x, modes.C, None, reads=at("x"))
        D, seen = array(mixer.D), p.seen[at("C")]
        skipped = float(np.abs(D).max()) * b.types[S].magnitude * 2.0 ** -b.frac[S]
        H_limit = c.internal_limit
        H_frac = places_for(STATE_ROOM * p.seen[at("reach")].largest, H_limit)
        finest = places_for(skipped, 1 << (room - 2)) - 1
        lost = min(H_limit.bit_length() - 1, max(0, p.places(seen, c.activation_limit) + H_frac - finest))
        H_limit, H_frac = H_limit >> lost // 2, H_frac - lost // 2

        # State and q share the budget of theirs.
        most = room - H_limit.bit_length() - (modes.turning - 1).bit_length()
        B_wide, B_frac = self._inputs(p, name, modes, dt, x)
        S_magnitude, S_frac = b.types[S].magnitude, b.frac[S]
        for q_bits in range(most, LEAST_Q_BITS - 1, -1):
            frac = min(B_frac, q_bits + H_frac - S_frac)
            align = q_bits + H_frac - S_frac - frac
            B_limit = min(c.internal_limit, max(1, round(p.seen[at("B")].largest * 2.0**frac)))
            reach = (modes.turning * H_limit << q_bits) + (B_limit * S_magnitude << align)
            if reach + (1 << q_bits >> 1) <= 1 << b.max_bits:
                break
        else:
            raise exceeded(at("scan"), "scan", reach, b.max_bits)
        B = b.requantize(at("B"), B_wide, frac, B_limit)
        largest = [p.seen[at(f"b{i}")].largest for i in range(modes.turning - 1)]
        A_largest = p.seen[at("A")].high
        fit = fit_cayley(at("q"), A_largest, max(largest, default=0.0), modes.turning, q_bits, b.max_bits)
        if fit.q_bits < q_bits:
            align -= q_bits - fit.q_bits
            if align < 0:
                B, align = b.shift(at("B_coarse"), B, frac + align), 0
        q = self._q(p, name, modes, dt, x, fit, room - dt_bits)

        terms = modes.components * modes.states * H_limit
        C_limit = min(c.internal_limit, ((1 << room) - (1 << (room - 2))) // terms)
        if C_limit < LEAST_C:
            raise exceeded(at("scan"), "scan", 2 * terms * LEAST_C, b.max_bits)
        C_frac = min(p.places(seen, C_limit), b.frac[C_wide], finest - H_frac)
        C = b.requantize(at("C"), C_wide, C_frac, C_limit)
        D_frac = min(places_for(float(np.abs(D).max()), 1 << D_BITS), H_frac + C_frac - S_frac)
        y = b.add(
            at("scan"),
            "scan",
            S,
            q,
            B,
            C,
            frac=H_frac + C_frac,
            constants={"D": rounded(D, D_frac)},
            groups=modes.groups,
            q_bits=fit.q_bits,
            inflow_align=align,
            H_limit=H_limit,
            D_align=H_frac + C_frac - S_frac - D_frac,
        )
        p.stands_for(y, at("y"))
        return y

    def _step_sizes(
        self, p: Pieces, name: str, mixer: QuaternionMixer, modes: Modes, x: str, limit: int
    ) -> str:
        """dt of every mode."""
        b, at = p.graph, f"{name}.{{}}".format
        wide = p.linear(at("dt_proj"), x, array(mixer.dt_proj.weight), bias_of(mixer.dt_proj), reads=at("x"))
        index = p.index(at("step_index"), wide, p.config.decay_index_bits, -np.inf)
        largest = p.seen[at("dt")].largest
        dt = p.curve(
            at("dt"), index, SOFTPLUS, places_for(largest, limit), limit, floor=SMALLEST_STEP * largest
        )
        width = b.types[dt].shape[-1]
        if width == modes.count:
            return dt
        spread = {
            "weight": np.kron(np.eye(width, dtype=np.int64), np.ones((modes.count // width, 1), np.int64))
        }
        return b.add(at("dt_modes"), "linear", dt, frac=b.frac[dt], constants=spread)

    def _inputs(self, p: Pieces, name: str, modes: Modes, dt: str, x: str) -> tuple[str, int]:
        """B, not yet rounded, and its places when it is."""
        b, c, at = p.graph, p.config, f"{name}.{{}}".format
        wide = p.linear(at("B_proj"), x, modes.B, None, reads=at("x"))
        if modes.euler:
            seen = p.seen[at("B_projected")]
            limit = min(c.internal_limit, (1 << (b.max_bits - 1)) // b.types[dt].magnitude)
            wide = b.requantize(at("B_projected"), wide, min(p.places(seen, limit), b.frac[wide]), limit)
            steps = p.concat(at("dt_components"), [dt] * modes.components)
            wide = b.add(at("B_product"), "mul", wide, steps, frac=b.frac[wide] + b.frac[dt])
        return wide, min(p.places(p.seen[at("B")], c.internal_limit), b.frac[wide])

    def _q(self, p: Pieces, name: str, modes: Modes, dt: str, x: str, fit: CayleyFit, rate_bits: int) -> str:
        """q of every mode, components in planes."""
        b, at = p.graph, f"{name}.{{}}".format

        def times(part: str, rates: FloatArray) -> str:
            """dt times rates, at the places of u."""
            places = places_for(float(np.abs(rates).max()), (1 << rate_bits) - 1)
            held = {"value": rounded(rates, places)}
            product = b.add(at(f"{part}_product"), "mul", dt, frac=b.frac[dt] + places, constants=held)
            return b.shift(at(f"{part}_rounded"), product, fit.u_frac)

        A = b.saturate(at("A"), times("A", modes.A_rate), 0, fit.A_limit)
        parts = []
        for i, rate in enumerate(modes.b_rates):
            part = at(f"b{i}")
            turn = times(f"b{i}", rate)
            if modes.b:
                axis = p.linear(f"{part}_proj", x, modes.b[i], None, reads=at("x"))
                axis = b.shift(f"{part}_axis", axis, fit.u_frac)
                turn = b.add(f"{part}_sum", "add", turn, axis, frac=fit.u_frac)
            parts.append(b.saturate(part, turn, -fit.b_limit, fit.b_limit))
        return cayley(p, at("q"), A, parts, fit)


def _scanned(modes: Modes, S: Tensor, q: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """C h of every step [batch, T, 4 d_inner], and the largest component of every state [batch, G N].

    Args:
        S: [batch, T, d_inner]. q: [batch, T, G N, 4]. B, C: [batch, T, components G N].
    """
    batch, length = S.shape[:2]
    x = S.reshape(batch, length, modes.groups, modes.channels)

    def quaternions(v: Tensor) -> Tensor:
        """[batch, T, components G N] as [batch, T, G, 1, N, 4]."""
        planes = v.reshape(batch, length, -1, modes.groups, 1, modes.states).movedim(2, -1)
        return F.pad(planes, (0, 4 - planes.shape[-1]))

    turns, B, C = q.reshape(batch, length, modes.groups, 1, modes.states, 4), quaternions(B), quaternions(C)
    h = S.new_zeros(batch, modes.groups, modes.channels, modes.states, 4)
    reach, outputs = S.new_zeros(batch, modes.count), []
    for t in range(length):
        h = quaternion_product_reference(turns[:, t], h) + B[:, t] * x[:, t, :, :, None, None]
        reach = torch.maximum(reach, h.abs().amax((2, 4)).flatten(1))
        # Sums over states as products of matrices.
        read = quaternion_left_matrix(C[:, t])
        outputs.append(torch.einsum("bgsnij,bgpnj->bigp", read, h))
    return torch.stack(outputs, 1).flatten(2), reach

"""``scan``: real, complex or quaternion states, step by step.

Every component of a state is the clamp of a shift of one dot, with q, its negative and B as the small side.
Or products are claimed over the channels of each state; then what is made is H + H_limit, whose clamp begins
at zero, and what reads it takes the sum of H_limit over the channels off, once for each state. Nothing is
read before the first step of a sequence; that of a segment reads the state that enters.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from circuits.cells import Cells, Get, Ids, Values
from circuits.gadgets.values import Accumulation, Claimed, Grid, Summed, Value
from circuits.segment import Carried
from mamba_int.graph import Node, TensorType
from mamba_int.operations.base import shifted
from mamba_int.operations.scan import Scan, ScanShape, product_terms


def scan(inputs: list[Value], node: Node, tensor: TensorType, carried: Carried | None = None) -> Value:
    """The gadget of ``scan``: y before its shift, [T, 4 G P]."""
    b, states = inputs[0].builder, _States(inputs, node, carried)
    if b.challenged:
        return _ReadStates(states, node, tensor)
    return Summed(b, node.name, tensor, lambda: states.read(tensor))


def _scaled(b: Cells, ids: Ids, factor: int) -> Ids:
    """Cells of factor * ids: every distinct cell is multiplied once, whatever the view repeats."""
    if factor == 1:
        return ids
    distinct, where = np.unique(ids, return_inverse=True)
    multiples: Ids = b.mul(distinct, b.constant([factor]))[where].reshape(ids.shape)
    return multiples


class _States:
    """The operands of a scan, and its states, made when they are read first.

    Attributes:
        b: the constraint graph. node: of the integer graph. shape: its widths.
        offset: by how much the cells of a state exceed it.
    """

    def __init__(self, inputs: list[Value], node: Node, carried: Carried | None) -> None:
        self.b, self.node = inputs[0].builder, node
        types = [value.type for value in inputs]
        self.shape = ScanShape(node, types)
        self.offset = node.integer("H_limit") if self.b.challenged else 0
        self._inputs, self._types = inputs, types
        self._planes: tuple[Ids, Ids, Ids, Ids] | None = None
        self._states: list[Ids] = []
        self._over_channels: dict[int, Ids] = {}
        self._entered: Ids | None = None
        if carried is not None:
            limit = node.integer("H_limit")
            ends = self.offset - limit, self.offset + limit
            self._entered = carried.enter(f"{node.name}:H", self.shape.state, *ends, self.offset)
            carried.leave(f"{node.name}:H", lambda: self.states()[-1])

    def before(self, t: int) -> Ids | None:
        """Cells of H_{t-1}, plus the offset; None before the first step of a sequence."""
        return self._states[t - 1] if t else self._entered

    def planes(self) -> tuple[Ids, Ids, Ids, Ids]:
        """Cells of x [T, G, P], q, B and C [T, components, G, N]."""
        if self._planes is None:
            self._planes = Scan.planes(self.shape, [value.cells() for value in self._inputs])
        return self._planes

    @property
    def reach(self) -> tuple[int, int]:
        """Bounds of what enters a component in a step, and of that and what is turned, before their shift."""
        x, q, B, _ = (tensor.magnitude for tensor in self._types)
        inflow = B * x << self.node.integer("inflow_align")
        return inflow, inflow + self.shape.turning * q * self.node.integer("H_limit")

    def states(self) -> list[Ids]:
        """H of every step [components, G, P, N], plus the offset."""
        if not self._states:
            with self.b.part(f"{self.node.name}.H"):
                for t in range(self._types[0].shape[0]):
                    self._states.append(self._next(t))
        return self._states

    def _next(self, t: int) -> Ids:
        reach, shape = self.reach[0 if self.before(t) is None else 1], self.shape.state
        name, places = f"{self.node.name}.H{t}", self.node.integer("q_bits")
        limit, offset = self.node.integer("H_limit"), self.offset << places
        tensor = TensorType(shape, offset - reach, offset + reach)
        total: Value
        if self.b.challenged:
            total = _TurnedStates(self, t, f"{name}.turned", tensor)
        else:
            total = Summed(self.b, f"{name}.turned", tensor, partial(self._turned, t, reach))
        if places:
            ends = shifted(tensor.low, places), shifted(tensor.high, places)
            total = total.shifted(name, TensorType(shape, *ends), places)
        return total.clamp(self.offset - limit, self.offset + limit)

    def _turned(self, t: int, reach: int) -> Accumulation:
        """q H + (B x) << a before the shift."""
        b, s = self.b, self.shape
        x, q, B, _ = (values[t] for values in self.planes())
        lefts = [np.broadcast_to(x[None, :, :, None], s.state)]
        before = self.before(t)
        turns = [] if before is None else self.turn_terms()
        lefts += [np.stack([before[j] for _, j, _ in terms]) for terms in turns if before is not None]

        def right(m: int) -> Ids:
            rows = [_scaled(b, B, m << self.node.integer("inflow_align"))]
            signed = {sign: _scaled(b, q, sign * m) for sign in self._signs(turns)}
            rows += [np.stack([signed[sign][i] for i, _, sign in terms]) for terms in turns]
            return np.stack(rows)

        return Accumulation(np.stack(lefts), right, (0, 1, 3), -reach, reach)

    def turn_terms(self) -> list[list[tuple[int, int, int]]]:
        """Term after term of q H: (i, j, sign) for every component of the state."""
        s = self.shape
        components = [product_terms(m, s.turning, s.components) for m in range(s.components)]
        return [list(terms) for terms in zip(*components, strict=True)]

    def read_terms(self) -> list[list[tuple[int, int, int]]]:
        """Term after term of C H: (i, j, sign) for every component of y."""
        components = [product_terms(m, 4, self.shape.components) for m in range(4)]
        return [list(terms) for terms in zip(*components, strict=True)]

    @staticmethod
    def _signs(terms: list[list[tuple[int, int, int]]]) -> set[int]:
        return {sign for row in terms for _, _, sign in row}

    def read(self, tensor: TensorType) -> Accumulation:
        """sum_n C H + (D x) << b."""
        b, s = self.b, self.shape
        states, (x, _, _, C) = np.stack(self.states()), self.planes()
        length, width = tensor.shape
        reads = self.read_terms()
        # [terms N, T, 4, G, P]
        shape = (len(reads) * s.states, length, 4, s.groups, s.channels)
        left = np.stack([np.stack([states[:, j] for _, j, _ in terms], 1) for terms in reads])
        left = np.moveaxis(left, -1, 1).reshape(shape)
        D = self.D(1)
        if D.any():
            again = np.broadcast_to(x[:, None], (length, 4, s.groups, s.channels))
            left = np.concatenate([left, again[None]])

        def right(m: int) -> Ids:
            signed = {sign: _scaled(b, C, sign * m) for sign in self._signs(reads)}
            rows = np.stack([np.stack([signed[sign][:, i] for i, _, sign in terms], 1) for terms in reads])
            rows = np.moveaxis(rows, -1, 1).reshape(*shape[:-1], 1)
            rows = np.broadcast_to(rows, shape)
            if D.any():
                skip = np.zeros((4, *D.shape), dtype=object)
                skip[0] = self.D(m)
                skipped = np.broadcast_to(b.constant(skip), (1, *shape[1:]))
                rows = np.concatenate([rows, skipped])
            return rows.reshape(-1, length, width)

        reach = tensor.magnitude
        return Accumulation(left.reshape(-1, length, width), right, (0, 1), -reach, reach)

    def D(self, m: int) -> Any:
        """m D << b, [G, P]."""
        D = np.asarray(self.node.constants["D"]).astype(object) << self.node.integer("D_align")
        return D.reshape(self.shape.groups, self.shape.channels) * m

    def over_channels(self, t: int) -> Ids:
        """sum_p alpha^p H_t[m, g, p, n], random cells [components, G, N]; of what enters for t = -1."""
        if t not in self._over_channels:
            b, powers, state = self.b, self.b.powers(self.shape.channels), self.before(t + 1)
            assert state is not None
            raised = b.dot("mgpn,p->mgn", state, powers)
            offset = b.mul(b.total_weight(powers), b.constant([self.offset]))
            self._over_channels[t] = b.sub(raised, np.broadcast_to(offset, raised.shape))
        return self._over_channels[t]

    def honest_state(self, get: Get, t: int) -> Values:
        """Values of H_t."""
        state = self.before(t + 1)
        assert state is not None
        states: Values = get(state) - self.offset
        return states

    def honest(self, get: Get) -> tuple[Values, Values, Values, Values]:
        """Values of the operands, as :meth:`planes` has their cells."""
        x, q, B, C = self.planes()
        return get(x), get(q), get(B), get(C)


class _TurnedStates(Claimed):
    """q H_{t-1} + (B x) << a of one step before the shift, [components, G, P, N], claimed; plus the offset.

    Element (m, g, p, n) weighs alpha^(s ((m G + g) N + n) + p) for some s >= P: over p, the states before
    become one cell for each component and state.
    """

    def __init__(self, states: _States, t: int, name: str, tensor: TensorType) -> None:
        super().__init__(states.b, name, tensor)
        self._of, self._t = states, t
        self._offset = states.offset << states.node.integer("q_bits")

    def grid(self) -> Grid:
        components, groups, channels, states = self.type.shape
        rows, columns = self.builder.weights(components * groups * states, channels)
        return Grid(lambda ids: np.moveaxis(ids, 2, 3).reshape(-1, channels), rows, columns)

    def total(self) -> list[tuple[Ids, int]]:
        b, s, grid = self.builder, self._of.shape, self.grid()
        x, q, B, _ = (values[self._t] for values in self._of.planes())
        rows = grid.rows.reshape(s.components, s.groups, s.states)
        entering = b.dot("mgn,mgn->g", B, rows)
        x_over = b.dot("gp,p->g", x, grid.columns)
        inflow = b.dot("ag,g->a", entering[None], x_over)
        everywhere = b.mul(b.total_weight(grid.rows), b.total_weight(grid.columns))
        parts = [(inflow, 1 << self._of.node.integer("inflow_align")), (everywhere, self._offset)]
        if self._of.before(self._t) is not None:
            before = self._of.over_channels(self._t - 1)
            for sign in (1, -1):
                chosen = [
                    (i, j, m)
                    for terms in self._of.turn_terms()
                    for m, (i, j, own) in enumerate(terms)
                    if own == sign
                ]
                if chosen:
                    turned = b.mul(
                        np.stack([q[i] for i, _, _ in chosen]), np.stack([before[j] for _, j, _ in chosen])
                    )
                    weights = np.stack([rows[m] for _, _, m in chosen])
                    parts.append((b.dot("ak,k->a", turned.reshape(1, -1), weights.ravel()), sign))
        return parts

    def exact(self, get: Get) -> Values:
        x, q, B, _ = (values[self._t] for values in self._of.honest(get))
        total: Values = B[:, :, None, :] * x[None, :, :, None] << self._of.node.integer("inflow_align")
        total = total + self._offset
        if self._of.before(self._t) is not None:
            H = self._of.honest_state(get, self._t - 1)
            for terms in self._of.turn_terms():
                for m, (i, j, sign) in enumerate(terms):
                    total[m] += sign * q[i][:, None, :] * H[j]
        return total


class _ReadStates(Claimed):
    """y before its shift, [T, 4 G P], claimed: element (t, m, g, p) weighs alpha^(s ((4 t + m) G + g) + p)
    for some s >= P."""

    def __init__(self, states: _States, node: Node, tensor: TensorType) -> None:
        super().__init__(states.b, node.name, tensor)
        self._of = states

    def grid(self) -> Grid:
        (length, width), channels = self.type.shape, self._of.shape.channels
        rows, columns = self.builder.weights(length * width // channels, channels)
        return Grid(lambda ids: ids.reshape(-1, channels), rows, columns)

    def total(self) -> list[tuple[Ids, int]]:
        b, s, grid = self.builder, self._of.shape, self.grid()
        length = len(self._of.states())
        x, _, _, C = self._of.planes()
        with b.part(self.name):
            rows = grid.rows.reshape(length, 4, s.groups)
            states = np.stack([self._of.over_channels(t) for t in range(length)])
            parts = []
            for sign in (1, -1):
                terms = {
                    m: [(i, j) for i, j, own in product_terms(m, 4, s.components) if own == sign]
                    for m in range(4)
                }
                for m, pairs in terms.items():
                    if pairs:
                        left = np.stack([C[:, i] for i, _ in pairs])
                        right = np.stack([states[:, j] for _, j in pairs])
                        read = b.dot("ktgn,ktgn->tg", left, right)
                        part = b.dot("ai,i->a", read.reshape(1, -1), rows[:, m].ravel())
                        parts.append((part, sign))
            D = self._of.D(1)
            if D.any():
                weighed = b.mul(np.broadcast_to(grid.columns, D.shape), b.constant(D))
                skipped = b.dot("tgp,gp->tg", x, weighed)
                parts.append((b.dot("ai,i->a", skipped.reshape(1, -1), rows[:, 0].ravel()), 1))
        return parts

    def exact(self, get: Get) -> Values:
        x, _, _, C = self._of.honest(get)
        H = np.stack([self._of.honest_state(get, t) for t in range(len(self._of.states()))])
        y: Values = np.zeros((len(x), 4, *x.shape[1:]), dtype=x.dtype)
        y[:, 0] = x * self._of.D(1).astype(np.int64)
        for m in range(4):
            for i, j, sign in product_terms(m, 4, self._of.shape.components):
                y[:, m] += sign * np.einsum("tgpn,tgn->tgp", H[:, j], C[:, i])
        return y.reshape(self.type.shape)

"""``ssd``: the integer selective scan, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from circuits.cells import Cells, Get, Ids, Values
from circuits.gadgets.values import Accumulation, Claimed, Computed, Grid, Summed, Value
from circuits.segment import Carried
from mamba_int.graph import Node, TensorType
from mamba_int.operations.base import shifted
from mamba_int.operations.ssd import SsdBounds, node_bounds


class SsdValue(Value):
    """y before its shift, [T, H P]; shifted, each element is one dot with its quotient appended, or all
    elements of a chunk are claimed at once.

    Only pairs s < t of A need a shift: A[t, t] = (2^k - n_t) << (fA - k) is linear. D joins the diagonal of
    M, which it multiplies the same x with. The first chunk of a sequence has no incoming state, so nothing is
    read from it; that of a segment has.
    """

    def __init__(
        self, node: Node, inputs: list[Value], tensor: TensorType, carried: Carried | None = None
    ) -> None:
        super().__init__(inputs[0].builder, node.name, tensor)
        self._node = node
        self._inputs = inputs
        self._bounds = node_bounds(node, [value.type for value in inputs])
        self._chunks: list[_Chunk] | None = None
        self._entered: Ids | None = None
        if carried is not None:
            shape = inputs[3].type.shape[-1], node.integer("headdim"), inputs[1].type.shape[-1]
            self._entered = carried.enter(f"{node.name}:H", shape, -self._bounds.H, self._bounds.H)
            carried.leave(f"{node.name}:H", lambda: self._made()[-1].next_state())

    def _made(self) -> list[_Chunk]:
        if self._chunks is None:
            Q, steps = self._node.integer("chunk_size"), self.type.shape[0]
            self._chunks, H = [], self._entered
            for start in range(0, steps, Q):
                chunk = _Chunk(
                    self.builder, self._node, self._inputs, self._bounds, start, min(start + Q, steps), H
                )
                self._chunks.append(chunk)
                if start + Q < steps:
                    H = chunk.next_state()
        return self._chunks

    def _emit(self) -> Ids:
        return self._rows(lambda value, _: value.cells())

    def shifted(self, name: str, tensor: TensorType, places: int) -> Value:
        def row(value: Value, i: int) -> Ids:
            narrow = TensorType(value.type.shape, tensor.low, tensor.high)
            return value.shifted(f"{name}.{i}", narrow, places).cells()

        return _Rows(self, name, tensor, places, row)

    def _rows(self, make: Callable[[Value, int], Ids]) -> Ids:
        heads, width = self._inputs[3].type.shape[-1], self._node.integer("headdim")
        values = [value for chunk in self._made() for value in chunk.outputs()]
        return np.concatenate([make(value, i).reshape(-1, heads * width) for i, value in enumerate(values)])


class _Rows(Value):
    """The shifted y: a clamp is taken part by part too, so that its lookup serves as range check."""

    def __init__(
        self, source: SsdValue, name: str, tensor: TensorType, places: int, row: Callable[[Value, int], Ids]
    ) -> None:
        super().__init__(source.builder, name, tensor)
        self._source, self._places, self._row = source, places, row

    def _emit(self) -> Ids:
        return self._source._rows(self._row)

    def clamp(self, low: int, high: int) -> Ids:
        if self._cells is not None:
            return super().clamp(low, high)

        def row(value: Value, i: int) -> Ids:
            narrow = TensorType(value.type.shape, self.type.low, self.type.high)
            return value.shifted(f"{self.name}.{i}", narrow, self._places).clamp(low, high)

        return self._source._rows(row)


class _Chunk:
    """One chunk: its A, G, M, and if it has a predecessor or a successor, u, beta and the state."""

    def __init__(
        self,
        b: Cells,
        node: Node,
        inputs: list[Value],
        bounds: SsdBounds,
        start: int,
        stop: int,
        H: Ids | None,
    ) -> None:
        self.b, self.node, self.bounds, self.start, self.length = b, node, bounds, start, stop - start
        self.a: Mapping[str, Any] = node.attributes
        self.name = f"{node.name}.chunk{start // node.integer('chunk_size')}"
        self.heads, self.P = inputs[3].type.shape[-1], node.integer("headdim")
        x, Bh, Ch, n = (value.cells()[start:stop] for value in inputs[:4])
        self.inputs = inputs
        self.X = x.reshape(self.length, self.heads, self.P)
        self.Bh, self.Ch, self.n = Bh, Ch, n
        self.H = H
        self._x_over_heads: Ids | None = None
        self._A: dict[tuple[int, int], Ids] = {}
        with b.part(f"{node.name}.A"):
            self._decay_products()
        with b.part(f"{node.name}.G"):
            self.G = self._state_products()
        self.pairs = [(t, s) for t in range(self.length) for s in range(t + 1)]
        self.M = self._mixing()

    def _product(self, name: str, left: Ids, right: Ids, scaled: Ids | None, bound: int, places: int) -> Ids:
        """shift(left * right, places), elementwise; ``scaled``, if given, is right times 2^(k - places)."""
        b = self.b

        def multiple(m: int) -> Ids:
            if scaled is not None and m == b.scale(places):
                return scaled[None]
            return (right if m == 1 else b.mul(right, b.constant([m])))[None]

        axes = tuple(range(left.ndim))
        reach = bound << places
        total = Summed(
            b,
            f"{name}.product",
            TensorType(left.shape, -reach, reach),
            lambda: Accumulation(left[None], multiple, axes, -reach, reach),
        )
        return total.shifted(name, TensorType(left.shape, -bound, bound), places).cells()

    def _decay_products(self) -> None:
        """A[t, s] for s < t by shifts along the diagonals' rows; s = -1 too if a state comes in."""
        b, k, fA = self.b, self.a["decay_bits"], self.a["A_bits"]
        scale = 1 << (fA - k)
        carried = self.H is not None
        multiplies = self.length > 1 and b.window - k >= 4
        scaled = b.mul(self.n, b.constant([b.scale(k)])) if multiplies else None
        for t in range(self.length):
            own = b.sub(
                b.constant([1 << fA]), b.mul(self.n[t], b.constant([scale])) if scale > 1 else self.n[t]
            )
            before = list(range(t))
            if carried:
                if t == 0:
                    self._A[0, -1] = b.mul(self.n[0], b.constant([scale])) if scale > 1 else self.n[0]
                else:
                    before = [-1, *before]
            if before:
                left = np.stack([self._A[t - 1, s] for s in before])
                right = np.broadcast_to(self.n[t], left.shape)
                wide = np.broadcast_to(scaled[t], left.shape) if scaled is not None else None
                row = self._product(f"{self.name}.A{t}", left, right, wide, 1 << fA, k)
                self._A.update({(t, s): row[i] for i, s in enumerate(before)})
            self._A[t, t] = own

    def _state_products(self) -> dict[tuple[int, int], Ids]:
        b, limit = self.b, self.bounds.G
        pairs = [(t, s) for t in range(self.length) for s in range(t + 1)]
        left = np.stack([self.Ch[t] for t, _ in pairs], 1)
        right = np.stack([self.Bh[s] for _, s in pairs], 1)
        places, reach = self.a["G_shift"], self.bounds.G_pre
        wide = shifted(reach, places)
        total = Summed(
            b,
            f"{self.name}.CB",
            TensorType((len(pairs),), -reach, reach),
            lambda: Accumulation(left, self._scaled(right), (0,), -reach, reach),
        )
        value: Value = total
        if b.challenged and _ProductsOfStates.pays(self.length, self.Bh.shape[1]):
            value = _ProductsOfStates(b, f"{self.name}.CB", reach, self.Ch, self.Bh)
        if places:
            value = value.shifted(f"{self.name}.G", TensorType((len(pairs),), -wide, wide), places)
        G = value.clamp(-limit, limit) if wide > limit else value.cells()
        return {pair: G[i : i + 1] for i, pair in enumerate(pairs)}

    def _scaled(self, right: Ids) -> Callable[[int], Ids]:
        """Cells of m * right: every distinct cell is multiplied once, whatever the view repeats."""

        def scaled(m: int) -> Ids:
            if m == 1:
                return right
            distinct, where = np.unique(right, return_inverse=True)
            product = self.b.mul(distinct, self.b.constant([m]))
            return product[where].reshape(right.shape)

        return scaled

    def _mixing(self) -> dict[tuple[int, int], Ids]:
        b, places = self.b, self.a["M_shift"]
        with b.part(f"{self.node.name}.M"):
            left = np.stack([self._A[pair] for pair in self.pairs])
            G = np.stack([self.G[pair] for pair in self.pairs])
            m = b.scale(places) if b.window - places >= 4 else 0
            scaled = np.broadcast_to(b.mul(G, b.constant([m])), left.shape) if m else None
            M = self._product(
                f"{self.name}.M", left, np.broadcast_to(G, left.shape), scaled, self.bounds.M, places
            )
        return {pair: M[i] for i, pair in enumerate(self.pairs)}

    def x_over_heads(self) -> Ids:
        """sum_p alpha^p x[s, h, p], random cells [s, H]."""
        if self._x_over_heads is None:
            with self.b.part(self.node.name):
                self._x_over_heads = self.b.dot("shp,p->sh", self.X, self.b.powers(self.P))
        return self._x_over_heads

    def outputs(self) -> list[Value]:
        """y before its shift: sum_s M x, skip D x, and A_u u of the carried state; all steps as one claim
        [t, H, P], or a value [H, P] for each step.
        """
        b, a = self.b, self.a
        D = self.node.constants["D"].astype(object) << a["D_align"]
        carried = self._carried() if self.H is not None else None
        if b.challenged:
            return [_MixedValue(self, D, carried)]
        result: list[Value] = []
        for t in range(self.length):
            left = [self.X[s] for s in range(t + 1)]
            if carried is not None:
                left.append(carried[1][t])
            stacked = np.stack(left)

            def right(m: int, t: int = t) -> Ids:
                # M << M_align and D << D_align, both times m: the small side carries the multiplier.
                with b.part(self.node.name):
                    M = np.stack([self.M[t, s] for s in range(t + 1)])
                    factor = m << a["M_align"]
                    rows = b.mul(M, b.constant([factor])) if factor > 1 else M
                    skip = b.add(rows[t], b.constant(D * m))
                    rows = np.concatenate([rows[:t], skip[None]])
                    if carried is not None:
                        weight = m << a["u_align"]
                        A_u = carried[0][t]
                        last = b.mul(A_u, b.constant([weight])) if weight > 1 else A_u
                        rows = np.concatenate([rows, last[None]])
                    return rows

            bound = self.bounds.y
            accumulation = Accumulation(stacked, right, (0,), -bound, bound)
            tensor = TensorType((self.heads, self.P), -bound, bound)
            result.append(Summed(b, f"{self.name}.y{t}", tensor, partial(_same, accumulation)))
        return result

    def _carried(self) -> tuple[Ids, Ids]:
        """A_u [t, H] and u [t, H, P] of the incoming state."""
        b, a, H = self.b, self.a, self.H
        assert H is not None
        with b.part(f"{self.node.name}.u"):
            left = np.broadcast_to(H[None], (self.length, *H.shape))
            left = np.moveaxis(left, -1, 0)  # [N, t, H, P]
            right = np.moveaxis(self.Ch, -1, 0)  # [N, t]
            reach = self.bounds.u_pre
            shape = (self.length, self.heads, self.P)
            total: Value = Summed(
                b,
                f"{self.name}.HC",
                TensorType(shape, -reach, reach),
                lambda: Accumulation(left, self._scaled(right), (0,), -reach, reach),
            )
            if b.challenged:
                total = _ReadValue(b, f"{self.name}.HC", reach, H, self.Ch)
            bound = self.bounds.u
            u = total.shifted(f"{self.name}.u", TensorType(shape, -bound, bound), a["u_shift"]).cells()
            A = np.stack([self._A[t, -1] for t in range(self.length)])
            places = a["A_bits"] - a["A_u_bits"]
            if places:
                wide = Computed(b, f"{self.name}.A_in", TensorType(A.shape, 0, 1 << a["A_bits"]), lambda: A)
                narrow = TensorType(A.shape, 0, 1 << a["A_u_bits"])
                A = wide.shifted(f"{self.name}.A_u", narrow, places).cells()
        return A, u

    def next_state(self) -> Ids:
        """H' [H, P, N] in the next chunk's frame."""
        b, a, last = self.b, self.a, self.length - 1
        fA, fR = a["A_bits"], a["rotation_frac"]
        # Read here only: a scan of one chunk has no use for B'.
        Bn = self.inputs[4].cells()[self.start : self.start + self.length]
        half = Bn.shape[-1] // 2
        with b.part(f"{self.node.name}.beta"):
            A = np.stack([self._A[last, s] for s in range(self.length)])  # [s, H]
            left = np.broadcast_to(A[:, :, None], (*A.shape, 2 * half))
            right = np.broadcast_to(Bn[:, None], left.shape)
            scaled = self._scaled(right)
            reach = self.bounds.beta << a["beta_shift"]
            product = Summed(
                b,
                f"{self.name}.AB",
                TensorType(left.shape, -reach, reach),
                lambda: Accumulation(left[None], lambda m: scaled(m)[None], (0, 1, 2), -reach, reach),
            )
            bound = self.bounds.beta
            narrow = TensorType(left.shape, -bound, bound)
            beta = product.shifted(f"{self.name}.beta", narrow, a["beta_shift"]).cells()
        with b.part(f"{self.node.name}.H"):
            turns = (
                [
                    self._turn(f"{self.name}.{name}", self._A[last, -1], self.node.constants[key], fA, fR)
                    for name, key in (("kappa", "cos_Q"), ("sigma", "sin_Q"))
                ]
                if self.H is not None
                else []
            )
            return self._state(beta, turns, half)

    def _turn(self, name: str, across: Ids, constants: Any, fA: int, fR: int) -> Ids:
        """shift(A[Q-1,-1] * constants, fR), [H, N/2]."""
        b, shape = self.b, (self.heads, len(constants))
        left = np.broadcast_to(across[:, None], shape)[None]
        # ssd_bounds has checked that the turn amplifies nothing: its norm stays below 2^fA.
        bound = 1 << fA
        values = constants.astype(object)
        total = Summed(
            b,
            f"{name}.product",
            TensorType(shape, -(bound << fR), bound << fR),
            lambda: Accumulation(
                left, lambda m: b.constant(values[None] * m), (1,), -(bound << fR), bound << fR
            ),
        )
        return total.shifted(name, TensorType(shape, -bound, bound), fR).cells()

    def _state(self, beta: Ids, turns: list[Ids], half: int) -> Ids:
        """shift(kappa, sigma on the pairs of H + (sum_s x_s beta_s) << c, fA), [H, P, N]."""
        b, a = self.b, self.a
        shape = (self.heads, self.P, 2 * half)
        reach, bound = self.bounds.H_pre, self.bounds.H
        narrow = TensorType(shape, -bound, bound)
        if b.challenged:
            return _StateValue(self, beta, turns).shifted(f"{self.name}.H", narrow, a["A_bits"]).cells()
        lefts = [np.broadcast_to(self.X[s][:, :, None], shape) for s in range(self.length)]
        weights = [(beta[s], 1 << a["H_align"]) for s in range(self.length)]  # [H, N]
        if turns:
            H, (kappa, sigma) = self.H, turns
            assert H is not None
            lefts += [
                np.concatenate([H[..., :half], H[..., half:]], -1),
                np.concatenate([H[..., half:], H[..., :half]], -1),
            ]
            minus = b.mul(sigma, b.constant([-1]))
            weights += [
                (np.concatenate([kappa, kappa], -1), 1),
                (np.concatenate([minus, sigma], -1), 1),
            ]

        def right(m: int) -> Ids:
            return np.stack([self._scaled(ids)(m * c) for ids, c in weights])

        total = Summed(
            b,
            f"{self.name}.inflow",
            TensorType(shape, -reach, reach),
            lambda: Accumulation(np.stack(lefts), right, (0, 2), -reach, reach),
        )
        return total.shifted(f"{self.name}.H", narrow, a["A_bits"]).cells()


class _ProductsOfStates(Claimed):
    """C_t . B_s for all s <= t, claimed over the whole square: pairs s > t serve this claim alone.

    Element (t, s) weighs alpha^(Q t + s).
    """

    def __init__(self, b: Cells, name: str, reach: int, C: Ids, B: Ids) -> None:
        length = len(C)
        super().__init__(b, name, TensorType((length * (length + 1) // 2,), -reach, reach))
        self._C, self._B = C, B

    @staticmethod
    def pays(length: int, state: int) -> bool:
        """Whether one claim needs fewer cells than a dot for each pair."""
        pairs = length * (length + 1) // 2
        return pairs * 3 + length * length * 3 + state * (2 * length + 1) < pairs * (state + 2)

    def _weights(self, inside: bool) -> Ids:
        length = len(self._C)
        below = np.tri(length, dtype=bool) == inside
        weights: Ids = self.builder.powers(length * length).reshape(length, length)[below]
        return weights

    def grid(self) -> Grid:
        one = self.builder.constant([1])
        return Grid(lambda ids: ids.reshape(1, -1), one, self._weights(True))

    def total(self) -> list[tuple[Ids, int]]:
        b, length = self.builder, len(self._C)
        C = b.dot("tn,t->n", self._C, b.powers(length, length))
        B = b.dot("sn,s->n", self._B, b.powers(length))
        parts = [(b.dot("an,n->a", C[None], B), 1)]
        if length > 1:
            reach, count = self.type.magnitude, length * (length - 1) // 2
            above = b.private(f"{self.name}.above", (count,), -reach, reach, self._above)
            parts.append((b.dot("ak,k->a", above[None], self._weights(False)), -1))
        return parts

    def exact(self, get: Get) -> Values:
        values: Values = (get(self._C) @ get(self._B).T)[np.tri(len(self._C), dtype=bool)]
        return values

    def _above(self, get: Get) -> Values:
        values: Values = (get(self._C) @ get(self._B).T)[~np.tri(len(self._C), dtype=bool)]
        return values


class _MixedValue(Claimed):
    """y of a chunk before its shift, [t, H, P], claimed.

    Element (t, h, p) weighs alpha^(s (t H + h) + p) for some s >= P.
    """

    def __init__(self, chunk: _Chunk, D: Any, carried: tuple[Ids, Ids] | None) -> None:
        bound = chunk.bounds.y
        shape = (chunk.length, chunk.heads, chunk.P)
        super().__init__(chunk.b, f"{chunk.name}.y", TensorType(shape, -bound, bound))
        self._chunk, self._D, self._carried = chunk, D, carried

    def grid(self) -> Grid:
        steps, heads, width = self.type.shape
        rows, columns = self.builder.weights(steps * heads, width)
        return Grid(lambda ids: ids.reshape(-1, width), rows, columns)

    def total(self) -> list[tuple[Ids, int]]:
        b, chunk, rows = self.builder, self._chunk, self.grid().rows
        with b.part(chunk.node.name):
            x = chunk.x_over_heads()
            mixed = np.stack([b.dot("sh,sh->h", x[: t + 1], self._weights(t)) for t in range(chunk.length)])
            skipped = b.dot("th,th->h", x, rows.reshape(x.shape))
            parts = [
                (b.dot("ai,i->a", mixed.reshape(1, -1), rows), 1 << chunk.a["M_align"]),
                (b.dot("ah,h->a", skipped[None], b.constant(self._D)), 1),
            ]
            if self._carried is not None:
                A_u, u = self._carried
                read = b.mul(b.dot("thp,p->th", u, b.powers(chunk.P)), A_u)
                parts.append((b.dot("ai,i->a", read.reshape(1, -1), rows), 1 << chunk.a["u_align"]))
        return parts

    def _weights(self, t: int) -> Ids:
        return np.stack([self._chunk.M[t, s] for s in range(t + 1)])

    def exact(self, get: Get) -> Values:
        chunk = self._chunk
        x = get(chunk.X)
        rows = [
            np.einsum("sh,shp->hp", get(self._weights(t)) << chunk.a["M_align"], x[: t + 1])
            for t in range(chunk.length)
        ]
        y: Values = np.stack(rows) + self._D.astype(np.int64)[:, None] * x
        if self._carried is not None:
            A_u, u = (get(ids) for ids in self._carried)
            y += (A_u[..., None] * u) << chunk.a["u_align"]
        return y


class _ReadValue(Claimed):
    """sum_n H[h, p, n] C[t, n], [t, H, P], claimed; element (t, h, p) weighs alpha^(s t + h P + p)."""

    def __init__(self, b: Cells, name: str, reach: int, H: Ids, C: Ids) -> None:
        super().__init__(b, name, TensorType((len(C), *H.shape[:2]), -reach, reach))
        self._H, self._C = H, C

    def grid(self) -> Grid:
        steps, heads, width = self.type.shape
        rows, columns = self.builder.weights(steps, heads * width)
        return Grid(lambda ids: ids.reshape(steps, -1), rows, columns)

    def total(self) -> list[tuple[Ids, int]]:
        b, grid = self.builder, self.grid()
        H = b.dot("in,i->n", self._H.reshape(-1, self._H.shape[-1]), grid.columns)
        C = b.dot("tn,t->n", self._C, grid.rows)
        return [(b.dot("an,n->a", H[None], C), 1)]

    def exact(self, get: Get) -> Values:
        values: Values = np.einsum("hpn,tn->thp", get(self._H), get(self._C))
        return values


class _StateValue(Claimed):
    """The next state before its shift, [H, P, N], claimed: the turned state plus (sum_s x_s beta_s) << c.

    Element (h, p, n) weighs alpha^(s (h N + n) + p): over p, x and the state become one cell for each head
    and each pair (h, n), which is all that the turn and the inflow read.
    """

    def __init__(self, chunk: _Chunk, beta: Ids, turns: list[Ids]) -> None:
        reach = chunk.bounds.H_pre
        shape = (chunk.heads, chunk.P, beta.shape[-1])
        super().__init__(chunk.b, f"{chunk.name}.inflow", TensorType(shape, -reach, reach))
        self._chunk, self._beta, self._turns = chunk, beta, turns

    def grid(self) -> Grid:
        heads, width, state = self.type.shape
        rows, columns = self.builder.weights(heads * state, width)
        return Grid(lambda ids: np.moveaxis(ids, 1, 2).reshape(-1, width), rows, columns)

    def total(self) -> list[tuple[Ids, int]]:
        b, chunk, grid = self.builder, self._chunk, self.grid()
        rows = grid.rows.reshape(chunk.heads, -1)
        inflow = b.dot("shn,hn->sh", self._beta, rows)
        x = chunk.x_over_heads()
        parts = [(b.dot("ai,i->a", inflow.reshape(1, -1), x.ravel()), 1 << chunk.a["H_align"])]
        if self._turns:
            assert chunk.H is not None
            kappa, sigma = self._turns
            state = b.dot("hpn,p->hn", chunk.H, grid.columns)
            half = kappa.shape[-1]
            left, right = state[:, :half], state[:, half:]
            w1, w2 = rows[:, :half], rows[:, half:]
            # kappa (H1 w1 + H2 w2) + sigma (H1 w2 - H2 w1)
            along = b.add(b.mul(left, w1), b.mul(right, w2))
            across = b.sub(b.mul(left, w2), b.mul(right, w1))
            parts.append((b.dot("ai,i->a", along.reshape(1, -1), kappa.ravel()), 1))
            parts.append((b.dot("ai,i->a", across.reshape(1, -1), sigma.ravel()), 1))
        return parts

    def exact(self, get: Get) -> Values:
        chunk = self._chunk
        H: Values = np.einsum("shp,shn->hpn", get(chunk.X), get(self._beta)) << chunk.a["H_align"]
        if self._turns:
            assert chunk.H is not None
            kappa, sigma = (get(ids)[:, None] for ids in self._turns)
            state = get(chunk.H)
            half = kappa.shape[-1]
            H1, H2 = state[..., :half], state[..., half:]
            turned = np.concatenate([kappa * H1 - sigma * H2, kappa * H2 + sigma * H1], -1)
            H = H + turned
        return H


def _same(accumulation: Accumulation) -> Accumulation:
    return accumulation


def ssd(inputs: list[Value], node: Node, tensor: TensorType, carried: Carried | None = None) -> Value:
    """The gadget of ``ssd``."""
    return SsdValue(node, inputs, tensor, carried)

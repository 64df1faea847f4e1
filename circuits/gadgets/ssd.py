"""``ssd``: the integer selective scan, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from circuits.cells import Cells, Ids
from circuits.gadgets.values import Accumulation, Computed, Summed, Value
from mamba_int.graph import Node, TensorType
from mamba_int.operations.base import shifted
from mamba_int.operations.ssd import SsdBounds, node_bounds


class SsdValue(Value):
    """y before its shift, [T, H P]; shifted, each element is one dot with its quotient appended.

    Only pairs s < t of A need a shift: A[t, t] = (2^k - n_t) << (fA - k) is linear. D joins the diagonal of
    M, which it multiplies the same x with. The first chunk has no incoming state, so nothing is read from it.
    """

    def __init__(self, node: Node, inputs: list[Value], tensor: TensorType) -> None:
        super().__init__(inputs[0].builder, node.name, tensor)
        self._node = node
        self._inputs = inputs
        self._bounds = node_bounds(node, [value.type for value in inputs])
        self._chunks: list[_Chunk] | None = None

    def _made(self) -> list[_Chunk]:
        if self._chunks is None:
            Q, steps = self._node.integer("chunk_size"), self.type.shape[0]
            self._chunks, H = [], None
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
        def row(value: Value, t: int) -> Ids:
            narrow = TensorType(value.type.shape, tensor.low, tensor.high)
            return value.shifted(f"{name}.{t}", narrow, places).cells()

        return _Rows(self, name, tensor, places, row)

    def _rows(self, make: Callable[[Value, int], Ids]) -> Ids:
        heads, width = self._inputs[3].type.shape[-1], self._node.integer("headdim")
        rows = [
            make(value, chunk.start + t).reshape(heads * width)
            for chunk in self._made()
            for t, value in enumerate(chunk.outputs())
        ]
        return np.stack(rows)


class _Rows(Value):
    """The shifted y: a clamp is taken row by row too, so that its lookup serves as range check."""

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

        def row(value: Value, t: int) -> Ids:
            narrow = TensorType(value.type.shape, self.type.low, self.type.high)
            return value.shifted(f"{self.name}.{t}", narrow, self._places).clamp(low, high)

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
            if scaled is not None and m == 1 << (b.logrows - places):
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
        multiplies = self.length > 1 and b.logrows - k >= 4
        scaled = b.mul(self.n, b.constant([1 << (b.logrows - k)])) if multiplies else None
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
        if places:
            value = total.shifted(f"{self.name}.G", TensorType((len(pairs),), -wide, wide), places)
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
            m = 1 << (b.logrows - places) if b.logrows - places >= 4 else 0
            scaled = np.broadcast_to(b.mul(G, b.constant([m])), left.shape) if m else None
            M = self._product(
                f"{self.name}.M", left, np.broadcast_to(G, left.shape), scaled, self.bounds.M, places
            )
        return {pair: M[i] for i, pair in enumerate(self.pairs)}

    def outputs(self) -> list[Value]:
        """y of each step before its shift, [H, P]: sum_s M x, skip D x, and A_u u of the carried state."""
        b, a = self.b, self.a
        D = self.node.constants["D"].astype(object) << a["D_align"]
        carried = self._carried() if self.H is not None else None
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
            total = Summed(
                b,
                f"{self.name}.HC",
                TensorType(shape, -reach, reach),
                lambda: Accumulation(left, self._scaled(right), (0,), -reach, reach),
            )
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

        reach, bound = self.bounds.H_pre, self.bounds.H
        total = Summed(
            b,
            f"{self.name}.inflow",
            TensorType(shape, -reach, reach),
            lambda: Accumulation(np.stack(lefts), right, (0, 2), -reach, reach),
        )
        return total.shifted(f"{self.name}.H", TensorType(shape, -bound, bound), a["A_bits"]).cells()


def _same(accumulation: Accumulation) -> Accumulation:
    return accumulation


def ssd(inputs: list[Value], node: Node, tensor: TensorType) -> Value:
    """The gadget of ``ssd``."""
    return SsdValue(node, inputs, tensor)

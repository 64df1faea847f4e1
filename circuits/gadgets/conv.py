"""``conv``: the causal depthwise convolution, tap by tap or claimed at a random point."""

from __future__ import annotations

import numpy as np

from circuits.cells import Get, Ids, Values
from circuits.gadgets.values import Accumulation, Claimed, Grid, Summed, Value
from circuits.segment import Carried
from mamba_int.graph import IntArray, Node, TensorType


class _ConvolvedValue(Claimed):
    """sum_d tap[c, d] x[t - d, c] + bias[c], [T, C], claimed as a product of polynomials in alpha.

    Over time, sum_t alpha^t x_t times sum_d tap_d alpha^d has T + K - 1 coefficients: the T outputs, and
    K - 1 beyond the end, which are private, enter this claim only and are fixed by it. So x itself need not
    be cells if its producer knows the sum over time.
    """

    def __init__(
        self,
        source: Value,
        name: str,
        tensor: TensorType,
        taps: IntArray,
        bias: IntArray | None,
        window: Ids | None,
    ) -> None:
        super().__init__(source.builder, name, tensor)
        self._source, self._window = source, window
        # taps[:, i] multiplies the step K - 1 - i before the present one
        self._taps = taps[:, ::-1]
        self._bias = bias if bias is not None else np.zeros(len(taps), np.int64)

    def grid(self) -> Grid:
        steps, channels = self.type.shape
        rows, columns = self.builder.weights(channels, steps + self._taps.shape[1] - 1)
        return Grid(np.transpose, rows, columns[:steps])

    def total(self) -> list[tuple[Ids, int]]:
        b, grid = self.builder, self.grid()
        steps, (channels, width) = self.type.shape[0], self._taps.shape
        powers = b.powers(steps + width - 1)
        delays = np.broadcast_to(powers[:width, None], (width, channels))
        filters = b.dot("kc,kc->c", delays, b.constant(self._taps.T.astype(object)))
        products = b.mul(self._source.over_time(grid.columns), filters)
        parts = [(b.dot("ac,c->a", products[None], grid.rows), 1)]
        if width > 1:
            name, reach = f"{self.name}.beyond", self.type.magnitude
            beyond = b.private(name, (width - 1, channels), -reach, reach, self._beyond)
            later = b.dot("tc,t->c", beyond, powers[steps:])
            parts.append((b.dot("ac,c->a", later[None], grid.rows), -1))
        if self._window is not None:
            parts.append((b.dot("ac,c->a", self._of_window()[None], grid.rows), 1))
        if self._bias.any():
            once = b.total_weight(grid.columns)
            biases = b.dot("ac,c->a", grid.rows[None], b.constant(self._bias.astype(object)))
            parts.append((b.mul(biases, once), 1))
        return parts

    def _of_window(self) -> Ids:
        """sum_t alpha^t of what the steps before the segment add to y_t, t < K - 1; random cells [C]."""
        assert self._window is not None
        b, (channels, width) = self.builder, self._taps.shape
        powers = b.powers(self.type.shape[0] + width - 1)
        # x_{j - (K - 1)} meets tap d in y_t for d = t + K - 1 - j < K
        weights = []
        for j in range(width - 1):
            count = min(j + 1, self.type.shape[0])
            delays = np.broadcast_to(powers[:count, None], (count, channels))
            taps = np.stack([self._taps[:, t + width - 1 - j] for t in range(count)])
            weights.append(b.dot("tc,tc->c", delays, b.constant(taps.astype(object))))
        return b.dot("jc,jc->c", np.stack(weights), self._window)

    def _sums(self, get: Get) -> Values:
        """All T + K - 1 sums of products of the segment's own steps."""
        x, (channels, width) = self._source.honest(get), self._taps.shape
        sums = np.zeros((len(x) + width - 1, channels), dtype=x.dtype)
        for d in range(width):
            sums[d : d + len(x)] += x * self._taps[:, d]
        return sums

    def exact(self, get: Get) -> Values:
        steps, width = self.type.shape[0], self._taps.shape[1]
        values: Values = self._sums(get)[:steps] + self._bias
        if self._window is not None:
            window = get(self._window)
            for j in range(width - 1):
                for t in range(min(j + 1, steps)):
                    values[t] += window[j] * self._taps[:, t + width - 1 - j]
        return values

    def _beyond(self, get: Get) -> Values:
        return self._sums(get)[self.type.shape[0] :]


def conv(source: Value, node: Node, tensor: TensorType, carried: Carried | None = None) -> Value:
    """The gadget of ``conv``: K taps of each channel as one dot over the shifted copies of x, or a claim."""
    b = source.builder
    taps, bias = node.constants["taps"], node.constants.get("bias")
    window = None
    if carried is not None and taps.shape[1] > 1:
        shape = taps.shape[1] - 1, taps.shape[0]
        low, high = min(source.type.low, 0), max(source.type.high, 0)
        window = carried.enter(f"{node.name}:window", shape, low, high)
        # Made before the hints that read them.
        steps = source.cells()[-shape[0] :]
        carried.leave(f"{node.name}:window", lambda: steps)
    if b.challenged:
        return _ConvolvedValue(source, node.name, tensor, taps, bias, window)

    def accumulate() -> Accumulation:
        x = source.cells()
        steps, channels = x.shape
        width = taps.shape[1]
        zeros = np.broadcast_to(b.constant([0]), (width - 1, channels))
        padded = np.concatenate([zeros if window is None else window, x])
        left = [padded[i : i + steps] for i in range(width)]
        rows = [taps[:, i] for i in range(width)]
        if bias is not None and bias.any():
            left.append(np.broadcast_to(b.constant([1]), x.shape))
            rows.append(bias)
        right = np.stack(rows).astype(object)
        return Accumulation(np.stack(left), lambda m: b.constant(right * m), (1,), tensor.low, tensor.high)

    return Summed(b, node.name, tensor, accumulate)

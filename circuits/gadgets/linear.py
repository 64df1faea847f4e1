"""``linear``: all steps in one product, packed into one number (Kronecker) or claimed at a random point.

Either way ternary rows are read by pairs of pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from circuits.cells import Cells, Get, Ids, Values
from circuits.gadgets.values import Accumulation, Claimed, Computed, Grid, Hint, Summed, Value
from mamba_int.graph import IntArray, TensorType
from mamba_int.operations.base import rounding_shift

FLOAT_BITS = 126
"""Powers of two up to 2^126 are float32 constants, which is all that ONNX lets EZKL see."""
FIELD_BITS = 250
"""A packed number stays below 2^250, far from wrapping in the field."""

CELLS_PER_BIT = 3
"""What a tight check costs, roughly."""


class LinearValue(Value):
    """x W^T + b of a tensor with time axis, [T, J].

    As cells: the accumulators are the digits, base 2^k, of one packed product; each is looked up, so is
    unique, because the proven bound of the accumulators keeps every digit inside the table. The lowest digit
    is not given but computed, so its lookup *is* the equality check.

    Tight checks can cost more than plain dots; then these are made instead.

    Shifted: the digits, base 2^(2k), are m acc = 2^k q + rho with q and rho both looked up.
    """

    def __init__(
        self, source: Value, name: str, tensor: TensorType, weight: IntArray, bias: IntArray | None
    ) -> None:
        super().__init__(source.builder, name, tensor)
        self._source = source
        self._weight = weight
        self._bias = bias if bias is not None else np.zeros(len(weight), np.int64)

    @property
    def _packs(self) -> bool:
        """Whether the accumulators are digits of a packed product."""
        b, bits = self.builder, (self.type.high - self.type.low).bit_length()
        if b.tight and CELLS_PER_BIT * bits > self._weight.shape[1]:
            return False
        return b.fits(self.type.low, self.type.high)

    def _digit_bits(self, tensor: TensorType) -> int:
        """Bits of a base in which checked cells of a type are unique digits, and x fits."""
        low, high = self.builder.bounds(self._source.cells())
        return self.builder.digit_bits(min(low, tensor.low), max(high, tensor.high))

    def _pack_bits(self, tensor: TensorType, fine: int, coarse: int) -> int:
        """The same for quotients of a type together with their remainders."""
        return self._digit_bits(tensor) + fine + self.builder.scale(fine).bit_length() - 1 + coarse

    def _exact(self, start: int, stop: int) -> Callable[[Get], Values]:
        x = self._source.cells()[start:stop]
        return lambda get: get(x) @ self._weight.T + self._bias

    def _emit(self) -> Ids:
        if not self._packs:
            return self.accumulation().emit(self.builder)
        b, k = self.builder, self._digit_bits(self.type)
        steps = len(self._source.cells())
        group = FLOAT_BITS // k
        most = min(2 * group, FIELD_BITS // k)
        packs = []
        for start in range(0, steps, most):
            stop = min(start + most, steps)
            exact = self._exact(start, stop)

            def later_digits(get: Get, exact: Hint = exact) -> Values:
                return exact(get)[1:]

            terms = self._packed_terms(start, stop, k, 1)
            rows: list[Ids] = []
            if stop - start > 1:
                digits = b.private(
                    f"{self.name}.digits{start}" if start else f"{self.name}.digits",
                    (stop - start - 1, len(self._weight)),
                    self.type.low,
                    self.type.high,
                    later_digits,
                )
                rows.append(b.check(digits))
                terms += self._subtract([(digits[t - 1], t, 1) for t in range(1, stop - start)], k)
            rows.insert(0, b.check(self._total(terms, (self.type.low, self.type.high)))[None])
            packs.append(np.concatenate(rows))
        return np.concatenate(packs)

    def shifted(self, name: str, tensor: TensorType, places: int) -> Value:
        b, k = self.builder, self.builder.window
        if places > 2 * (k - 4) or not b.fits(tensor.low, tensor.high):
            return super().shifted(name, tensor, places)
        return Computed(b, name, tensor, lambda: self._emit_shifted(name, tensor, places))

    def _emit_shifted(self, name: str, tensor: TensorType, places: int) -> Ids:
        """Packs of digits m acc = 2^k q + rho; beyond k - 4 places m (acc - half) = 2^(k+c) q + 2^k h + rho.

        The second form splits the remainder as ``Shifted`` does: h is checked against a window of exactly
        2^c, and the digits have base 2^(2k+c), which is still wider than their range.
        """
        fine = min(places, self.builder.window - 4)
        steps, bits = len(self._source.cells()), self._pack_bits(tensor, fine, places - fine)
        most = min(2 * (FLOAT_BITS // bits), FIELD_BITS // bits)
        packs = [
            self._emit_pack(name, tensor, start, min(start + most, steps), fine, places - fine)
            for start in range(0, steps, most)
        ]
        return np.concatenate(packs)

    def _emit_pack(self, name: str, tensor: TensorType, start: int, stop: int, fine: int, coarse: int) -> Ids:
        b, places, bits = self.builder, fine + coarse, self._pack_bits(tensor, fine, coarse)
        m = b.scale(fine)
        # Bits of the remainder's window.
        k = fine + m.bit_length() - 1
        window = 1 << (k - 1)
        half = 1 << (fine - 1) if coarse else 0
        exact, suffix = self._exact(start, stop), f"{start}" if start else ""
        shape = (stop - start, len(self._weight))

        def quotient(get: Get) -> Values:
            return rounding_shift(exact(get), places)

        q = b.check(b.private(f"{name}.q{suffix}", shape, tensor.low, tensor.high, quotient))
        parts = [(q, k + coarse)]
        if coarse:
            reach = 1 << (coarse - 1)

            def limb(get: Get) -> Values:
                rest: Values = exact(get) - (get(q) << places) + (1 << (places - 1))
                return (rest >> fine) - reach

            h = b.check(b.private(f"{name}.h{suffix}", shape, -reach, reach - 1, limb))
            b.check(b.mul(h, b.constant([b.scale(coarse)])))
            parts.append((h, k))

        def remainder(get: Get) -> Values:
            rest = m * (exact(get) - half)
            for ids, exponent in parts:
                rest = rest - (get(ids) << exponent)
            return rest[1:]

        digits = [(ids[t], t, 1 << exponent) for ids, exponent in parts for t in range(stop - start)]
        if stop - start > 1:
            shape = (stop - start - 1, shape[1])
            rho = b.check(b.private(f"{name}.rho{suffix}", shape, -window, window - m, remainder))
            digits += [(rho[t - 1], t, 1) for t in range(1, stop - start)]
        terms = self._packed_terms(start, stop, bits, m, half) + self._subtract(digits, bits)
        b.check(self._total(terms, (-window, window - m)))
        return q

    def sliced(self, name: str, tensor: TensorType, start: int, stop: int) -> Value:
        if self._packs:
            return super().sliced(name, tensor, start, stop)
        return LinearValue(self._source, name, tensor, self._weight[start:stop], self._bias[start:stop])

    def accumulation(self) -> Accumulation:
        if self._packs:
            return super().accumulation()
        return direct(self._source, self._weight, self._bias, self.type)

    # -- packing -----------------------------------------------------------------------------------------

    def _subtract(self, digits: list[tuple[Ids, int, int]], bits: int) -> list[tuple[Ids, Values]]:
        """Terms -c 2^(bits t) cells of every (cells, t, c); the far t are gathered in a cell of their own
        first, because float32 ends at 2^127."""
        group = FLOAT_BITS // bits
        near = [(ids, c << (bits * t)) for ids, t, c in digits if t < group]
        far = [(ids, c << (bits * (t - group))) for ids, t, c in digits if t >= group]
        terms = [(ids, np.full(ids.shape, -c, dtype=object)) for ids, c in near]
        return [*terms, self._high_group(far, bits * group)] if far else terms

    def _high_group(self, digits: list[tuple[Ids, int]], exponent: int) -> tuple[Ids, Values]:
        b = self.builder
        if len(digits) == 1 and digits[0][1] == 1:
            total = digits[0][0]
        else:
            coefficients = b.constant(np.array([c for _, c in digits], dtype=object))
            total = b.dot("kj,k->j", np.stack([ids for ids, _ in digits]), coefficients)
        return total, np.full(total.shape, -(1 << exponent), dtype=object)

    def _packed_terms(
        self, start: int, stop: int, bits: int, m: int, less: int = 0
    ) -> list[tuple[Ids, Values]]:
        """m sum_t 2^(bits t) (x_t W^T + b - less) as terms (cells [J], coefficients [J])."""
        b, x, bias = self.builder, self._source.cells()[start:stop], self._bias - less
        biased = bool(bias.any())
        if biased:
            ones = b.constant(np.ones((stop - start, 1), dtype=object))
            x = np.concatenate([x, ones], 1)
        packed = self._pack(x, bits)
        terms = [
            (ids, signs * m)
            for ids, signs in combine_columns(b, packed[: self._weight.shape[1]], self._weight)
        ]
        if biased:
            spread = np.broadcast_to(packed[-1:], (len(self._weight),))
            terms.append((spread, bias.astype(object) * m))
        return terms

    def _pack(self, x: Ids, bits: int) -> Ids:
        b, group = self.builder, FLOAT_BITS // bits
        parts = []
        for start in range(0, len(x), group):
            part = x[start : start + group]
            powers = np.array([1 << bits * t for t in range(len(part))], dtype=object)
            parts.append(b.dot("tk,t->k", part, b.constant(powers)) if len(part) > 1 else part[0])
        if len(parts) == 1:
            return parts[0]
        far = b.constant(np.array([1, 1 << bits * group], dtype=object))
        low, high = b.bounds(x)
        reach = max(-low, high) * sum(1 << bits * t for t in range(len(x)))
        return b.dot("gk,g->k", np.stack(parts), far, (-reach, reach))

    def _total(self, terms: list[tuple[Ids, Values]], bounds: tuple[int, int]) -> Ids:
        left = np.stack([ids for ids, _ in terms])
        right = self.builder.constant(np.stack([coefficients for _, coefficients in terms]))
        return self.builder.dot("kj,kj->j", left, right, bounds)


class _Projection:
    """sum_t weights[t] (x W^T + b)[t, :] of a tensor x, made once for all slices of the outputs."""

    def __init__(self, source: Value, name: str, weight: IntArray, bias: IntArray) -> None:
        self.source = source
        self.name = name
        self.weight = weight
        self.bias = bias
        self._sums: dict[bytes, Ids] = {}

    def over_time(self, weights: Ids) -> Ids:
        """Random cells [J]."""
        key = weights.tobytes()
        if key not in self._sums:
            b = self.source.builder
            with b.part(self.name):
                x = self.source.over_time(weights)
                terms = combine_columns(b, x, self.weight)
                left, right = (np.stack(parts) for parts in zip(*terms, strict=True))
                sums = np.empty(len(self.weight), dtype=np.int64)
                # Rows without a bias are spared the term, which may cost two cells.
                biased = self.bias != 0
                if (~biased).any():
                    sums[~biased] = b.dot("kj,kj->j", left[:, ~biased], b.constant(right[:, ~biased]))
                if biased.any():
                    once = np.broadcast_to(b.total_weight(weights), (1, biased.sum()))
                    left = np.concatenate([left[:, biased], once])
                    right = np.concatenate([right[:, biased], self.bias[None, biased].astype(object)])
                    sums[biased] = b.dot("kj,kj->j", left, b.constant(right))
                self._sums[key] = sums
        return self._sums[key]


class ProjectedValue(Claimed):
    """x W^T + b of a tensor with time axis, [T, J], or a slice of its columns, claimed.

    Element (t, j) weighs alpha^(s j + t) for some s >= T: over t the sum is W applied to sum_t alpha^t x_t,
    so every row of W is read once, however many steps there are.
    """

    def __init__(self, projection: _Projection, name: str, tensor: TensorType, start: int, stop: int) -> None:
        super().__init__(projection.source.builder, name, tensor)
        self._projection = projection
        self._columns = slice(start, stop)

    def grid(self) -> Grid:
        steps, outputs = self.type.shape
        return Grid(np.transpose, *self.builder.weights(outputs, steps))

    def total(self) -> list[tuple[Ids, int]]:
        grid = self.grid()
        return [(self.builder.dot("aj,j->a", self.over_time(grid.columns)[None], grid.rows), 1)]

    def exact(self, get: Get) -> Values:
        p = self._projection
        values: Values = p.source.honest(get) @ p.weight[self._columns].T + p.bias[self._columns]
        return values

    def _over_time(self, weights: Ids) -> Ids:
        return self._projection.over_time(weights)[self._columns]

    def sliced(self, name: str, tensor: TensorType, start: int, stop: int) -> Value:
        if self._cells is not None:
            return super().sliced(name, tensor, start, stop)
        first = self._columns.start
        return ProjectedValue(self._projection, name, tensor, first + start, first + stop)


def direct(source: Value, weight: IntArray, bias: IntArray | None, tensor: TensorType) -> Accumulation:
    """x W^T + b as plain dots: K cells for every output, or fewer where ternary rows share sums."""
    b, x = source.builder, source.cells()
    if x.ndim == 1:
        terms = combine_columns(b, x, weight)
        if bias is not None and bias.any():
            terms.append((np.broadcast_to(b.constant([1]), (len(weight),)), bias.astype(object)))
        stacked, signs = (np.stack(parts) for parts in zip(*terms, strict=True))
        return Accumulation(stacked, lambda m: b.constant(signs * m), (0,), tensor.low, tensor.high)
    outputs, inputs = weight.shape
    left = np.broadcast_to(np.moveaxis(x, -1, 0)[..., None], (inputs, *x.shape[:-1], outputs))
    rows = weight.T.astype(object)
    if bias is not None and bias.any():
        ones = b.constant(np.ones(1, dtype=object))
        left = np.concatenate([left, np.broadcast_to(ones, (1, *left.shape[1:]))])
        rows = np.concatenate([rows, bias.astype(object)[None]])
    return Accumulation(left, lambda m: b.constant(rows * m), (x.ndim - 1,), tensor.low, tensor.high)


def combine_columns(b: Cells, x: Ids, weight: IntArray) -> list[tuple[Ids, Values]]:
    """x W^T as few terms (cells [J], coefficients [J]) as pay.

    A ternary row reads, of every four neighbours, one of the sums and differences of pairs of pairs; each
    such sum is one cell shared by all rows. Other weights, and rows too few to share, read every x.

    Args:
        x: cells [K]. weight: [J, K].
    """
    outputs, inputs = weight.shape
    plain = [(np.broadcast_to(x[i : i + 1], (outputs,)), weight[:, i].astype(object)) for i in range(inputs)]
    if inputs < 4 or not set(np.unique(weight).tolist()) <= {-1, 0, 1}:
        return plain
    sums = _PairSums(x, weight)
    if sums.cost + outputs * (-(-inputs // 4)) >= outputs * inputs:
        return plain
    return sums.emit(b)


class _PairSums:
    """Which sums of pairs of pairs the rows of a ternary matrix need.

    A quad's four weights, up to sign, are one *form*: (first pair, second pair, their relation). A pair is
    one x, or x_a + x_b, or x_a - x_b.
    """

    def __init__(self, x: Ids, weight: IntArray) -> None:
        self.x = x
        padded = np.zeros((len(weight), -(-weight.shape[1] // 4) * 4), np.int64)
        padded[:, : weight.shape[1]] = weight
        quads = padded.reshape(len(weight), -1, 4)
        # The sign of a form is that of its first non-zero weight, so that each form is built once.
        first = np.take_along_axis(quads, (quads != 0).argmax(-1)[..., None], -1)[..., 0]
        self.signs = np.where(first == 0, 0, first)
        self.forms = quads * self.signs[..., None]
        self.quads: set[tuple[int, ...]] = set()
        self.pairs: set[tuple[int, int, int]] = set()
        for g in range(quads.shape[1]):
            for form in np.unique(self.forms[:, g], axis=0).tolist():
                self._need(g, form)
        self.cost = len(self.quads) + len(self.pairs)

    def _need(self, g: int, form: list[int]) -> None:
        for p in (0, 2):
            if form[p] and form[p + 1]:
                self.pairs.add((4 * g + p, form[p] * form[p + 1], 0))
        if any(form[:2]) and any(form[2:]):
            self.quads.add((g, *form))

    def emit(self, b: Cells) -> list[tuple[Ids, Values]]:
        """The terms: one per quad."""
        pairs = self._sums(b, sorted(self.pairs), lambda key: (self.x[key[0]], self.x[key[0] + 1], key[1]))

        def pair(g: int, form: tuple[int, ...], p: int) -> tuple[int, int]:
            """Cell and sign of half a quad."""
            i = 4 * g + p
            if form[p] and form[p + 1]:
                return pairs[(i, form[p] * form[p + 1], 0)], form[p]
            return (int(self.x[i]), form[p]) if form[p] else (int(self.x[i + 1]), form[p + 1])

        def halves(key: tuple[int, ...]) -> tuple[int, int, int]:
            (left, ls), (right, rs) = pair(key[0], key[1:], 0), pair(key[0], key[1:], 2)
            return left, right, ls * rs

        quads = self._sums(b, sorted(self.quads), halves)
        terms = []
        for g in range(self.forms.shape[1]):
            ids = np.empty(len(self.forms), dtype=np.int64)
            for j, row in enumerate(self.forms[:, g].tolist()):
                form = tuple(row)
                if any(form[:2]) and any(form[2:]):
                    ids[j] = quads[(g, *form)]
                elif any(form):
                    ids[j] = pair(g, form, 0 if any(form[:2]) else 2)[0]
                else:
                    ids[j] = self.x[min(4 * g, len(self.x) - 1)]
            terms.append((ids, self.signs[:, g].astype(object)))
        return terms

    @staticmethod
    def _sums(
        b: Cells, keys: list[tuple[int, ...]], parts: Callable[[tuple[int, ...]], tuple[int, int, int]]
    ) -> dict[tuple[int, ...], int]:
        """Emit left + right, or left - right, for every key: one batch of each."""
        made: dict[tuple[int, ...], int] = {}
        for sign, emit in ((1, b.add), (-1, b.sub)):
            chosen = [(key, *parts(key)[:2]) for key in keys if parts(key)[2] == sign]
            if chosen:
                left = np.array([c[1] for c in chosen], dtype=np.int64)
                right = np.array([c[2] for c in chosen], dtype=np.int64)
                made.update(zip((c[0] for c in chosen), emit(left, right).tolist(), strict=True))
        return made


def linear(source: Value, name: str, tensor: TensorType, weight: IntArray, bias: IntArray | None) -> Value:
    """The gadget of ``linear``: packed or claimed over the time axis if there is one, else plain dots."""
    if len(tensor.shape) == 2:
        if source.builder.challenged:
            projection = _Projection(
                source, name, weight, bias if bias is not None else np.zeros(len(weight), np.int64)
            )
            return ProjectedValue(projection, name, tensor, 0, len(weight))
        return LinearValue(source, name, tensor, weight, bias)
    return Summed(source.builder, name, tensor, lambda: direct(source, weight, bias, tensor))

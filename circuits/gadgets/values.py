"""Values of the integer graph inside the circuit, made into cells only when, and as, a consumer asks.

Every gadget keeps one promise: its cells equal the integer graph's tensor for *every* witness the
constraints admit. So the graph's proven intervals hold for them, and no sum of them wraps in the field.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from circuits.cells import Cells, CircuitTooNarrow, Get, Ids, Values
from mamba_int.graph import TensorType
from mamba_int.operations.base import rounding_shift

LETTERS = "abcdefgh"

Hint = Callable[[Get], Values]
"""Computes honest values of private cells."""


@dataclass(frozen=True)
class Accumulation:
    """sum_k left[k, ...] * right[k, ...]: one dot for each element, not yet emitted.

    Attributes:
        left: cells [K, *shape].
        right: given a power of two m, cells of m * right, [K, *axes].
        axes: which axes of ``shape`` the right side has, such as (1,) for one weight per channel.
        low, high: proven bounds of the sums.
    """

    left: Ids
    right: Callable[[int], Ids]
    axes: tuple[int, ...]
    low: int
    high: int

    @property
    def equation(self) -> str:
        """Einsum of the dot, ``k`` being summed."""
        shape = LETTERS[: self.left.ndim - 1]
        return f"k{shape},k{''.join(shape[a] for a in self.axes)}->{shape}"

    def emit(self, cells: Cells) -> Ids:
        """The sums as cells."""
        return cells.dot(self.equation, self.left, self.right(1), (self.low, self.high))


class Value(ABC):
    """A tensor of the integer graph on its way into the circuit.

    Attributes:
        name: of the graph's node.
        type: its shape and proven interval.
        pointer: one-hot rows that point at its elements, once a table has made them.
    """

    def __init__(self, cells: Cells, name: str, tensor: TensorType) -> None:
        self.builder = cells
        self.name = name
        self.type = tensor
        self.pointer: Ids | None = None
        self._cells: Ids | None = None
        self._sums_over_time: dict[bytes, Ids] = {}

    def cells(self) -> Ids:
        """The tensor as cells, made on first use."""
        if self._cells is None:
            with self.builder.part(self.name):
                self._cells = self._emit()
        return self._cells

    @abstractmethod
    def _emit(self) -> Ids:
        """Make the cells."""

    def honest(self, get: Get) -> Values:
        """Honest values, for the hints of consumers."""
        return get(self.cells())

    def accumulation(self) -> Accumulation:
        """The tensor as a sum of products, for a consumer that adds terms of its own."""
        ids = self.cells()[None]
        return Accumulation(ids, lambda m: self.builder.constant([m]), (), self.type.low, self.type.high)

    def shifted(self, name: str, tensor: TensorType, places: int) -> Value:
        """The tensor after the rounding shift by ``places`` > 0."""
        return Shifted(self, name, tensor, places)

    def over_time(self, weights: Ids) -> Ids:
        """sum_t weights[t] x[t, c] of a tensor [T, C], as random cells [C].

        Made once for the same weights; a view of them may be longer than T.
        """
        key = weights.tobytes()
        if key not in self._sums_over_time:
            with self.builder.part(self.name):
                self._sums_over_time[key] = self._over_time(weights)
        return self._sums_over_time[key]

    def _over_time(self, weights: Ids) -> Ids:
        x = self.cells()
        return self.builder.dot("tc,t->c", x, weights[: len(x)])

    def sliced(self, name: str, tensor: TensorType, start: int, stop: int) -> Value:
        """Elements of the last axis."""
        return Computed(self.builder, name, tensor, lambda: self.cells()[..., start:stop])

    def relu(self) -> Ids:
        """max(x, 0)."""
        return self.builder.relu(self.cells())

    def clamp(self, low: int, high: int) -> Ids:
        """min(max(x, low), high)."""
        b = self.builder
        if not b.fits(self.type.low - low, self.type.high - low):
            return wide_clamp(self, low, high)
        above = b.relu(b.sub(self.cells(), b.constant([low]))) if low else self.relu()
        return clamp_from_zero(b, above, self.type, low, high)


def clamp_from_zero(b: Cells, above: Ids, tensor: TensorType, low: int, high: int) -> Ids:
    """From a = ``above`` = max(x - low, 0), the clamp to [low, high]: a - max(a - (high - low), 0) + low."""
    if tensor.high > high:
        over = b.relu(b.sub(above, b.constant([high - low])))
        above = b.sub(above, over)
    return b.add(above, b.constant([low])) if low else above


class Computed(Value):
    """A tensor whose cells a function makes."""

    def __init__(self, cells: Cells, name: str, tensor: TensorType, emit: Callable[[], Ids]) -> None:
        super().__init__(cells, name, tensor)
        self._make = emit

    def _emit(self) -> Ids:
        return self._make()


class Summed(Value):
    """A tensor that is a sum of products: emitted as one dot, or extended by its consumer."""

    def __init__(
        self, cells: Cells, name: str, tensor: TensorType, accumulate: Callable[[], Accumulation]
    ) -> None:
        super().__init__(cells, name, tensor)
        self._accumulate = accumulate

    def accumulation(self) -> Accumulation:
        with self.builder.part(self.name):
            return self._accumulate()

    def _emit(self) -> Ids:
        return self._accumulate().emit(self.builder)


class Combination(Value):
    """sum_i coefficient_i * tensor_i with integer coefficients: additions, left shifts, sums over time."""

    def __init__(
        self, cells: Cells, name: str, tensor: TensorType, terms: Callable[[], list[tuple[Ids, int]]]
    ) -> None:
        super().__init__(cells, name, tensor)
        self._make = terms
        self._terms: list[tuple[Ids, int]] | None = None

    def terms(self) -> list[tuple[Ids, int]]:
        """Cells and their coefficients."""
        if self._terms is None:
            self._terms = self._make()
        return self._terms

    def accumulation(self) -> Accumulation:
        left = np.stack([ids for ids, _ in self.terms()])
        coefficients = np.array([c for _, c in self.terms()], dtype=object)

        def right(m: int) -> Ids:
            return self.builder.constant(coefficients * m)

        return Accumulation(left, right, (), self.type.low, self.type.high)

    def _emit(self) -> Ids:
        b, terms = self.builder, self.terms()
        (first, c0), rest = terms[0], terms[1:]
        if not rest:
            return first if c0 == 1 else b.mul(first, b.constant([c0]))
        if len(rest) == 1 and c0 == 1 and abs(rest[0][1]) == 1:
            return b.add(first, rest[0][0]) if rest[0][1] == 1 else b.sub(first, rest[0][0])
        return self.accumulation().emit(b)


@dataclass(frozen=True)
class Grid:
    """Weights of the elements of a tensor in a claim: element (i, j) of the matrix weighs rows[i] columns[j].

    Attributes:
        matrix: a view of the tensor's shape as [rows, columns].
        rows, columns: random cells; all their products are distinct powers of alpha.
    """

    matrix: Callable[[Ids], Ids]
    rows: Ids
    columns: Ids


class Claimed(Value):
    """A tensor that is a sum of products, checked as a whole at a random point instead of element by element.

    What the tensor is made of (itself, or quotient and remainder of its shift) is private; the claim is that
    the sum over all elements, each times its own power of alpha, is that of the products. So the elements are
    the sums of products, as field elements, and no lookup is needed for that. In a shift, both quotient and
    remainder are looked up as before.
    """

    _products: list[tuple[Ids, int]] | None = None

    @abstractmethod
    def grid(self) -> Grid:
        """Weights of the elements."""

    @abstractmethod
    def total(self) -> list[tuple[Ids, int]]:
        """Parts of a claim (random cell, coefficient) that add up to all elements times their weights."""

    @abstractmethod
    def exact(self, get: Get) -> Values:
        """Honest values."""

    def honest(self, get: Get) -> Values:
        return self.exact(get) if self._cells is None else get(self._cells)

    def _emit(self) -> Ids:
        self.products()
        x = self.builder.private(
            f"{self.name}.values", self.type.shape, self.type.low, self.type.high, self.exact
        )
        self.settle([(x, 1)], 0, 1)
        return x

    def products(self) -> list[tuple[Ids, int]]:
        """:meth:`total`, made once; to be called before private cells whose hints need the operands."""
        if self._products is None:
            self._products = self.total()
        return self._products

    def settle(self, limbs: list[tuple[Ids, int]], constant: int, m: int) -> None:
        """Claim that sum_i coefficient_i limbs_i + constant is m times the tensor, element by element."""
        b, grid = self.builder, self.grid()
        sums = [b.dot("ij,j->i", grid.matrix(ids), grid.columns) for ids, _ in limbs]
        left = b.dot("ki,i->k", np.stack(sums), grid.rows)
        parts = [(left[i], c) for i, (_, c) in enumerate(limbs)]
        if constant:
            parts.append((b.mul(b.total_weight(grid.columns), b.total_weight(grid.rows)), constant))
        b.claim(parts + [(ids, -m * c) for ids, c in self.products()])


class Shifted(Value):
    """q = floor((x + 2^(s-1)) / 2^s), the rounding shift.

    q is private, looked up as itself (alone, or through the relu that consumes it), so it is an integer of
    the table. rho = m (x - 2^s q) with m = 2^(k-s) is looked up too: its window m 2^s = 2^k is wider than
    the table, so for a given bounded integer x one q fits; since the table starts at -2^(k-1), it is the
    rounding one. Shifts beyond k - 4 split the remainder: x - 2^(a-1) = 2^s q + 2^a h + l with both h and l
    checked against windows of exactly 2^(s-a) and 2^a. A q too wide for the table is two limbs as well, the
    lower one checked against a window of exactly its size.
    """

    def __init__(self, source: Value, name: str, tensor: TensorType, places: int) -> None:
        super().__init__(source.builder, name, tensor)
        self._source = source
        self._places = places

    def _quotient(self, offset: int) -> Ids:
        """q - offset as private cells, constrained but not yet looked up as itself."""
        b, k, s = self.builder, self.builder.window, self._places
        fine = min(s, k - 4)
        coarse = s - fine
        if coarse > k - 4:
            raise CircuitTooNarrow(f"{self.name} (a shift by {s})", 1 << (s // 2 + 3))
        m = b.scale(fine)
        if isinstance(self._source, Claimed):
            self._source.products()
            shape, exact = self.type.shape, self._source.exact
        else:
            accumulation = self._source.accumulation()
            shape, right = accumulation.left.shape[1:], accumulation.right(m)

            def exact(get: Get) -> Values:
                total: Values = np.einsum(accumulation.equation, get(accumulation.left), get(right))
                return total // m

        def quotient(get: Get) -> Values:
            return rounding_shift(exact(get), s) - offset

        q, limbs = self._whole_or_split(quotient, shape, offset, m << s)
        constant = (m << s) * offset
        if coarse:
            half = 1 << (coarse - 1)

            def limb(get: Get) -> Values:
                rest: Values = exact(get) - ((get(q) + offset) << s) + (1 << (s - 1))
                return (rest >> fine) - half

            h = b.check(b.private(f"{self.name}.h", shape, -half, half - 1, limb))
            b.check(b.mul(h, b.constant([1 << (k - coarse)])))
            limbs.append((h, m << fine))
            constant += m << (fine - 1)
        window = m << (fine - 1)
        bounds = (-window, window - m)
        if isinstance(self._source, Claimed):

            def remainder(get: Get) -> Values:
                rest: Values = m * exact(get) - constant
                for ids, c in limbs:
                    rest = rest - get(ids) * c
                return rest

            rho = b.private(f"{self.name}.rho", shape, *bounds, remainder)
            self._source.settle([*limbs, (rho, 1)], constant, m)
        else:
            lefts = [accumulation.left, *(ids[None] for ids, _ in limbs)]
            rights = [right, *(self._row(right, -c) for _, c in limbs)]
            if constant:
                lefts.append(np.broadcast_to(b.constant(np.ones(1, dtype=object)), (1, *shape)))
                rights.append(self._row(right, -constant))
            rho = b.dot(accumulation.equation, np.concatenate(lefts), np.concatenate(rights), bounds)
        b.check(rho)
        return q

    def _whole_or_split(
        self, quotient: Hint, shape: tuple[int, ...], offset: int, unit: int
    ) -> tuple[Ids, list[tuple[Ids, int]]]:
        """q as cells, and as limbs with their coefficients in the remainder's equation."""
        b, k = self.builder, self.builder.window
        low, high = self.type.low - offset, self.type.high - offset
        if b.fits(low, high):
            q = b.private(f"{self.name}.q", shape, low, high, quotient)
            return q, [(q, unit)]
        # The lower limb has a signed window of exactly 2^c, the upper one what is left.
        c = max(-low, high).bit_length() - (k - 2)
        if c > k - 4 or offset:
            raise CircuitTooNarrow(self.name, max(-low, high))
        half = 1 << (c - 1)
        upper_low, upper_high = (low + half) >> c, (high + half) >> c

        def upper(get: Get) -> Values:
            limb: Values = (quotient(get) + half) >> c
            return limb

        top = b.check(b.private(f"{self.name}.q1", shape, upper_low, upper_high, upper))

        def lower(get: Get) -> Values:
            limb: Values = quotient(get) - (get(top) << c)
            return limb

        rest = b.check(b.private(f"{self.name}.q0", shape, -half, half - 1, lower))
        b.check(b.mul(rest, b.constant([1 << (k - c)])))
        q = b.add(b.mul(top, b.constant([1 << c])), rest)
        return q, [(top, unit << c), (rest, unit)]

    def _row(self, right: Ids, value: int) -> Ids:
        return np.broadcast_to(self.builder.constant([value]), (1, *right.shape[1:]))

    def _emit(self) -> Ids:
        q = self._quotient(0)
        return self.builder.check(q) if self._fits else q

    @property
    def _fits(self) -> bool:
        return self.builder.fits(self.type.low, self.type.high)

    def relu(self) -> Ids:
        with self.builder.part(self.name):
            if self._cells is None:
                self._cells = self._quotient(0)
        return self.builder.relu(self._cells)

    def clamp(self, low: int, high: int) -> Ids:
        b = self.builder
        if self._cells is not None or low == 0 or not b.fits(self.type.low - low, self.type.high - low):
            return super().clamp(low, high)
        # Guess q - low instead of q: then the lookup of the clamp is its range check as well.
        with b.part(self.name):
            shifted = self._quotient(low)
        return clamp_from_zero(b, b.relu(shifted), self.type, low, high)


def check_range(b: Cells, ids: Ids, low: int, high: int) -> Ids:
    """Prove cells integers in low..high, each looked up as itself.

    One multiplied lookup does when m (v - low) + table_low leaves the table exactly beyond ``high``;
    otherwise two, one for either end.
    """
    b.check(ids)
    if b.proves(ids, low, high):
        return ids
    if b.tight:
        # The check just made proves the lower end, and one of high - v proves the upper.
        least, most = b.bounds(ids)
        if least < low or most > high:
            raise ValueError(f"cells declared in {least}..{most} are to be proven in {low}..{high}")
        b.check(b.sub(b.constant([high]), ids))
        return ids
    room, width = b.high - b.low, high - low
    if width > room:
        raise CircuitTooNarrow(f"a range of {width}", width)
    m = room // width if width else room + 1
    if room < m * (width + 1):
        offset = m * low - b.low
        scaled = b.mul(ids, b.constant([m])) if m > 1 else ids
        b.check(b.sub(scaled, b.constant([offset])) if offset else scaled)
    else:
        b.check(b.sub(ids, b.constant([low - b.low])))
        b.check(b.add(ids, b.constant([b.high - high])))
    return ids


def nonnegative(b: Cells, name: str, terms: list[tuple[Ids, int]], constant: int, high: int) -> None:
    """Prove sum_i coefficient_i terms_i + constant >= 0, for bounded integers and a sum at most ``high``.

    The sum equals r + 2^(k-1) sum_i 2^(i (k-2)) a_i with every a_i >= 0 (through relu) and r in [0, 2^k - 9].
    Limbs are not unique, but decide nothing else. Honest limbs but the highest have k - 2 bits: the table
    ends 9 short of k - 1. Where checks are tight, one of the sum itself proves it to be from 0 upwards.
    """
    k, shape = b.window, terms[0][0].shape
    letters = LETTERS[: len(shape)]

    def ones() -> Ids:
        return np.broadcast_to(b.constant(np.ones(1, dtype=object)), shape)

    if b.tight:
        terms = [*terms, (ones(), constant)] if constant else terms
        weights = b.constant(np.array([c for _, c in terms], dtype=object))
        stacked = np.stack([ids for ids, _ in terms])
        b.check(b.dot(f"k{letters},k->{letters}", stacked, weights, (0, high)))
        return
    coefficients = [c for _, c in terms]

    def total(get: Get) -> Values:
        parts = [get(ids) * c for ids, c in terms]
        result: Values = sum(parts[1:], parts[0]) + constant
        return result

    lefts, rights = [ids for ids, _ in terms], list(coefficients)
    places = [k - 1]
    while high >> places[-1] > b.high:
        places.append(places[-1] + k - 2)
    for i, place in enumerate(places):
        top = i == len(places) - 1

        def limb(get: Get, place: int = place, top: bool = top) -> Values:
            value: Values = np.maximum(total(get), 0) >> place
            return value if top else value & ((1 << (k - 2)) - 1)

        most = high >> place if top else (1 << (k - 2)) - 1
        a = b.relu(b.private(f"{name}.limb{i}", shape, 0, most, limb))
        lefts.append(a)
        rights.append(-(1 << place))
    if constant - (1 << (k - 1)):
        lefts.append(ones())
        rights.append(constant - (1 << (k - 1)))
    rest = b.dot(
        f"k{letters},k->{letters}",
        np.stack(lefts),
        b.constant(np.array(rights, dtype=object)),
        (b.low, (1 << (k - 1)) - 9),
    )
    b.check(rest)


def wide_clamp(value: Value, low: int, high: int) -> Ids:
    """The clamp of an x beyond the table: y in low..high with x = y + over - under, over, under >= 0,
    over (high - y) = 0 and under (y - low) = 0.

    over and under are two checked limbs each, of k - 2 bits so that the lookup table, which ends 9 short of
    k - 1, holds them. Everything is a bounded integer, and 2^k times an integer is in the table only if it is
    zero: that is how the three equations are enforced.
    """
    b, x, tensor = value.builder, value.cells(), value.type
    zero_or_out, limb_size = 1 << b.window, 1 << (b.window - 2)
    y = b.private(f"{value.name}.clamped", x.shape, low, high, lambda get: np.clip(get(x), low, high))
    check_range(b, y, low, high)
    parts = [(x, 1), (y, -1)]
    for name, sign, end, reach in (
        ("over", 1, high, tensor.high - high),
        ("under", -1, low, low - tensor.low),
    ):
        if reach <= 0:
            continue

        def limb(get: Get, which: int, sign: int = sign, end: int = end) -> Values:
            excess = np.maximum(sign * (get(x) - end), 0)
            part: Values = excess // limb_size if which else excess % limb_size
            return part

        coarse, fine = (
            b.relu(b.private(f"{value.name}.{name}{i}", x.shape, 0, most, partial(limb, which=i)))
            for i, most in ((1, reach // limb_size), (0, limb_size - 1))
        )
        excess = b.add(b.mul(coarse, b.constant([limb_size])), fine)
        gap = b.mul(b.sub(y, b.constant([end])), b.constant([zero_or_out]))
        b.check(b.mul(excess, gap, bounds=(0, 0)))
        parts.append((excess, -sign))
    letters = LETTERS[: x.ndim]
    coefficients = b.constant(np.array([c * zero_or_out for _, c in parts], dtype=object))
    b.check(b.dot(f"k{letters},k->{letters}", np.stack([ids for ids, _ in parts]), coefficients, (0, 0)))
    return y

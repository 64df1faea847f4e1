"""The constraint graph: cells, the five things that can make one, and the free reshuffling between them.

Every gadget is written over arrays of *cell ids*. Rearranging cells (reshape, transpose, slice, repeat) costs
nothing in the circuit, so it is plain NumPy indexing of ids here; :mod:`circuits.constraint_onnx` turns the
views into Concat, Gather and Reshape. What costs cells, at EZKL's ``num_inner_cols`` of 2:

=============  ==================================================================
private        1 each
add, sub, mul  1 each
dot            its length, rounded up to even, for each output
relu           1 each: a lookup in the signed identity table, so also a range check
check          1 each: the same lookup where the output is not needed
claim          1 each: a cell that must be zero
=============  ==================================================================

**Challenges.** In a *challenged* graph all private cells are committed to before a random field element
alpha is known (Fiat-Shamir, see ``zk.challenge``). Then an identity between sums of products of private cells
can be checked at the powers of alpha instead of element by element: if it fails for one element, the
combination with distinct powers vanishes for at most as many alphas as its degree, out of 2^253
(Schwartz-Zippel). Cells computed from alpha are *random*: they have no bounds, meet no lookup and serve
claims only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuits.circuit import table_high, table_low

Ids = NDArray[np.int64]
"""An array of cell ids, any shape."""

Values = NDArray[Any]
"""An array of integers: int64, or Python integers (dtype object) where 62 bits do not suffice."""

Get = Callable[[Ids], Values]
"""Gives the values of cells; hints receive one."""

FIELD = 21888242871839275222246405745257275088548364400416034343698204186575808495617
"""The prime of BN254's scalar field, in which the circuit computes."""

CHALLENGE = "challenge"
"""Name of the public value that shows alpha, and of the part its powers are booked under."""

SMALLEST_STRIDE = 16
"""Between the powers of alpha that weigh neighbouring rows."""

SMALL = 1 << 62
FLOAT_MANTISSA = 24
"""Bits of an integer that float32 holds, whatever its magnitude up to 2^127."""


class CircuitTooNarrow(Exception):
    """A value does not fit the lookup table of this many rows: more rows are needed.

    Attributes:
        name: of the tensor.
        magnitude: what the table would have to hold.
    """

    def __init__(self, name: str, magnitude: int) -> None:
        super().__init__(f"'{name}' can reach {magnitude}")
        self.name = name
        self.magnitude = magnitude


def float_parts(values: Values) -> list[Values]:
    """Integers as a sum of as few arrays as possible that float32 holds exactly.

    ONNX lets EZKL see constants as float32 only: each part has the next 24 leading bits.
    """
    rest = np.asarray(values, dtype=object)
    parts: list[Values] = []
    while not parts or rest.any():
        part = np.vectorize(_leading_bits, otypes=[object])(rest)
        parts.append(part)
        rest = rest - part
    return parts


def _leading_bits(value: int) -> int:
    spare = max(0, abs(value).bit_length() - FLOAT_MANTISSA)
    part = abs(value) >> spare << spare
    return part if value >= 0 else -part


@dataclass(frozen=True)
class Base:
    """One tensor of new cells.

    Attributes:
        op: ``private``, ``challenge``, ``constant``, ``add``, ``sub``, ``mul``, ``dot`` or ``relu``.
        name: unique; of private tensors also the ONNX input.
        first: id of its first cell. shape: its shape.
        low, high: proven bounds of every cell.
        operands: views the operation reads.
        equation: of a dot.
        hint: of a private tensor: computes its honest values.
        constant: values of a constant tensor.
        random: whether it depends on the challenge; then the bounds mean nothing.
    """

    op: str
    name: str
    first: int
    shape: tuple[int, ...]
    low: int
    high: int
    operands: tuple[Ids, ...] = ()
    equation: str = ""
    hint: Callable[[Get], Values] | None = None
    constant: Values | None = None
    random: bool = False

    @property
    def size(self) -> int:
        """Number of cells."""
        return math.prod(self.shape)

    @property
    def magnitude(self) -> int:
        """Largest possible absolute value."""
        return max(abs(self.low), abs(self.high))


class Cells:
    """A constraint graph under construction.

    Args:
        window: k; the lookup table is the signed identity on ``table_low(k)..table_high(k)``.
        challenged: whether gadgets may use :meth:`powers` and :meth:`claim`.

    Attributes:
        window: bits of the range that holds every checked cell.
        low, high: its ends: a checked cell is an integer in low..high.
        tight: whether a check proves a cell's own bounds instead of low..high: exactly the lower one, and as
            many values from there as the next power of two.
    """

    tight = False

    def __init__(self, window: int, challenged: bool = False) -> None:
        self.window = window
        self.challenged = challenged
        self.claims: list[Ids] = []
        self._progressions: dict[int, Ids] = {}
        self._power: dict[int, Ids] = {}
        self.low, self.high = table_low(window), table_high(window)
        self.bases: list[Base] = []
        self.cost: dict[str, Counter[str]] = {}
        self._firsts: list[int] = []
        self._next = 0
        self._part = "input"
        self._checked: set[int] = set()
        self._pending: dict[int, str] = {}
        self._relus: dict[bytes, Ids] = {}
        self._names: Counter[str] = Counter()

    # -- bookkeeping -------------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book the cells made inside the block under ``name``."""
        outer, self._part = self._part, name
        try:
            yield
        finally:
            self._part = outer

    def _count(self, kind: str, cells: int, part: str | None = None) -> None:
        self.cost.setdefault(part or self._part, Counter())[kind] += cells

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}#{self._names[name]}"

    def _new(self, op: str, name: str, shape: tuple[int, ...], low: int, high: int, **fields: Any) -> Ids:
        base = Base(op, self._unique(name), self._next, shape, low, high, **fields)
        if base.magnitude >= FIELD // 4:
            raise ValueError(
                f"{name} can reach {base.magnitude.bit_length()} bits and would wrap in the field"
            )
        self.bases.append(base)
        self._firsts.append(self._next)
        self._next += base.size
        return np.arange(base.first, base.first + base.size, dtype=np.int64).reshape(shape)

    def base_of(self, ids: Ids) -> list[Base]:
        """The base tensors that a view draws on, in order of creation."""
        return [self.bases[i] for i in np.unique(np.searchsorted(self._firsts, ids.ravel(), "right") - 1)]

    def bounds(self, ids: Ids) -> tuple[int, int]:
        """Proven bounds of all cells of a view."""
        bases = self.base_of(ids)
        if any(base.random for base in bases):
            raise ValueError("a cell that depends on the challenge has no bounds")
        return min(base.low for base in bases), max(base.high for base in bases)

    def constant_values(self, ids: Ids) -> Values:
        """Values of a view of constant cells, as Python integers."""
        values = np.empty(ids.shape, dtype=object)
        for base in self.base_of(ids):
            assert base.constant is not None
            inside = (ids >= base.first) & (ids < base.first + base.size)
            values[inside] = base.constant.ravel()[ids[inside] - base.first]
        return values

    def _exact_parts(self, ids: Ids) -> list[Ids]:
        """A view of constants as views that float32 holds and that add up to it; any other view as it is."""
        if not self._are_constants(ids):
            return [ids]
        parts = float_parts(self.constant_values(ids))
        return [ids] if len(parts) == 1 else [self.constant(part) for part in parts]

    def _are_constants(self, *views: Ids) -> bool:
        return all(base.op == "constant" for ids in views for base in self.base_of(ids))

    def _all(self, ids: Ids, value: int) -> bool:
        """Whether a view holds nothing but this constant: EZKL would leave out x + 0 and x * 1."""
        return self._are_constants(ids) and bool((self.constant_values(ids) == value).all())

    def fits(self, low: int, high: int) -> bool:
        """Whether checks hold all of low..high."""
        return self.low <= low and high <= self.high

    def proves(self, a: Ids, low: int, high: int) -> bool:
        """Whether :meth:`check` alone proves that the cells of ``a`` are inside low..high."""
        return low <= self.low and self.high <= high

    def digit_bits(self, low: int, high: int) -> int:
        """Bits of a base in which checked cells with bounds low..high are unique digits."""
        return self.window

    def scale(self, bits: int) -> int:
        """m such that checking m y proves an integer y inside a signed window of exactly ``bits`` bits.

        The bounds of m y must be declared as those of the window: -m 2^(bits-1) to m (2^(bits-1) - 1).
        """
        return 1 << (self.window - bits)

    # -- cells -------------------------------------------------------------------------------------------

    def private(
        self, name: str, shape: tuple[int, ...], low: int, high: int, hint: Callable[[Get], Values]
    ) -> Ids:
        """Cells the prover chooses; ``hint`` computes the honest values, bounded by low..high.

        The bounds are *not* enforced by this alone: the gadget must check the cells and make them unique.
        """
        size = int(np.prod(shape, dtype=np.int64))

        def padded(get: Get) -> Values:
            return np.append(np.asarray(hint(get)).ravel(), 0)

        # An odd tensor gets a spare cell that nothing reads; see _even.
        odd = size % 2 == 1
        ids = self._new(
            "private", name, (size + 1,) if odd else shape, low, high, hint=padded if odd else hint
        )
        self._count("private", ids.size)
        return ids.ravel()[:size].reshape(shape)

    def constant(self, values: Any) -> Ids:
        """Cells with fixed values; they cost nothing until an operation reads them."""
        array = np.atleast_1d(np.asarray(values, dtype=object))
        return self._new(
            "constant", "constant", array.shape, int(array.min()), int(array.max()), constant=array
        )

    def _is_random(self, *views: Ids) -> bool:
        return any(base.random for ids in views for base in self.base_of(ids))

    def _corners(self, op: str, a: Ids, b: Ids) -> tuple[int, int]:
        (al, ah), (bl, bh) = self.bounds(a), self.bounds(b)
        apply: Callable[[int, int], int] = {
            "add": lambda p, q: p + q,
            "sub": lambda p, q: p - q,
            "mul": lambda p, q: p * q,
        }[op]
        corners = [apply(p, q) for p in (al, ah) for q in (bl, bh)]
        return min(corners), max(corners)

    def _binary(self, op: str, a: Ids, b: Ids, bounds: tuple[int, int] | None = None) -> Ids:
        random = self._is_random(a, b)
        low, high = (0, 0) if random else bounds or self._corners(op, a, b)
        shape = np.broadcast_shapes(a.shape, b.shape)
        size = int(np.prod(shape, dtype=np.int64))
        if size % 2:
            a, b = (_even(np.broadcast_to(ids, shape)) for ids in (a, b))
        shape_of_cells = (size + 1,) if size % 2 else shape
        ids = self._new(op, f"{self._part}/{op}", shape_of_cells, low, high, operands=(a, b), random=random)
        self._count(op, ids.size)
        return ids.ravel()[:size].reshape(shape)

    def add(self, a: Ids, b: Ids, bounds: tuple[int, int] | None = None) -> Ids:
        """a + b, broadcasting; ``bounds`` as in :meth:`dot`; a constant goes second."""
        if self._all(b, 0):
            return np.broadcast_to(a, np.broadcast_shapes(a.shape, b.shape))
        *parts, last = self._exact_parts(b)
        for part in parts:
            a = self._binary("add", a, part)
        return self._binary("add", a, last, bounds)

    def sub(self, a: Ids, b: Ids) -> Ids:
        """a - b, broadcasting; a constant goes first if it is exact in float32, second otherwise."""
        if self._all(b, 0):
            return np.broadcast_to(a, np.broadcast_shapes(a.shape, b.shape))
        for part in self._exact_parts(b):
            a = self._binary("sub", a, part)
        return a

    def mul(self, a: Ids, b: Ids, bounds: tuple[int, int] | None = None) -> Ids:
        """a * b, broadcasting; ``bounds`` as in :meth:`dot`; a constant goes second."""
        for one, other in ((b, a), (a, b)):
            if self._all(one, 1):
                return np.broadcast_to(other, np.broadcast_shapes(a.shape, b.shape))
        first, *rest = self._exact_parts(b)
        if not rest:
            return self._binary("mul", a, b, bounds)
        result = self._binary("mul", a, first)
        for part in rest:
            result = self._binary("add", result, self._binary("mul", a, part))
        return result

    def dot(self, equation: str, a: Ids, b: Ids, bounds: tuple[int, int] | None = None) -> Ids:
        """An Einsum of two operands whose summed indices appear in both.

        Args:
            equation: such as ``ktc,kc->tc``.
            a, b: the operands; a constant goes second.
            bounds: proven bounds of the result, where the gadget knows better than interval arithmetic.
        """
        left, out = equation.split("->")
        la, lb = left.split(",")
        size = dict(zip(la, a.shape, strict=True)) | dict(zip(lb, b.shape, strict=True))
        summed = [letter for letter in size if letter not in out]
        if not all(letter in la and letter in lb for letter in summed):
            raise ValueError(f"{equation}: a summed index is not in both operands")
        if self._are_constants(a, b):
            # EZKL would compute it once and for all.
            return self.constant(np.einsum(equation, self.constant_values(a), self.constant_values(b)))
        if all(size[letter] == 1 for letter in summed) and self._all(b, 1):
            # EZKL would leave it out.
            view: Ids = np.einsum(equation, a, np.ones_like(b))
            return view
        parts = self._exact_parts(b)
        if len(parts) > 1:
            # x (c1 + c2) = x c1 + x c2: the sum runs over the same x again with the rest of the constant.
            left_axis, right_axis = la.index(summed[0]), lb.index(summed[0])
            a = np.concatenate([a] * len(parts), left_axis)
            b = np.concatenate(parts, right_axis)
            size[summed[0]] *= len(parts)
        length = int(np.prod([size[letter] for letter in summed], dtype=np.int64))
        random = self._is_random(a, b)
        if random:
            bounds = (0, 0)
        elif bounds is None:
            reach = length * max(map(abs, self.bounds(a))) * max(map(abs, self.bounds(b)))
            bounds = (-reach, reach)
        shape = tuple(size[letter] for letter in out)
        name = f"{self._part}/dot"
        ids = self._new("dot", name, shape, *bounds, operands=(a, b), equation=equation, random=random)
        self._count("dot", ids.size * (length + length % 2))
        return ids

    def relu(self, a: Ids) -> Ids:
        """max(a, 0) by the lookup table, which also proves every cell of ``a`` an integer in the table."""
        key = a.tobytes() + str(a.shape).encode()
        if key not in self._relus:
            low, high = self.bounds(a)
            if not self.fits(low, high):
                raise CircuitTooNarrow(self._part, max(-low, high))
            read = _even(a) if a.size % 2 else a
            bounds = max(low, 0), max(high, 0)
            ids = self._new("relu", f"{self._part}/relu", read.shape, *bounds, operands=(read,))
            self._count("lookup", ids.size)
            self._relus[key] = ids.ravel()[: a.size].reshape(a.shape)
            self._checked.update(a.ravel().tolist())
        return self._relus[key]

    def check(self, a: Ids) -> Ids:
        """Prove every cell of ``a`` an integer in the table, where no :meth:`relu` does so already."""
        for cell in a.ravel().tolist():
            self._pending.setdefault(cell, self._part)
        return a

    # -- challenges --------------------------------------------------------------------------------------

    def _alpha(self) -> Ids:
        """alpha itself, [1]."""
        if 1 not in self._power:
            if not self.challenged:
                raise ValueError("this graph has no challenge")
            # Two cells: see _even. The second is left unused.
            ids = self._new("challenge", "alpha", (2,), 0, 0, random=True)
            self._count("private", 2, CHALLENGE)
            self._power[1] = ids[:1]
        return self._power[1]

    def power(self, exponent: int) -> Ids:
        """alpha^exponent, [1], by squaring and multiplying."""
        if exponent == 0:
            return self.constant([1])
        alpha = self._alpha()
        if exponent not in self._power:
            with self.part(CHALLENGE):
                half = self.power(exponent // 2)
                square = self.mul(half, half)
                self._power[exponent] = self.mul(square, alpha) if exponent % 2 else square
        return self._power[exponent]

    def powers(self, count: int, stride: int = 1) -> Ids:
        """alpha^0, alpha^stride, ..., alpha^((count - 1) stride)."""
        known = self._progressions.get(stride, self.constant([1]))
        while len(known) < count:
            with self.part(CHALLENGE):
                step = self.power(stride * len(known))
                more = known[: count - len(known)]
                # alpha^0 times the step is the step itself.
                products = self.mul(more[1:], step) if len(more) > 1 else more[:0]
                known = np.concatenate([known, step, products])
        self._progressions[stride] = known
        return known[:count]

    def weights(self, rows: int, columns: int) -> tuple[Ids, Ids]:
        """Weights of a matrix's rows and columns whose products are distinct powers of alpha.

        Row i weighs alpha^(i s) for a power of two s >= columns: few different s, so that claims of different
        width share the powers.
        """
        stride = max(SMALLEST_STRIDE, 1 << (columns - 1).bit_length())
        return self.powers(rows, stride), self.powers(columns)

    def claim(self, parts: list[tuple[Ids, int]]) -> None:
        """Claim that sum_i coefficient_i * cell_i = 0 in the field, every cell being a view of one cell."""
        left = np.concatenate([ids.reshape(1) for ids, _ in parts])
        right = self.constant(np.array([c for _, c in parts], dtype=object))
        self.claims.append(self.dot("ka,k->a", left[:, None], right))

    def total_weight(self, weights: Ids) -> Ids:
        """The sum of weights, [1]."""
        if len(weights) == 1:
            return weights
        return self.dot("ai,i->a", weights[None], np.broadcast_to(self.constant([1]), weights.shape))

    def close(self) -> dict[str, Ids]:
        """Emit all pending checks as one lookup; return two of its outputs, always 0, as ``anchor``.

        Lookups whose outputs nobody reads would be pruned, so two of them become public; they belong to
        constant cells and reveal nothing.
        """
        todo = [(cell, part) for cell, part in self._pending.items() if cell not in self._checked]
        zeros = self.constant(np.zeros(2, dtype=np.int64))
        ids = np.concatenate([zeros, np.array([cell for cell, _ in todo], dtype=np.int64)])
        low, high = self.bounds(ids)
        if not self.fits(low, high):
            worst = max(self.base_of(ids), key=lambda base: base.magnitude)
            raise CircuitTooNarrow(worst.name, worst.magnitude)
        for _, part in todo:
            self._count("lookup", 1, part)
        self._count("lookup", 2, "anchor")
        checked = self._new("relu", "checks", ids.shape, 0, max(high, 0), operands=(ids,))
        return {"anchor": checked[:2]}

    @property
    def total(self) -> int:
        """All cells so far."""
        return sum(sum(kinds.values()) for kinds in self.cost.values())

    # -- values ------------------------------------------------------------------------------------------

    def evaluate(
        self,
        inputs: Mapping[str, Values],
        lies: Mapping[str, Callable[[Values], Values]] | None = None,
        alpha: int | None = None,
    ) -> CellValues:
        """The honest value of every cell, or what a liar's would be.

        Args:
            inputs: values of private tensors that have no hint to go by, by name.
            lies: private tensor -> function from its honest values to those the liar gives instead.
            alpha: the challenge; without it cells that depend on it have no value.
        """
        values = CellValues(self)
        for base in self.bases:
            if base.random and alpha is None:
                continue
            if base.op == "challenge":
                array = np.array([alpha, 0], dtype=object)
            elif base.op == "private":
                given = (
                    inputs[base.name] if base.name in inputs else base.hint(values.get) if base.hint else None
                )
                if given is None:
                    raise ValueError(f"no value for {base.name}")
                array = np.asarray(given).ravel()
                array = np.append(array, [0] * (base.size - array.size)).reshape(base.shape)
                if lies and base.name in lies:
                    array = lies[base.name](array.astype(object).copy())
            elif base.op == "constant":
                assert base.constant is not None
                array = base.constant
            else:
                array = self._compute(base, values, exact=bool(lies))
            values.put(base, array)
        return values

    @staticmethod
    def _compute(base: Base, values: CellValues, exact: bool) -> Values:
        operands = [values.get(ids) for ids in base.operands]
        if exact or base.random or base.magnitude >= SMALL:
            operands = [operand.astype(object) for operand in operands]
        if base.op == "dot":
            result: Values = np.einsum(base.equation, *operands)
            result = np.asarray(result, dtype=operands[0].dtype)
            return result % FIELD if base.random else result
        if base.op == "relu":
            return np.where(operands[0] > 0, operands[0], 0)
        a, b = operands
        result = a + b if base.op == "add" else a - b if base.op == "sub" else a * b
        return result % FIELD if base.random else result


def _even(ids: Ids) -> Ids:
    """A flat view with its last cell once more.

    EZKL starts every dot on an even cell. Keeping all tensors even makes that free, and the count of cells
    independent of the order in which EZKL lays them out.
    """
    flat = ids.ravel()
    return np.append(flat, flat[-1])


class CellValues:
    """Values of the cells of one inference."""

    def __init__(self, cells: Cells) -> None:
        self._flat = np.zeros(cells._next, dtype=np.int64)
        self._large: dict[int, Values] = {}

    def put(self, base: Base, array: Values) -> None:
        """Record the values of a base tensor."""
        flat = np.asarray(array).reshape(-1)
        try:
            # Ten times as fast as asking every integer for its size.
            small = flat.astype(np.int64)
        except OverflowError:
            self._large[base.first] = flat
            return
        if flat.dtype == object and ((small >= SMALL) | (small <= -SMALL)).any():
            self._large[base.first] = flat
        else:
            self._flat[base.first : base.first + base.size] = small

    def get(self, ids: Ids) -> Values:
        """Values of a view, in its shape; dtype object only if some exceed 62 bits."""
        result: Values = self._flat[ids]
        for first, flat in self._large.items():
            inside = (ids >= first) & (ids < first + len(flat))
            if inside.any():
                result = result.astype(object)
                result[inside] = flat[ids[inside] - first]
        return result

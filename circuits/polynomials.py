"""Range checks by polynomial constraints instead of a lookup table.

A cell v with bounds low..high is proven an integer in low .. low + 2^u - 1, where u is the fewest bits that
hold the bounds. With digits D_p in {-3, -1, 1, 3} for every two bits, and R in {-4, 4} for a single one on
top,

    2 (v - low) - (2^u - 1) = sum_p 2^p D_p + 2^(u - 3) R,   p = 0, 2, 4, ...

and every value of the range has just one such sum. All digits but the lowest are private, and the lowest is
*computed* from v and them, so the sum holds by construction. D is one of the four if (D^2 - 5)^2 = 16: the
field has no zero divisors, so D^2 is 1 or 9, and only these four have such squares. R is one of its two if
R^2 = 16. Then the sum is an odd integer of at most 2^u - 1, so v is an integer, and inside the range.

The sign of a cell is its top bit g, with g (g - 1) = 0, in place of a digit; relu is g v. A range of one
value or of two needs no digits: v - low = 0, or (v - low) (v - low - 1) = 0.

What has to be 0 or 16 is shown as public outputs forced to these values or, in a challenged graph, summed up
with distinct powers of alpha, the whole sum being claimed.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from circuits.cells import Cells, CircuitTooNarrow, Get, Ids, Values, float_parts

WINDOW = 48
"""Bits of the widest range a check can prove; a check costs only the bits that its cell can reach."""
SQUARE = 16
"""What the square of every digit's residue is."""


def _bits(low: int, high: int) -> int:
    """Bits of the range that a check of a cell with these bounds proves."""
    return (high - low).bit_length()


class PolynomialCells(Cells):
    """A constraint graph without lookups: a check proves a cell's own bounds, rounded up to a power of two.

    Args:
        challenged: as in :class:`Cells`; the checks then make a claim or two instead of public outputs.
    """

    tight = True

    def __init__(self, challenged: bool = False) -> None:
        super().__init__(WINDOW, challenged)
        self.low, self.high = -(1 << (WINDOW - 1)), (1 << (WINDOW - 1)) - 1
        self._zeros: list[Ids] = []
        self._fours: list[Ids] = []
        self._digits: list[Ids] = []

    def digit_bits(self, low: int, high: int) -> int:
        return max(-low - 1, high, 0).bit_length() + 1

    def scale(self, bits: int) -> int:
        return 1

    def proves(self, a: Ids, low: int, high: int) -> bool:
        return all(
            low <= base.low and base.low + (1 << _bits(base.low, base.high)) - 1 <= high
            for base in self.base_of(a)
        )

    def relu(self, a: Ids) -> Ids:
        key = a.tobytes() + str(a.shape).encode()
        if key not in self._relus:
            low, high = self.bounds(a)
            if not self.fits(low, high):
                raise CircuitTooNarrow(self._part, max(-low, high))
            self._relus[key] = self.check(a) if low >= 0 else self._signed(a, low, high)
        return self._relus[key]

    def _signed(self, a: Ids, low: int, high: int) -> Ids:
        """max(a, 0) of cells that can be negative, by their sign."""
        # A sign and at least one digit below it.
        bits = max(3, self.digit_bits(low, high))
        flat = a.ravel()
        g = self.private(
            f"{self._part}.sign", flat.shape, 0, 1, lambda get: (get(flat) >= 0).astype(np.int64)
        )
        self._bit(g)
        self._decompose(flat, -(1 << (bits - 1)), bits, g)
        self._checked.update(flat.tolist())
        return self.mul(g, flat, bounds=(0, max(high, 0))).reshape(a.shape)

    def _bit(self, g: Ids) -> None:
        """Have cells proven 0 or 1."""
        self._zeros.append(self.mul(g, self.sub(g, self.constant([1])), bounds=(0, 0)))

    def _decompose(self, v: Ids, low: int, bits: int, sign: Ids | None = None) -> None:
        """Have cells [n] proven integers in low .. low + 2^bits - 1; ``sign`` is their top bit, if given."""
        below = bits if sign is None else bits - 1
        places = range(2, below - 1, 2)
        terms: list[tuple[Ids, int]] = [(v, 2)]
        constant = 1 - (1 << bits) - 2 * low
        if sign is not None:
            terms.append((sign, -(1 << bits)))
            constant += 1 << (bits - 1)
        if places:

            def digits(get: Get) -> Values:
                value = get(v) - low
                return np.stack([2 * ((value >> p) & 3) - 3 for p in places])

            upper = self.private(f"{self._part}.digits", (len(places), v.size), -3, 3, digits)
            terms += [(upper[i], -(1 << p)) for i, p in enumerate(places)]
            self._digits.append(upper.ravel())
        if below % 2:

            def top(get: Get) -> Values:
                return 8 * (((get(v) - low) >> (below - 1)) & 1) - 4

            four = self.private(f"{self._part}.four", v.shape, -4, 4, top)
            terms.append((four, -(1 << (below - 3))))
            self._fours.append(four)
        # A constant that float32 does not hold would double the dot; one less often is a power of two.
        late = len(float_parts(np.array([constant]))) > 1
        if constant - late:
            ones = np.broadcast_to(self.constant([1]), v.shape)
            terms.append((ones, constant - late))
        coefficients = self.constant(np.array([c for _, c in terms], dtype=object))
        stacked = np.stack([ids for ids, _ in terms])
        lowest = self.dot("kn,k->n", stacked, coefficients, (-3 - late, 3 - late))
        self._digits.append(self.add(lowest, self.constant([1])) if late else lowest)

    def close(self) -> dict[str, Ids]:
        with self.part("checks"):
            self._decompose_pending()
            residues: dict[str, Ids] = {}
            if self._zeros:
                residues["zeros"] = np.concatenate([ids.ravel() for ids in self._zeros])
            if self._digits:
                digits = np.concatenate(self._digits)
                fours = self.sub(self.mul(digits, digits, bounds=(1, 9)), self.constant([5]))
                self._fours.append(fours)
            if self._fours:
                fours = np.concatenate(self._fours)
                residues["squares"] = self.mul(fours, fours, bounds=(SQUARE, SQUARE))
            if not self.challenged:
                return residues
            for name, ids in residues.items():
                self._claim_all(ids, SQUARE if name == "squares" else 0)
            return {}

    def _decompose_pending(self) -> None:
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for cell in self._pending:
            (base,) = self.base_of(np.array([cell]))
            if cell in self._checked or base.op == "constant":
                continue
            if not self.fits(base.low, base.high):
                raise CircuitTooNarrow(base.name, base.magnitude)
            groups[base.low, _bits(base.low, base.high)].append(cell)
        for (low, bits), cells in groups.items():
            v = np.array(cells, dtype=np.int64)
            if bits > 1:
                self._decompose(v, low, bits)
                continue
            offset = self.sub(v, self.constant([low]))
            if bits:
                self._bit(offset)
            else:
                self._zeros.append(offset)

    def _claim_all(self, ids: Ids, value: int) -> None:
        """Claim that every cell is ``value``: element (i, j) of a square of them weighs alpha^(w i + j)."""
        width = int(np.ceil(np.sqrt(ids.size)))
        height = -(-ids.size // width)
        square = np.append(ids, np.repeat(ids[-1:], width * height - ids.size)).reshape(height, width)
        columns, rows = self.powers(width), self.powers(height, width)
        sums = self.dot("ij,j->i", square, columns)
        parts = [(self.dot("ai,i->a", sums[None], rows), 1)]
        if value:
            parts.append((self.mul(self.total_weight(columns), self.total_weight(rows)), -value))
        self.claim(parts)

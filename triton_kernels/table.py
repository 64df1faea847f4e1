"""Looking integers up in a table of constants, with the slope of the table as gradient."""

from __future__ import annotations

from torch import Tensor


def look_up(x: Tensor, values: Tensor, low: int, rounding: bool = True) -> Tensor:
    """``values[x - low]``.

    Args:
        x: integer values in low..low + entries - 1, any shape; any real ones for the float twin.
        values: the table [entries].
        low: what the first entry stands for.
        rounding: False for the float twin, which interpolates: straight lines between the entries, the first
            and the last of them prolonged.

    Returns:
        Tensor like ``x``. Its gradient is straight through with the finite difference of the table: between
        the two neighbouring entries, at an end to the only one, of the twin that of its line. An entry gets
        the gradients of the elements that found it.
    """
    index, last = x - low, len(values) - 1
    if rounding:
        here = index.long()
        before, after = (here - 1).clamp(min=0), (here + 1).clamp(max=last)
    else:
        here = before = index.floor().long().clamp(0, max(last - 1, 0))
        after = (here + 1).clamp(max=last)
    slope = (values[after] - values[before]) / (after - before).clamp(min=1)
    if rounding:
        # Adding 0 leaves the entry as it is, and passes the slope on.
        return values[here] + (index - index.detach()) * slope
    return values[here] + (index - here) * slope

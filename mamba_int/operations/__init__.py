"""The closed set of operations, by the name they bear in every layer."""

from mamba_int.operations.base import Operation
from mamba_int.operations.choice import Select, Table
from mamba_int.operations.division import Div, Isqrt
from mamba_int.operations.elementwise import Add, Compare, Mul, Sub
from mamba_int.operations.input import Embedding, Input
from mamba_int.operations.linear import Conv, Linear
from mamba_int.operations.norm import Norm
from mamba_int.operations.rotate import Rotate
from mamba_int.operations.rounding import Clamp, Relu, Shift
from mamba_int.operations.scan import Scan
from mamba_int.operations.shape import Concat, Reduce, Slice
from mamba_int.operations.ssd import Ssd

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Input(),
        Embedding(),
        Linear(),
        Conv(),
        Add(),
        Sub(),
        Mul(),
        Compare(),
        Select(),
        Table(),
        Shift(),
        Clamp(),
        Relu(),
        Norm(),
        Rotate(),
        Ssd(),
        Scan(),
        Isqrt(),
        Div(),
        Slice(),
        Concat(),
        Reduce(),
    )
}

__all__ = ["OPERATIONS", "Operation"]

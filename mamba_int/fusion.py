"""Runs of nodes that one Triton kernel computes: how the integer graph runs on a GPU.

A plan is found by looking at the nodes alone, so every graph profits that has such runs, and a node outside
them runs by itself. Whatever magnitude a clamp keeps within 2^8 travels as bf16; everything else as float32.
Values inside a fused run are never written: to see every intermediate, run the nodes one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mamba_int.executor import Step, Values
from mamba_int.graph import Node
from mamba_int.operations import OPERATIONS
from mamba_int.operations.norm import Norm
from triton_kernels.chunked_ssd import ssd_requantize
from triton_kernels.conv import WIDTH, Activation, conv_requantize
from triton_kernels.gate import HardSilu, hard_silu_gate
from triton_kernels.linear import Rounding, linear_requantize, linear_residual, wide_linear
from triton_kernels.narrow import NARROW, narrow_dtype
from triton_kernels.norm import Ladder, norm_requantize
from triton_kernels.rotate import rotate
from triton_kernels.ssd import SsdScales


class Requantization(NamedTuple):
    """A shift, relu and clamp behind a node, any of the first two left out.

    Attributes:
        places, low, high: of the shift and the clamp.
        relu: whether there is one; ``low`` is 0 then.
        result: name of the clamp.
        nodes: names of all of them.
    """

    places: int
    low: int
    high: int
    relu: bool
    result: str
    nodes: tuple[str, ...]


@dataclass
class _Planner:
    nodes: Sequence[Node]
    by_name: dict[str, Node] = field(default_factory=dict)
    consumers: dict[str, list[Node]] = field(default_factory=lambda: defaultdict(list))
    narrow: dict[str, int] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in self.nodes:
            self.by_name[node.name] = node
            for name in node.inputs:
                self.consumers[name].append(node)

    def only_consumer(self, name: str, op: str) -> Node | None:
        found = self.consumers[name]
        return found[0] if len(found) == 1 and found[0].op == op else None

    def clamp_of(self, name: str) -> Node | None:
        """The clamp that alone reads ``name`` and keeps it narrow."""
        clamp = self.only_consumer(name, "clamp")
        if clamp is None or max(-clamp.integer("low"), clamp.integer("high")) > NARROW:
            return None
        return clamp

    def requantization(self, name: str) -> Requantization | None:
        places, names = 0, []
        shift = self.only_consumer(name, "shift")
        if shift is not None:
            places, name = shift.integer("places"), shift.name
            names.append(name)
        relu = self.only_consumer(name, "relu")
        if relu is not None:
            name = relu.name
            names.append(name)
        clamp = self.clamp_of(name)
        if clamp is None:
            return None
        low = max(clamp.integer("low"), 0) if relu else clamp.integer("low")
        names.append(clamp.name)
        return Requantization(places, low, clamp.integer("high"), relu is not None, clamp.name, tuple(names))

    # -- the runs ----------------------------------------------------------------------------------------

    def norm(self, node: Node) -> Step | None:
        clamp = self.clamp_of(node.name)
        if clamp is None:
            return None
        result, source = clamp.name, node.inputs[0]
        low, high = clamp.integer("low"), clamp.integer("high")

        def run(values: Values, nodes: dict[str, Node]) -> None:
            x = values[source].float()
            d = x.shape[-1]
            ladder = Ladder(
                node.integer("input_shift"),
                node.integer("input_limit"),
                tuple(Norm.thresholds(node, d)),
                tuple(Norm.multipliers(node)),
                Norm.places(node),
                low,
                high,
            )
            values[result] = norm_requantize(x, ladder)

        return Step((node.name, result), run)

    def linear(self, node: Node) -> Step | None:
        if node.inputs[0] not in self.narrow:
            return None
        return self._sliced(node) or self._residual(node) or self._wide(node)

    def _sliced(self, node: Node) -> Step | None:
        slices = sorted(self.consumers[node.name], key=lambda n: n.attributes.get("start", -1))
        if not slices or any(part.op != "slice" for part in slices):
            return None
        ends = [0, *(part.integer("stop") for part in slices)]
        if any(part.integer("start") != end for part, end in zip(slices, ends, strict=False)):
            return None
        found = [self.requantization(part.name) for part in slices]
        parts = [r for r in found if r is not None and not r.relu]
        if len(parts) < len(found):
            return None
        roundings = tuple(
            Rounding(part.integer("start"), part.integer("stop"), r.places, r.low, r.high)
            for part, r in zip(slices, parts, strict=True)
        )
        source = node.inputs[0]

        def run(values: Values, nodes: dict[str, Node]) -> None:
            held = nodes[node.name].constants
            if len(held["weight"]) != roundings[-1].stop:
                raise ValueError(f"the slices of '{node.name}' leave out its last columns")
            results = linear_requantize(values[source], held["weight"], held.get("bias"), roundings)
            for r, value in zip(parts, results, strict=True):
                values[r.result] = value

        names = [node.name, *(part.name for part in slices), *(name for r in parts for name in r.nodes)]
        return Step(tuple(names), run)

    def _residual(self, node: Node) -> Step | None:
        shift = self.only_consumer(node.name, "shift")
        add = self.only_consumer(shift.name, "add") if shift else None
        clamp = self.only_consumer(add.name, "clamp") if add else None
        if shift is None or add is None or clamp is None or len(add.inputs) != 2 or "bias" in node.constants:
            return None
        (residual,) = [name for name in add.inputs if name != shift.name] or [""]
        if residual not in self.known:
            return None
        places, low, high = shift.integer("places"), clamp.integer("low"), clamp.integer("high")
        source, result = node.inputs[0], clamp.name

        def run(values: Values, nodes: dict[str, Node]) -> None:
            weight = nodes[node.name].constants["weight"]
            values[result] = linear_residual(
                values[source], weight, None, values[residual].float(), places, low, high
            )

        return Step((node.name, shift.name, add.name, result), run)

    def _wide(self, node: Node) -> Step:
        source = node.inputs[0]

        def run(values: Values, nodes: dict[str, Node]) -> None:
            held = nodes[node.name].constants
            values[node.name] = wide_linear(values[source], held["weight"], held.get("bias"))

        return Step((node.name,), run)

    def conv(self, node: Node) -> Step | None:
        r = self.requantization(node.name)
        if r is None or node.constants["taps"].shape[1] > WIDTH:
            return None
        root = self._squareplus(r)
        names = (node.name, *r.nodes, *(root or ()))
        result = names[-1]
        frac = self.by_name[r.result].frac
        activation = Activation(r.places, r.low, r.high, r.relu, root is not None, frac)
        source = node.inputs[0]

        def run(values: Values, nodes: dict[str, Node]) -> None:
            held = nodes[node.name].constants
            values[result] = conv_requantize(values[source], held["taps"], held.get("bias"), activation)

        return Step(names, run)

    def _squareplus(self, r: Requantization) -> tuple[str, ...] | None:
        """The nodes of squareplus behind an int8 clamp, if they are all there and clamp alike."""
        readers = self.consumers[r.result]
        if r.relu:
            return None
        squares = [n for n in readers if n.op == "mul" and n.inputs == (r.result, r.result)]
        if not squares:
            return None
        square = squares[0]
        four = self.only_consumer(square.name, "add")
        root = self.only_consumer(four.name, "isqrt") if four and len(four.inputs) == 1 else None
        total = self.only_consumer(root.name, "add") if root else None
        # The square reads its operand twice.
        if four is None or root is None or total is None or len(readers) != 3:
            return None
        last = self.requantization(total.name)
        if last is None or set(total.inputs) != {r.result, root.name}:
            return None
        if last.relu or (last.places, last.low, last.high) != (1, r.low, r.high):
            return None
        return square.name, four.name, root.name, total.name, *last.nodes

    def rotate(self, node: Node) -> Step | None:
        source = node.inputs[0]
        # A turned pair may be longer than its elements by the root of two, and roundings may add to it.
        if 1.4143 * self.narrow.get(source, NARROW) + 2 > NARROW:
            return None
        frac = node.integer("constant_frac")

        def run(values: Values, nodes: dict[str, Node]) -> None:
            held = nodes[node.name].constants
            if node.attributes["form"] == "table":
                first, second, sign = held["cos"], held["sin"], None
            else:
                first, second, sign = held["lam"], held["gam"], held["sign"]
            values[node.name] = rotate(values[source], first, second, sign, frac)

        return Step((node.name,), run)

    def ssd(self, node: Node) -> Step | None:
        r = self.requantization(node.name)
        if r is None or r.relu or any(name not in self.narrow for name in node.inputs):
            return None
        scales = SsdScales.from_attributes(node.attributes)
        sources = node.inputs

        def run(values: Values, nodes: dict[str, Node]) -> None:
            held = nodes[node.name].constants
            x, B_hat, C_hat, decay = (values[name] for name in sources[:4])
            B_next = values[sources[4]] if len(sources) == 5 else None
            values[r.result] = ssd_requantize(
                x, B_hat, C_hat, decay, held["D"], scales, r.places, r.low, r.high,
                B_next, held.get("cos_Q"), held.get("sin_Q"),
            )  # fmt: skip

        return Step((node.name, *r.nodes), run)

    def add(self, node: Node) -> Step | None:
        """The hard-SiLU gate, which begins by adding 2 to z."""
        if len(node.inputs) != 1 or node.inputs[0] not in self.narrow:
            return None
        z = node.inputs[0]
        ramp = self.only_consumer(node.name, "clamp")
        product = self.only_consumer(ramp.name, "mul") if ramp else None
        if ramp is None or product is None or set(product.inputs) != {z, ramp.name}:
            return None
        g = self.requantization(product.name)
        gated = self.only_consumer(g.result, "mul") if g else None
        v = self.requantization(gated.name) if gated else None
        if g is None or gated is None or v is None or g.relu or v.relu or len(gated.inputs) != 2:
            return None
        (y,) = [name for name in gated.inputs if name != g.result] or [""]
        if y not in self.narrow or ramp.integer("low") != 0 or g.low != -g.high or v.low != -v.high:
            return None
        gate = HardSilu(2 << node.frac, ramp.integer("high"), g.places, g.high, v.places, v.high)

        def run(values: Values, nodes: dict[str, Node]) -> None:
            values[v.result] = hard_silu_gate(values[y], values[z], gate)

        return Step((node.name, ramp.name, product.name, *g.nodes, gated.name, *v.nodes), run)

    # -- the plan ----------------------------------------------------------------------------------------

    def alone(self, node: Node) -> Step:
        if node.op == "slice":
            start, stop = node.integer("start"), node.integer("stop")
            source = node.inputs[0]
            if source in self.narrow:
                self.narrow[node.name] = self.narrow[source]

            def view(values: Values, nodes: dict[str, Node]) -> None:
                values[node.name] = values[source][..., start:stop]

            return Step((node.name,), view)
        self._note_width(node)

        def run(values: Values, nodes: dict[str, Node]) -> None:
            operands = [values[name].float() for name in (node.inputs or (node.name,))]
            result = OPERATIONS[node.op].execute(nodes[node.name], operands, lambda *_: None, True)
            values[node.name] = result.to(narrow_dtype(result.device)) if node.name in self.narrow else result

        return Step((node.name,), run)

    def plan(self) -> list[Step]:
        fusers = {
            "norm": self.norm,
            "linear": self.linear,
            "conv": self.conv,
            "rotate": self.rotate,
            "ssd": self.ssd,
            "add": self.add,
        }
        done: set[str] = set()
        steps = []
        for node in self.nodes:
            if node.name in done:
                continue
            fuse = fusers.get(node.op)
            step = fuse(node) if fuse else None
            if step is None:
                step = self.alone(node)
            else:
                for name in step.nodes:
                    self._note_width(self.by_name[name])
                if node.op == "rotate":
                    self.narrow[node.name] = NARROW
            done.update(step.nodes)
            self.known.update(step.nodes)
            steps.append(step)
        return steps

    def _note_width(self, node: Node) -> None:
        """Enter what a clamp keeps narrow."""
        if node.op == "clamp":
            limit = max(-node.integer("low"), node.integer("high"))
            if limit <= NARROW:
                self.narrow[node.name] = limit


def plan(nodes: Sequence[Node]) -> list[Step]:
    """The steps that compute ``nodes``, in an order that respects their inputs."""
    return _Planner(nodes).plan()

"""Tiny integer graphs: one per operation and form, and whole native models at the fewest rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuits.lowering import LoweredCircuit, build_circuit
from mamba_int.config import MambaIntConfig
from mamba_int.graph import Graph, Node
from mamba_int.interpreter import evaluate
from mamba_int.model import MambaInt
from mamba_int.native import build_nodes
from mamba_int.passes import optimize

torch.set_num_threads(1)

Array = NDArray[np.int64]


def node(
    name: str, op: str, *inputs: str, constants: Mapping[str, Any] | None = None, **attributes: Any
) -> Node:
    """A node with int64 constants; ``frac`` is an attribute like any other."""
    frac = attributes.pop("frac", 0)
    held = {key: np.asarray(value, dtype=np.int64) for key, value in (constants or {}).items()}
    return Node(name, op, inputs, attributes, held, frac)


def chain(*nodes: Node, T: int = 4, C: int = 4, low: int = -40, high: int = 40) -> Graph:
    """input [T, C] -> the nodes; the last is the output."""
    source = node("input", "input", low=low, high=high, features=C)
    return Graph((source, *nodes), nodes[-1].name if nodes else "input", T).verify()


def random_input(graph: Graph, seed: int = 0) -> Array:
    """A uniform input of a graph, without batch axis."""
    tensor = graph.types[graph.input.name]
    return np.random.default_rng(seed).integers(tensor.low, tensor.high + 1, tensor.shape)


def extreme_inputs(graph: Graph) -> list[Array]:
    """All lowest, all highest, alternating over the elements, over time, and random signs of the extremes."""
    tensor = graph.types[graph.input.name]
    index = np.indices(tensor.shape)
    picks = [np.zeros(tensor.shape), np.ones(tensor.shape), index.sum(0) % 2, index[0] % 2]
    picks += [np.random.default_rng(seed).integers(0, 2, tensor.shape) for seed in range(3)]
    return [np.where(pick > 0, tensor.high, tensor.low).astype(np.int64) for pick in picks]


def interpret(graph: Graph, x: Array) -> dict[str, Array]:
    """Every tensor of one inference, without batch axis."""
    trace: dict[str, Array] = {}
    evaluate(graph, x[None], trace)
    return {name: value[0] for name, value in trace.items()}


def assert_equal_to_interpreter(graph: Graph, lowered: LoweredCircuit, x: Array) -> None:
    """Every tensor that has cells, and the public logits, equal the interpreter's."""
    truth, trace = interpret(graph, x), {}  # type: ignore[var-annotated]
    witness = lowered.witness(x, trace=trace)
    assert graph.output in trace
    for name, value in trace.items():
        np.testing.assert_array_equal(value, truth[name], err_msg=name)
    assert witness.public["logits"] == truth[graph.output].ravel().tolist()


# -- one graph per operation and form --------------------------------------------------------------------


def _weights(low: int, high: int, *shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(low, high + 1, shape)


def _ssd(T: int, Q: int, rotated: bool = True) -> Graph:
    """x, B, C, n sliced from the input; with a carried state when T > Q."""
    H, P, N, k, fA, fR = 2, 1 if T > Q else 2, 2, 4, 5, 5
    cuts = {"x": H * P, "B": N, "C": N, "n_in": H}
    nodes, start = [], 0
    for name, width in cuts.items():
        nodes.append(node(name, "slice", "input", start=start, stop=start + width))
        start += width
    nodes.append(node("n", "clamp", "n_in", low=0, high=(1 << k) - 1, saturation=False))
    inputs, constants = ["x", "B", "C", "n"], {"D": [3, -2]}
    if T > Q:
        inputs.append("B")
        turn = 0.7 if rotated else 0.0
        constants |= {"cos_Q": [int(32 * np.cos(turn))], "sin_Q": [int(32 * np.sin(turn))]}
    attributes = {
        "chunk_size": Q,
        "headdim": P,
        "decay_bits": k,
        "A_bits": fA,
        "G_shift": 2,
        "G_limit": 31,
        "M_shift": 4,
        "A_u_bits": 4,
        "u_shift": 4,
        "beta_shift": 3,
        "H_align": 0,
        "rotation_frac": fR,
        "M_align": 1,
        "u_align": 0,
        "D_align": 2,
    }
    nodes.append(node("y_acc", "ssd", *inputs, constants=constants, **attributes))
    nodes.append(node("y_wide", "shift", "y_acc", places=6))
    nodes.append(node("y", "clamp", "y_wide", low=-31, high=31, saturation=True))
    return chain(*nodes, T=T, C=sum(cuts.values()), low=-15, high=15)


def _scan(turning: int, components: int, groups: int = 1, T: int = 3, D: int = -2) -> Graph:
    """x, q, B, C sliced from the input; q reaches beyond one, so that states saturate."""
    P, N = 2, 2 if groups == 1 else 1
    modes = groups * N
    cuts = {"x": groups * P, "q": turning * modes, "B": components * modes, "C": 4 * modes}
    nodes, start = [], 0
    for name, width in cuts.items():
        nodes.append(node(name, "slice", "input", start=start, stop=start + width))
        start += width
    scales = {"groups": groups, "q_bits": 3, "inflow_align": 2, "H_limit": 31, "D_align": 3}
    constants = {"D": np.arange(groups * P) + D}
    nodes.append(node("y_acc", "scan", "x", "q", "B", "C", constants=constants, **scales))
    nodes.append(node("y_wide", "shift", "y_acc", places=5))
    nodes.append(node("y", "clamp", "y_wide", low=-31, high=31, saturation=True))
    return chain(*nodes, T=T, C=start, low=-9, high=9)


def _angles(period: int, half: int, frac: int, form: str) -> dict[str, Array]:
    angle = -np.arange(period)[:, None] * np.linspace(0.3, 1.3, half)
    one = 1 << frac

    def dyadic(value: Any) -> Array:
        return np.floor(value * one + 0.5).astype(np.int64)

    if form == "table":
        return {"cos": dyadic(np.cos(angle)), "sin": dyadic(np.sin(angle))}
    folded = np.arctan(np.tan(angle))
    return {
        "lam": dyadic(-np.tan(folded / 2)),
        "gam": dyadic(np.sin(folded)),
        "sign": np.where(np.cos(angle) >= 0, 1, -1),
    }


def _rotate(form: str, T: int) -> Graph:
    constants = _angles(3, 2, 6, form)
    turned = node("r", "rotate", "input", constants=constants, form=form, period=3, constant_frac=6)
    return chain(turned, T=T, low=-20, high=20)


def _linear(
    low: int, high: int, T: int, bias: bool, places: int = 0, J: int = 5, K: int = 6, reach: int = 9
) -> Graph:
    constants = {"weight": _weights(low, high, J, K)} | ({"bias": _weights(-20, 20, J)} if bias else {})
    nodes = [node("lin", "linear", "input", constants=constants)]
    if places:
        nodes.append(node("q", "shift", "lin", places=places))
    return chain(*nodes, T=T, C=K, low=-reach, high=reach)


def _norm(d: int, input_shift: int, limit: int, octaves: int = 6, per_octave: int = 2) -> Graph:
    ladder = {"octaves": octaves, "per_octave": per_octave}
    high = 100
    return chain(
        node("y", "norm", "input", input_shift=input_shift, input_limit=limit, frac=4, **ladder),
        T=3,
        C=d,
        low=-high,
        high=high,
    )


def _shift(places: int) -> Graph:
    """x * x * x is wide enough for every shift."""
    return chain(
        node("square", "mul", "input", "input"),
        node("cube", "mul", "square", "input"),
        node("q", "shift", "cube", places=places),
    )


def _clamp(low: int, high: int, *before: Node) -> Graph:
    source = before[-1].name if before else "input"
    return chain(*before, node("c", "clamp", source, low=low, high=high, saturation=False))


def _algebraic() -> Graph:
    """The gate's division: floor((z << 4) / (1 + |z|))."""
    return chain(
        node("minus", "mul", "input", constants={"value": -1}),
        node("below", "relu", "minus"),
        node("above", "relu", "input"),
        node("abs", "add", "above", "below"),
        node("divisor", "add", "abs", constants={"value": 8}),
        node("dividend", "shift", "input", places=-4),
        node("ratio", "div", "dividend", "divisor"),
    )


def _squareplus() -> Graph:
    return chain(
        node("square", "mul", "input", "input"),
        node("square4", "add", "square", constants={"value": 64}),
        node("root", "isqrt", "square4"),
        node("sum", "add", "input", "root"),
        node("half", "shift", "sum", places=1),
    )


def _two(op: str) -> Graph:
    left, right = node("l", "slice", "input", start=0, stop=3), node("r", "slice", "input", start=2, stop=5)
    return chain(left, right, node("out", op, "l", "r"), C=5)


def _constant(op: str, value: Any) -> Graph:
    return chain(node("out", op, "input", constants={"value": value}))


def _branches(T: int, condition: str, *before: Node) -> Graph:
    """condition ? input[..., 0:3] : input[..., 2:5]."""
    left, right = node("l", "slice", "input", start=0, stop=3), node("r", "slice", "input", start=2, stop=5)
    return chain(left, right, *before, node("out", "select", condition, "l", "r"), T=T, C=5)


def _table(entries: int, low: int, reach: int, T: int = 3, C: int = 2) -> Graph:
    """A table of which an input in -reach..reach reads the middle."""
    held = {"values": _weights(-90, 90, entries)}
    return chain(node("out", "table", "input", constants=held, low=low), T=T, C=C, low=-reach, high=reach)


CUBE = (node("square", "mul", "input", "input"), node("cube", "mul", "square", "input"))

GRAPHS: dict[str, Callable[[], Graph]] = {
    "input": lambda: chain(T=3, C=3),
    "embedding": lambda: Graph(
        (
            node("input", "input", low=0, high=4, features=0),
            node("e", "embedding", "input", constants={"table": _weights(-50, 50, 6, 3)}),
        ),
        "e",
        5,
    ),
    "linear_ternary": lambda: _linear(-1, 1, 5, False),
    "linear_ternary_bias_one_step": lambda: _linear(-1, 1, 1, True),
    "linear_many_rows": lambda: _linear(-1, 1, 3, True, J=24, K=8),
    "linear_two_groups": lambda: _linear(-1, 1, 19, True, J=3, K=3),
    "linear_two_packs": lambda: _linear(-1, 1, 33, True, J=2, K=3),
    "linear_wide": lambda: _linear(-9, 9, 3, True),
    "linear_int8_shifted": lambda: _linear(-9, 9, 3, True, places=4),
    "linear_shifted_two_groups": lambda: _linear(-1, 1, 9, False, places=3),
    "linear_shifted_two_packs": lambda: _linear(-1, 1, 17, True, places=3, J=3, K=5),
    "linear_split_shift": lambda: _linear(-120, 120, 3, True, places=6),
    # What a dot reads is in order here, where a plain Concat would make EZKL's optimizer split the dot.
    "linear_one_output": lambda: _linear(-3, 3, 3, False, J=1, K=3),
    "linear_pooled": lambda: chain(
        node("last", "reduce", "input", kind="last"),
        node("lin", "linear", "last", constants={"weight": _weights(-9, 9, 3, 4), "bias": [100, -3, 0]}),
    ),
    "conv": lambda: chain(
        node("c", "conv", "input", constants={"taps": _weights(-3, 3, 4, 3), "bias": _weights(-9, 9, 4)}), T=5
    ),
    "conv_shifted": lambda: chain(
        node("c", "conv", "input", constants={"taps": _weights(-30, 30, 4, 4)}),
        node("q", "shift", "c", places=6),
        node("r", "relu", "q"),
        node("s", "clamp", "r", low=-31, high=31, saturation=True),
        T=5,
    ),
    "add": lambda: _two("add"),
    "sub": lambda: _two("sub"),
    "mul": lambda: _two("mul"),
    "add_constant": lambda: _constant("add", [1, -2, 3, 1000]),
    "sub_constant": lambda: _constant("sub", 7),
    "mul_constant": lambda: _constant("mul", -3),
    "compare": lambda: _two("compare"),
    "compare_constant": lambda: _constant("compare", [0, 1, -40, 17]),
    "compare_odd": lambda: chain(node("out", "compare", "input", constants={"value": -3}), T=3, C=3),
    "compare_decided": lambda: _constant("compare", [-41, -40, -50, -41]),
    "compare_to_the_table_edge": lambda: chain(
        node("out", "compare", "input", constants={"value": -79}), T=2, low=-80, high=39
    ),
    "compare_beyond_the_table": lambda: chain(
        node("out", "compare", "input", constants={"value": -79}), T=2, low=-80, high=40
    ),
    "compare_wide": lambda: chain(
        node("square", "mul", "input", "input"),
        node("twice", "mul", "input", constants={"value": 30}),
        node("out", "compare", "square", "twice"),
        T=3,
        C=3,
    ),
    "compare_wide_constant": lambda: chain(
        *CUBE, node("out", "compare", "cube", constants={"value": [0, 8, -27, 8000]}), T=2
    ),
    "select": lambda: _branches(4, "g", node("g", "compare", "r", "l")),
    "select_by_a_clamp": lambda: _branches(3, "g", node("g", "clamp", "l", low=0, high=1, saturation=False)),
    "table": lambda: _table(14, -6, 5),
    "table_odd": lambda: _table(5, -2, 2, C=1),
    "table_of_one_entry": lambda: _table(3, -1, 0),
    **{f"shift_{s}": lambda s=s: _shift(s) for s in (-3, 9, 10, 11, 12)},  # type: ignore[misc]
    "shift_of_sum": lambda: chain(
        node("s", "reduce", "input", kind="sum"),
        node("w", "shift", "s", places=-2),
        node("a", "add", "w", "w"),
        node("q", "shift", "a", places=4),
    ),
    "clamp_signed": lambda: _clamp(-17, 13),
    "clamp_positive": lambda: _clamp(5, 13),
    "clamp_below_the_interval": lambda: _clamp(-90, -60),
    "clamp_above_the_interval": lambda: _clamp(60, 90),
    "clamp_one_sided": lambda: _clamp(-17, 100),
    "clamp_wide": lambda: _clamp(-90, 77, *CUBE),
    "clamp_wide_one_sided": lambda: _clamp(-20, 77, CUBE[0]),
    "clamp_shifted": lambda: _clamp(-7, 7, *CUBE, node("q", "shift", "cube", places=10)),
    "clamp_shifted_zero": lambda: _clamp(0, 7, *CUBE, node("q", "shift", "cube", places=10)),
    "clamp_shifted_to_the_table_edge": lambda: _clamp(
        -100, 100, CUBE[0], node("q", "shift", "square", places=4)
    ),
    "relu": lambda: chain(node("r", "relu", "input"), T=3, C=3),
    "relu_clamped": lambda: _clamp(-5, 13, node("r", "relu", "input")),
    "relu_clamped_negative": lambda: _clamp(-5, -2, node("r", "relu", "input")),
    "norm": lambda: _norm(4, 0, 127),
    "norm_coarse": lambda: _norm(4, 0, 127, per_octave=1),
    "norm_clamped": lambda: _norm(4, 1, 25),
    "norm_odd_and_shallow": lambda: _norm(3, 3, 7, octaves=2),
    "rotate_table": lambda: _rotate("table", 5),
    "rotate_shear": lambda: _rotate("shear", 5),
    "ssd_one_chunk": lambda: _ssd(3, 3),
    "ssd_carried": lambda: _ssd(5, 2),
    "ssd_carried_whole_chunks": lambda: _ssd(6, 2),
    "ssd_chunk_of_one": lambda: _ssd(3, 1, rotated=False),
    "scan_real": lambda: _scan(1, 1),
    "scan_real_of_quaternions": lambda: _scan(1, 4, T=2),
    "scan_complex": lambda: _scan(2, 4, groups=2),
    "scan_quaternion": lambda: _scan(4, 4),
    "scan_one_step": lambda: _scan(4, 4, T=1, D=0),
    "isqrt": _squareplus,
    "div": _algebraic,
    "slice": lambda: chain(node("s", "slice", "input", start=1, stop=3), T=3),
    "concat": lambda: chain(
        node("r", "relu", "input"),
        node("s", "slice", "r", start=1, stop=3),
        node("j", "concat", "s", "input", "s"),
        T=3,
        C=3,
    ),
    "concat_of_pooled": lambda: chain(
        node("last", "reduce", "input", kind="last"),
        node("sum", "reduce", "input", kind="sum"),
        node("j", "concat", "last", "sum"),
        T=3,
        C=3,
    ),
    "reduce_sum": lambda: chain(node("s", "reduce", "input", kind="sum"), C=3),
    "reduce_max": lambda: chain(node("s", "reduce", "input", kind="max"), T=5, C=3),
    "reduce_max_of_one_step": lambda: chain(
        node("r", "relu", "input"), node("s", "reduce", "r", kind="max"), T=1, C=2
    ),
    "reduce_last": lambda: chain(node("r", "relu", "input"), node("s", "reduce", "r", kind="last"), T=3, C=3),
}
"""Small graphs by what they exercise; every operation is the heart of at least one."""


# -- native models ---------------------------------------------------------------------------------------

TINY = {
    "seq_len": 4,
    "n_features": 2,
    "n_classes": 3,
    "input_low": -4,
    "input_high": 7,
    "input_frac": 2,
    "d_model": 4,
    "n_layer": 1,
    "headdim": 4,
    "d_state": 2,
    "d_conv": 2,
    "chunk_size": 4,
    "residual_bits": 8,
    "residual_frac": 4,
    "norm_frac": 4,
    "norm_shift": 1,
    "norm_input_bits": 5,
    "activation_bits": 5,
    "y_bits": 5,
    "conv_frac": 4,
    "decay_bits": 5,
    "A_bits": 7,
    "A_u_bits": 6,
    "G_bits": 7,
    "M_bits": 6,
    "u_bits": 8,
    "beta_bits": 7,
    "H_bits": 7,
    "rotation_frac": 6,
    "D_frac": 4,
    "head_frac": 5,
    "pool_bits": 6,
}

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two_layers": {"n_layer": 2, "seq_len": 3, "chunk_size": 3},
    "carried_state": {"seq_len": 5, "chunk_size": 2},
    "carried_state_many_heads": {"seq_len": 9, "chunk_size": 4, "headdim": 2, "d_state": 4},
    "two_layers_carried": {"n_layer": 2, "seq_len": 4, "chunk_size": 2, "pooling": "last"},
    "shear": {"rotation": "shear", "seq_len": 5, "chunk_size": 3, "d_state": 4},
    "unrotated": {"rotation": "none", "seq_len": 5, "chunk_size": 2},
    "squareplus": {"activation": "squareplus", "seq_len": 3},
    "algebraic": {"gate": "algebraic", "seq_len": 3},
    "hard_sigmoid": {"gate": "hard_sigmoid", "seq_len": 3, "activate_BC": True},
    "int8_weights": {"weights": "int8", "input_weights": "ternary", "seq_len": 3},
    "last_unnormed": {"pooling": "last", "final_norm": False, "conv_bias": False, "seq_len": 3},
    "mean_unnormed": {"final_norm": False, "seq_len": 3},
    "one_of_each": {"n_features": 1, "d_model": 1, "headdim": 1, "seq_len": 7, "n_classes": 1, "d_conv": 1},
    "language_model_of_one_chunk": {
        "task": "language_model",
        "vocab_size": 2,
        "seq_len": 2,
        "chunk_size": 3,
        "rotation": "shear",
    },
    "language_model": {"task": "language_model", "vocab_size": 5, "seq_len": 3, "chunk_size": 2},
    "default_budget": {
        **{key: getattr(MambaIntConfig(), key) for key in TINY if "_bits" in key or "_frac" in key},
        "norm_shift": 4,
        "seq_len": 5,
        "chunk_size": 2,
    },
}
"""What each model changes in ``TINY``: every gate, activation, rotation, pooling and weight form."""


def native_graph(seed: int = 0, **changes: Any) -> Graph:
    """The integer graph of an untrained native model, scales observed on random inputs."""
    config = MambaIntConfig(**{**TINY, **changes})
    model = MambaInt(config, seed)
    random = np.random.default_rng(seed)
    if config.task == "language_model":
        batch = random.integers(0, config.vocab_size, (16, config.seq_len))
    else:
        shape = (16, config.seq_len, config.n_features)
        batch = random.integers(config.input_low, config.input_high + 1, shape)
    model.observe(torch.from_numpy(batch))
    model.freeze_scales()
    integers = {name: value.numpy() for name, value in model.frozen_integers().items()}
    built = build_nodes(config, model.scales(), lambda name, frac: integers[name])
    return optimize(Graph(tuple(built.nodes), built.output, config.seq_len))


def lower_small(graph: Graph, public_input: bool = False) -> LoweredCircuit:
    """The circuit at the fewest rows."""
    return build_circuit(graph, public_input)

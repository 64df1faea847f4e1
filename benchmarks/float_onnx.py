"""A float Mamba-2 language model as ONNX, the peer of the integer graph: prefill, and one step with a cache.

Written by hand in the forms that are fast in ONNX Runtime: the scan of a prompt in chunks of matrix products
(arXiv 2405.21060, section 6), norms and activations as the patterns that its optimizer fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mamba_int.float_models.mamba2 import Mamba2Mixer
from mamba_int.float_models.models import MambaBlock, MambaForCausalLM

CHUNK = 64
"""Steps of a chunk of the prompt's scan."""
Floats = NDArray[np.float32]


class _Writer:
    """Nodes, constants, inputs and outputs of one ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        result = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [result], **attributes))
        return result

    def split(self, x: str, widths: Sequence[int]) -> list[str]:
        results = [f"t{len(self.nodes)}_{i}" for i in range(len(widths))]
        self.nodes.append(helper.make_node("Split", [x, self.constant(np.array(widths))], results, axis=-1))
        return results

    def constant(self, value: Any) -> str:
        """Floats in float32, integers in int64; equal ones are stored once."""
        array = np.asarray(value)
        array = np.ascontiguousarray(array.astype(np.int64 if array.dtype.kind == "i" else np.float32))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"c{len(self.constants)}")
        name: str = self.constants[key].name
        return name

    def reshape(self, x: str, *shape: int) -> str:
        return self("Reshape", x, self.constant(np.array(shape)))

    def place(self, name: str, shape: Sequence[int], kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def give(self, value: str, name: str, shape: Sequence[int]) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def serialised(self) -> bytes:
        graph = helper.make_graph(
            self.nodes, "float", self.inputs, self.outputs, list(self.constants.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def float_prefill_onnx(model: MambaForCausalLM, length: int) -> bytes:
    """Token ids int64 [1, length] to logits float32 [1, length, vocabulary]; ``length`` in whole chunks."""
    assert length % CHUNK == 0
    w = _Writer()
    return _model(w, model, w.place("input", [1, length], TensorProto.INT64), length)


def float_step_onnx(model: MambaForCausalLM) -> bytes:
    """A token id int64 [1, 1] and the caches to logits float32 [1, 1, vocabulary] and ``next.`` caches."""
    w = _Writer()
    return _model(w, model, w.place("input", [1, 1], TensorProto.INT64), 1)


def _floats(parameter: Any) -> Floats:
    array: Floats = parameter.detach().float().numpy()
    return array


def _model(w: _Writer, model: MambaForCausalLM, tokens: str, length: int) -> bytes:
    table = w.constant(_floats(model.backbone.embeddings.weight))
    x = w("Gather", table, tokens, axis=0)
    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, MambaBlock) and isinstance(layer.mixer, Mamba2Mixer)
        normed = _norm(w, x, _floats(layer.norm.weight), layer.norm.eps)
        x = w("Add", x, _mix(w, layer.mixer, normed, length, i))
    hidden = _norm(w, x, _floats(model.backbone.norm_f.weight), model.backbone.norm_f.eps)
    head = w.constant(_floats(model.lm_head.weight))
    # One table for both ends: the optimizer turns it when it loads the model.
    logits = w("MatMul", hidden, w("Transpose", head, perm=[1, 0]))
    w.outputs.insert(
        0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, length, len(model.lm_head.weight)])
    )
    w.nodes.append(helper.make_node("Identity", [logits], ["logits"]))
    return w.serialised()


def _norm(w: _Writer, x: str, weight: Floats, eps: float) -> str:
    mean = w("ReduceMean", w("Pow", x, w.constant(2.0)), axes=[-1], keepdims=1)
    root = w("Sqrt", w("Add", mean, w.constant(eps)))
    return w("Mul", w("Div", x, root), w.constant(weight))


def _silu(w: _Writer, x: str) -> str:
    return w("Mul", x, w("Sigmoid", x))


def _mix(w: _Writer, mixer: Mamba2Mixer, x: str, length: int, layer: int) -> str:
    c = mixer.config
    E, N, H = c.d_inner, c.d_state, c.n_heads
    projected = w("MatMul", x, w.constant(_floats(mixer.in_proj.weight).T))
    z, xBC, dt = w.split(projected, [E, E + 2 * N, H])
    values, B, C = w.split(_silu(w, _convolve(w, mixer, xBC, length, layer)), [E, N, N])
    step = w("Softplus", w("Add", dt, w.constant(_floats(mixer.dt_bias))))
    rates = -np.exp(_floats(mixer.A_log))
    if length == 1:
        y = _step(w, mixer, values, B, C, step, rates, layer)
    else:
        y = _scan(w, mixer, values, B, C, step, rates, length)
    D = np.repeat(_floats(mixer.D), c.headdim)
    y = w("Add", y, w("Mul", values, w.constant(D)))
    normed = _norm(w, w("Mul", y, _silu(w, z)), _floats(mixer.norm.weight), c.norm_epsilon)
    return w("MatMul", normed, w.constant(_floats(mixer.out_proj.weight).T))


def _convolve(w: _Writer, mixer: Mamba2Mixer, x: str, length: int, layer: int) -> str:
    taps, bias = _floats(mixer.conv1d.weight)[:, 0], _floats(mixer.conv1d.bias)
    channels, width = taps.shape
    if length == 1:
        name = f"conv{layer}"
        seen = w("Concat", w.place(name, [1, width - 1, channels]), x, axis=1)
        window = _rows(w, seen, 1, width)
        w.give(window, f"next.{name}", [1, width - 1, channels])
    else:
        seen = w("Pad", x, w.constant(np.array([0, width - 1, 0, 0, 0, 0])))
    y = w("Mul", x, w.constant(taps[:, -1]))
    for i in range(width - 1):
        y = w("Add", y, w("Mul", _rows(w, seen, i, i + length), w.constant(taps[:, i])))
    return w("Add", y, w.constant(bias))


def _rows(w: _Writer, x: str, start: int, stop: int) -> str:
    return w("Slice", x, *(w.constant(np.array([value])) for value in (start, stop, 1)))


def _step(w: _Writer, mixer: Mamba2Mixer, x: str, B: str, C: str, dt: str, rates: Floats, layer: int) -> str:
    """h' = e^(dt A) h + dt B x, y = C h', with h [1, H, N, P]."""
    c = mixer.config
    shape = [1, c.n_heads, c.d_state, c.headdim]
    name = f"state{layer}"
    decay = w.reshape(w("Exp", w("Mul", dt, w.constant(rates))), 1, c.n_heads, 1, 1)
    entering = w("Mul", w.reshape(x, 1, c.n_heads, 1, c.headdim), w.reshape(dt, 1, c.n_heads, 1, 1))
    added = w("Mul", w.reshape(B, 1, 1, c.d_state, 1), entering)
    h = w("Add", w("Mul", w.place(name, shape), decay), added)
    w.give(h, f"next.{name}", shape)
    return w.reshape(w("MatMul", w.reshape(C, 1, 1, 1, c.d_state), h), 1, 1, c.d_inner)


def _scan(w: _Writer, mixer: Mamba2Mixer, x: str, B: str, C: str, dt: str, rates: Floats, length: int) -> str:
    c = mixer.config
    H, P, N, count = c.n_heads, c.headdim, c.d_state, length // CHUNK

    def heads(v: str) -> str:
        """[chunks, H, Q, width] of [1, T, H width]."""
        return w("Transpose", w.reshape(v, count, CHUNK, H, -1), perm=[0, 2, 1, 3])

    X = w("Mul", heads(x), heads(dt))
    B_, C_ = w.reshape(B, count, 1, CHUNK, N), w.reshape(C, count, 1, CHUNK, N)
    # Sums of the exponents up to each step, [chunks, H, Q, 1].
    sums = w("CumSum", heads(w("Mul", dt, w.constant(rates))), w.constant(np.array(2)))
    across = w("Transpose", sums, perm=[0, 1, 3, 2])
    mask = np.where(np.tri(CHUNK, dtype=bool), 0.0, -1e30)
    decays = w("Exp", w("Add", w("Sub", sums, across), w.constant(mask)))
    similar = w("MatMul", C_, w("Transpose", B_, perm=[0, 1, 3, 2]))
    y = w("MatMul", w("Mul", decays, similar), X)
    last = w("Slice", sums, *(w.constant(np.array([v])) for v in (CHUNK - 1, CHUNK, 2)))
    weighted = w("Mul", X, w("Exp", w("Sub", last, sums)))
    added = w("MatMul", w("Transpose", B_, perm=[0, 1, 3, 2]), weighted)
    factors = w("Exp", last)

    def chunk(v: str, i: int) -> str:
        return w("Slice", v, *(w.constant(np.array([u])) for u in (i, i + 1, 0)))

    state = w.constant(np.zeros((1, H, N, P)))
    states = [state]
    for i in range(count - 1):
        state = w("Add", w("Mul", state, chunk(factors, i)), chunk(added, i))
        states.append(state)
    before = w("MatMul", C_, w("Concat", *states, axis=0))
    y = w("Add", y, w("Mul", before, w("Exp", sums)))
    return w.reshape(w("Transpose", y, perm=[0, 2, 1, 3]), 1, length, H * P)

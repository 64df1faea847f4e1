"""A byte-level Mamba-2 of ten million parameters in ONNX Runtime on a CPU: integers beside floats, one run.

``python -m benchmarks.onnx_runtime`` measures decoding of one sequence and prefill of 512 tokens on one and
two threads, and the sizes of the files. Results go to
``benchmarks/results/onnx_runtime.json``. The weights are random: what a token costs does not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from benchmarks.float_onnx import float_prefill_onnx, float_step_onnx
from benchmarks.hardware import hardware
from circuits.runtime import OnnxDecoder, OnnxRunner, decoding_onnx, runtime_onnx
from circuits.runtime.runner import session
from mamba_int.float_models.config import MambaConfig
from mamba_int.float_models.models import MambaForCausalLM
from mamba_int.interpreter import evaluate
from quantize.float_mamba import PROVABLE, ConversionConfig, convert

RESULT = Path(__file__).parent / "results" / "onnx_runtime.json"
MODEL = MambaConfig(mixer="mamba2", vocab_size=256, d_model=512, n_layer=6, headdim=64, d_state=64)
"""The shape of the ``char-large`` preset."""
PREFILL = 512
STEPS = 96
"""Of a measurement of decoding: whole chunks."""
ROUNDS = 7
"""Integers and floats take turns; the median counts."""
THREADS = (1, 2)
INT8 = ConversionConfig(seq_len=PREFILL, chunk_size=32)
FORMS = {
    "int8": INT8,
    "int7": dataclasses.replace(INT8, weight_bits=7),
    "int7, 24 bits": dataclasses.replace(PROVABLE, seq_len=PREFILL, pieces=0, chunk_size=32, weight_bits=7),
}
"""Seven bits of weight suit kernels that eight would saturate (``circuits.runtime.operations``); with nothing
beyond 24 bits all products are in float32."""


class FloatDecoder:
    """The float step with its cache bound in two sets of tensors that take turns, as ``OnnxDecoder`` has."""

    def __init__(self, content: bytes, threads: int) -> None:
        self._session, self._turn = session(content, threads), 0
        self._inputs = np.zeros((1, 1), np.int64)
        self._logits = np.zeros(self._session.get_outputs()[0].shape, np.float32)
        shapes = {value.name: value.shape for value in self._session.get_inputs()[1:]}
        sets = [{name: np.zeros(shape, np.float32) for name, shape in shapes.items()} for _ in range(2)]
        self._bindings = [self._bound(sets[i], sets[1 - i]) for i in range(2)]

    def _bound(self, read: dict[str, Any], written: dict[str, Any]) -> Any:
        value, binding = onnxruntime.OrtValue.ortvalue_from_numpy, self._session.io_binding()
        binding.bind_ortvalue_input("input", value(self._inputs))
        binding.bind_ortvalue_output("logits", value(self._logits))
        for name in read:
            binding.bind_ortvalue_input(name, value(read[name]))
            binding.bind_ortvalue_output(f"next.{name}", value(written[name]))
        return binding

    def step(self, tokens: Any) -> Any:
        """Logits [1, vocabulary] of token ids [1]."""
        self._inputs[:, 0] = tokens
        self._session.run_with_iobinding(self._bindings[self._turn])
        self._turn = 1 - self._turn
        return self._logits[:, 0]


def milliseconds(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Of each, the median of rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measure everything, print the table and write the result file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MambaForCausalLM(MODEL).eval()
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (1, PREFILL), generator=random)
    calibration = torch.randint(256, (4, 64), generator=random)
    graphs = {name: convert(model, calibration, config=config).graph for name, config in FORMS.items()}
    prefill, step = float_prefill_onnx(model, PREFILL), float_step_onnx(model)
    result: dict[str, Any] = {
        "hardware": hardware(),
        "model": MODEL.to_dict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prefill_tokens": PREFILL,
        "forms": {"float32": {"step_bytes": len(step), "prefill_bytes": len(prefill)}},
    }
    result["forms"] |= {
        name: {
            "step_bytes": len((files := decoding_onnx(graph)).step) + len(files.chunk_end or b""),
            "prefill_bytes": len(runtime_onnx(graph)),
            "max_bits": graph.max_bits,
        }
        for name, graph in graphs.items()
    }
    sequence = tokens[0].numpy()
    for threads in THREADS:
        float_session = session(prefill, threads)
        decoders: dict[str, Any] = {"float32": FloatDecoder(step, threads)}
        decoders |= {name: OnnxDecoder(graph, 1, threads) for name, graph in graphs.items()}
        runners = {name: OnnxRunner(graph, threads) for name, graph in graphs.items()}

        def steps(decoder: Any) -> Callable[[], None]:
            def run() -> None:
                for token in sequence[:STEPS]:
                    decoder.step([token])

            return run

        def whole(runner: OnnxRunner) -> Callable[[], None]:
            return lambda: void(runner(tokens.numpy()))

        if threads == 1:
            result["checks"] = check(model, graphs, tokens, float_session, decoders, runners)
        taken = milliseconds({name: steps(decoder) for name, decoder in decoders.items()})
        runs: dict[str, Callable[[], None]] = {
            "float32": lambda found=float_session: void(found.run(None, {"input": tokens.numpy()}))  # type: ignore[misc]
        }
        filled = milliseconds(runs | {name: whole(runner) for name, runner in runners.items()})
        for name, row in result["forms"].items():
            row[f"decode_ms_{threads}"] = round(taken[name] / STEPS, 4)
            row[f"prefill_ms_{threads}"] = round(filled[name], 2)
    base = dict(result["forms"]["float32"])
    print(f"{'':14}" + "".join(f"{key:>16}" for key in base))
    for name, row in result["forms"].items():
        row["times_smaller"] = round(base["step_bytes"] / row["step_bytes"], 2)
        for key in [key for key in base if "_ms_" in key]:
            row[f"{key}_times_faster"] = round(base[key] / row[key], 2)
        print(f"{name:14}" + "".join(f"{row[key]:16}" for key in base if key in row), flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def void(value: object) -> None:
    """Forget a result."""


def check(
    model: MambaForCausalLM,
    graphs: dict[str, Any],
    tokens: torch.Tensor,
    float_session: Any,
    decoders: dict[str, Any],
    runners: dict[str, OnnxRunner],
) -> dict[str, Any]:
    """That everything computes what it should: the float files the model, the integers the specification.

    Raises:
        AssertionError: if not.
    """
    with torch.no_grad():
        exact = model(tokens).logits.numpy()
    (found,) = float_session.run(["logits"], {"input": tokens.numpy()})
    np.testing.assert_allclose(found, exact, atol=1e-4)
    sequence = tokens[0].numpy()
    stepped = np.stack([decoders["float32"].step([token]).copy() for token in sequence], 1)
    np.testing.assert_allclose(stepped, exact, atol=1e-4)
    compared = differing = 0
    for name, graph in graphs.items():
        logits = runners[name](tokens.numpy())
        stepped = np.stack([decoders[name].step([token]) for token in sequence], 1)
        decoders[name].reset()
        exact_start = evaluate(graph, tokens[:, :48].numpy())
        for one, other in ((logits[:, :48], exact_start), (stepped, logits)):
            compared += one.size
            differing += int(np.count_nonzero(one != other))
    assert differing == 0
    return {
        "float_error": float(np.abs(found - exact).max()),
        "integers_compared": compared,
        "integers_that_differ": differing,
    }


if __name__ == "__main__":
    main()

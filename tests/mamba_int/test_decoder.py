"""Token by token is the whole run: every integer of it, at any position, from any state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_int.decoder import Decoder
from mamba_int.decoding_state import DecodingState
from mamba_int.errors import MambaintError
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate, evaluate_step
from mamba_int.operations import OPERATIONS
from quantize.float_mamba import ConversionConfig
from tests.circuits.conftest import GRAPHS
from tests.circuits_runtime.models import random_graph
from tests.mamba_int.graphs import random_batch, scan_graph, traced
from tests.quantize.test_float_mamba import converted

TEXT: dict[str, Any] = {"task": "language_model", "vocab_size": 11, "seq_len": 13, "chunk_size": 4}
CAUSAL = [name for name in GRAPHS if not any(node.op == "reduce" for node in GRAPHS[name]().nodes)]

FORMS = st.fixed_dictionaries(
    {
        "seq_len": st.integers(1, 14),
        "chunk_size": st.integers(1, 6),
        "d_conv": st.integers(1, 7),
        "n_layer": st.integers(1, 2),
        "headdim": st.sampled_from([2, 8, 16]),
        "d_state": st.sampled_from([2, 6]),
        "activation": st.sampled_from(["relu", "squareplus"]),
        "gate": st.sampled_from(["hard_silu", "algebraic", "hard_sigmoid"]),
        "rotation": st.sampled_from(["table", "shear", "none"]),
        "weights": st.sampled_from(["ternary", "int8"]),
        "activate_BC": st.booleans(),
        "conv_bias": st.booleans(),
    }
)


def language_model(seed: int = 0, **forms: Any) -> tuple[Graph, IntArray]:
    return random_graph(seed, **(TEXT | forms))


def at_step(graph: Graph, whole: dict[str, IntArray], t: int) -> dict[str, IntArray]:
    """What a whole run has for step t under every name, cut to what has a step form."""
    found = {}
    for name, value in whole.items():
        owner, _, inner = name.rpartition(".")
        if name not in graph.by_name and owner in graph.by_name and graph.by_name[owner].op == "scan":
            found[name] = value[:, t]
            continue
        if owner not in graph.by_name or name in graph.by_name or graph.by_name[owner].op != "ssd":
            found[name] = value[:, t : t + 1]
            continue
        Q = graph.by_name[owner].integer("chunk_size")
        c, j = divmod(t, Q)
        if inner in ("A", "M"):
            found[name] = value[:, c, :, j]
        elif inner == "G":
            found[name] = value[:, c, j]
        elif inner == "u":
            found[name] = value[:, c, :, :, j]
        elif inner == "A_u":
            found[name] = value[:, c, :, j]
        elif j == Q - 1 and c < value.shape[1]:
            found[name] = value[:, c]
    return found


def assert_step_is_of_the_whole(
    graph: Graph, whole: dict[str, IntArray], t: int, step: dict[str, Any]
) -> None:
    wanted = at_step(graph, whole, t)
    assert wanted.keys() <= step.keys()
    for name, value in wanted.items():
        found = np.asarray(step[name])
        if found.shape != value.shape:
            # A sequence shorter than a chunk has rows as short as itself; the rest has not come yet.
            assert not found[..., value.shape[-1] :].any(), (name, t)
            found = found[..., : value.shape[-1]]
        np.testing.assert_array_equal(found, value, err_msg=f"{name} at {t}")


def assert_same_state(found: DecodingState, wanted: DecodingState) -> None:
    np.testing.assert_array_equal(found.position, wanted.position)
    assert found.memories.keys() == wanted.memories.keys()
    for node, memory in wanted.memories.items():
        for name, value in memory.items():
            np.testing.assert_array_equal(found.memories[node][name], value, err_msg=f"{node}.{name}")


def rows_of(state: DecodingState, rows: list[int]) -> DecodingState:
    memories = {
        node: {name: value[rows] for name, value in memory.items()} for node, memory in state.memories.items()
    }
    return DecodingState(state.model_id, state.position[rows], memories, state.initial)


def stepped(graph: Graph, prompt: IntArray) -> DecodingState:
    """The specification's state after a prompt [T, ...]."""
    state = DecodingState.of(graph, 1)
    for step in prompt:
        evaluate_step(graph, step[None], state)
    return state


# -- equality with the whole run --------------------------------------------------------------------------


@given(FORMS, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_integer_of_every_step_is_of_the_whole_run(forms: dict[str, Any], seed: int) -> None:
    graph, inputs = language_model(seed % 7, **forms)
    whole = traced(graph, inputs)
    state, decoder = DecodingState.of(graph, len(inputs)), Decoder(graph, len(inputs))
    for t in range(inputs.shape[1]):
        reference: dict[str, IntArray] = {}
        trace: dict[str, torch.Tensor] = {}
        logits = evaluate_step(graph, inputs[:, t], state, reference)
        found = decoder.step(inputs[:, t], trace)
        np.testing.assert_array_equal(logits, whole[graph.output][:, t])
        np.testing.assert_array_equal(found.numpy(), logits)
        assert_step_is_of_the_whole(graph, whole, t, reference)
        assert_step_is_of_the_whole(graph, whole, t, trace)
    assert_same_state(decoder.snapshot(), state)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_causal_operation_escapes_the_step_form(name: str) -> None:
    graph = GRAPHS[name]()
    inputs = random_batch(graph, seed=3)
    whole = evaluate(graph, inputs)
    state, decoder = DecodingState.of(graph, len(inputs)), Decoder(graph, len(inputs))
    for t in range(graph.seq_len):
        np.testing.assert_array_equal(evaluate_step(graph, inputs[:, t], state), whole[:, t])
        np.testing.assert_array_equal(decoder.step(inputs[:, t]).numpy(), whole[:, t])


def test_the_causal_graphs_hold_every_operation_but_reduce() -> None:
    held = {node.op for name in CAUSAL for node in GRAPHS[name]().nodes}
    assert held == {name for name, operation in OPERATIONS.items() if operation.causal}
    assert OPERATIONS.keys() - held == {"reduce"}


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_scans_at_extreme_decays_and_turns_step_exactly(chunk: int, length: int, seed: int) -> None:
    graph = scan_graph(length, chunk, heads=2, state=4)
    inputs = random_batch(graph, seed)
    whole = traced(graph, inputs)
    state, decoder = DecodingState.of(graph, len(inputs)), Decoder(graph, len(inputs))
    for t in range(length):
        reference: dict[str, IntArray] = {}
        trace: dict[str, torch.Tensor] = {}
        evaluate_step(graph, inputs[:, t], state, reference)
        decoder.step(inputs[:, t], trace)
        assert_step_is_of_the_whole(graph, whole, t, reference)
        assert_step_is_of_the_whole(graph, whole, t, trace)
    prefilled = Decoder(graph, len(inputs))
    prefilled.prefill(list(inputs))
    assert_same_state(prefilled.snapshot(), state)


# -- positions of their own -------------------------------------------------------------------------------


def test_rows_reset_midway_go_on_as_if_new_and_leave_the_others_alone() -> None:
    graph, inputs = language_model(n_layer=2)
    alone = evaluate(graph, inputs)
    for reset_at in (1, 3, 4, 5, 8):
        state, decoder = DecodingState.of(graph, 4), Decoder(graph, 4)
        start = np.zeros(4, np.int64)
        for step in range(13):
            if step == reset_at:
                state.reset([1, 3])
                decoder.reset([1, 3])
                start[[1, 3]] = step
            tokens = np.array([inputs[row, step - start[row]] for row in range(4)])
            wanted = [alone[row, step - start[row]] for row in range(4)]
            np.testing.assert_array_equal(evaluate_step(graph, tokens, state), wanted)
            np.testing.assert_array_equal(decoder.step(tokens).numpy(), wanted)
        assert_same_state(decoder.snapshot(), state)
        assert decoder.inspect()["position"] == (13 - start).tolist()


def test_a_wrong_position_after_reset_is_noticed() -> None:
    # What the rotation and the chunk's end do depends on it: the tests above would see a stale one.
    graph, inputs = language_model()
    whole = evaluate(graph, inputs)
    for stale in (1, 2, 3):
        state = DecodingState.of(graph, len(inputs))
        state.position += stale
        logits = [evaluate_step(graph, inputs[:, t], state) for t in range(8)]
        assert (np.stack(logits, 1) != whole[:, :8]).any()


@pytest.mark.parametrize("kept", [("window",), ("H",), ("A", "x", "B_hat", "B_next")])
def test_memory_that_is_not_reset_is_noticed(kept: tuple[str, ...]) -> None:
    graph, inputs = language_model(n_layer=1)
    state = DecodingState.of(graph, len(inputs))
    # Two chunks, so that there is a state, and three steps of the third.
    for t in range(11):
        evaluate_step(graph, inputs[:, t], state)
    forgetful = state.copy()
    forgetful.reset()
    assert_same_state(forgetful, DecodingState.of(graph, len(inputs)))
    for node, memory in state.memories.items():
        for name in memory.keys() & set(kept):
            forgetful.memories[node][name][:] = memory[name]
    logits = [evaluate_step(graph, inputs[:, t], forgetful) for t in range(13)]
    assert (np.stack(logits, 1) != evaluate(graph, inputs)).any()


# -- prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 16])
@pytest.mark.parametrize("d_conv", [1, 4, 9])
def test_prompts_of_all_lengths_in_one_batch_leave_what_stepping_leaves(chunk_size: int, d_conv: int) -> None:
    graph, inputs = language_model(chunk_size=chunk_size, d_conv=d_conv)
    prompts = [inputs[length % len(inputs), :length] for length in (1, 2, 3, 4, 5, 8, 9, 12, 13)]
    decoder = Decoder(graph, len(prompts))
    logits = decoder.prefill(prompts)
    state = decoder.snapshot()
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(logits[row].numpy(), evaluate(graph, prompt[None])[0, -1])
        assert_same_state(rows_of(state, [row]), stepped(graph, prompt))


def test_prompts_run_in_groups_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = language_model()
    prompts = [inputs[i % len(inputs), : 1 + 5 * i % 13] for i in range(9)]
    together, apart = Decoder(graph, 9), Decoder(graph, 9)
    wanted = together.prefill(prompts)
    monkeypatch.setattr("mamba_int.decoder.PREFILL_STEPS", 20)
    np.testing.assert_array_equal(apart.prefill(prompts).numpy(), wanted.numpy())
    assert_same_state(apart.snapshot(), together.snapshot())


@pytest.mark.parametrize("running", [3, 4, 5, 8])
def test_starting_one_row_leaves_the_running_ones_alone(running: int) -> None:
    # At 4 and 8 the running row has just closed a chunk, which must not be closed twice.
    graph, inputs = language_model()
    decoder = Decoder(graph, 3)
    for t in range(running):
        decoder.step(inputs[:3, t])
    before = decoder.snapshot()
    decoder.prefill([inputs[4, :4], inputs[5, :7]], rows=[2, 0])
    after = decoder.snapshot()
    assert_same_state(rows_of(after, [1]), rows_of(before, [1]))
    assert_same_state(rows_of(after, [2]), stepped(graph, inputs[4, :4]))
    assert_same_state(rows_of(after, [0]), stepped(graph, inputs[5, :7]))


def test_what_follows_a_prompt_does_not_leak_into_it() -> None:
    graph, inputs = language_model()
    alone, padded = Decoder(graph, 1), Decoder(graph, 2)
    alone.prefill([inputs[2, :5]])
    padded.prefill([inputs[2, :5], inputs[1]])
    assert_same_state(rows_of(padded.snapshot(), [0]), alone.snapshot())
    wanted, found = alone.step(inputs[3, :1]), padded.step(inputs[3, [0, 1]])
    np.testing.assert_array_equal(found[:1].numpy(), wanted.numpy())


def test_starting_again_forgets_everything() -> None:
    graph, inputs = language_model()
    decoder = Decoder(graph, 2)
    decoder.prefill([inputs[0], inputs[1, :6]])
    decoder.prefill([inputs[2, :3], inputs[3, :4]])
    assert_same_state(rows_of(decoder.snapshot(), [0]), stepped(graph, inputs[2, :3]))
    assert_same_state(rows_of(decoder.snapshot(), [1]), stepped(graph, inputs[3, :4]))


# -- the state --------------------------------------------------------------------------------------------


def test_state_neither_grows_nor_moves() -> None:
    graph, inputs = language_model()
    decoder = Decoder(graph, 2)
    bytes_before = decoder.inspect()["bytes"]
    tensors = [value for memory in decoder.state.memories.values() for value in memory.values()]
    places = [value.data_ptr() for value in (decoder.state.position, *tensors)]
    decoder.prefill([inputs[0], inputs[1, :2]])
    for t in range(40):
        decoder.step(inputs[:2, t % 13])
    decoder.reset([0])
    decoder.restore(decoder.snapshot())
    after = [value for memory in decoder.state.memories.values() for value in memory.values()]
    assert decoder.inspect()["bytes"] == bytes_before == decoder.state.nbytes
    assert [value.data_ptr() for value in (decoder.state.position, *after)] == places


def test_inspect_names_every_tensor_and_adds_up() -> None:
    graph, inputs = language_model()
    decoder = Decoder(graph, 2)
    decoder.step(inputs[:2, 0])
    report = decoder.inspect()
    assert (report["batch"], report["position"], report["model_id"]) == (2, [1, 1], graph.model_id)
    names = {f"{tensor['node']}.{tensor['name']}" for tensor in report["tensors"]}
    scan = {f"layer0.ssd.{name}" for name in ("A", "x", "B_hat", "B_next", "H")}
    assert names == scan | {"layer0.conv_x.window", "layer0.conv_BC.window"}
    # float32, and two positions of 8 bytes
    sizes = [4 * int(np.prod(tensor["shape"])) for tensor in report["tensors"]]
    assert [tensor["bytes"] for tensor in report["tensors"]] == sizes
    assert report["bytes"] == sum(sizes) + 16


def test_a_saved_state_goes_on_exactly(tmp_path: Path) -> None:
    graph, inputs = language_model()
    decoder = Decoder(graph, 2)
    decoder.prefill([inputs[0, :6], inputs[1, :3]])
    decoder.snapshot().save(tmp_path / "state")
    copied = decoder.snapshot().copy()
    wanted = [decoder.step(inputs[2:4, t]).numpy() for t in range(5)]
    loaded = DecodingState.load(tmp_path / "state", graph)
    assert_same_state(loaded, copied)
    other = Decoder(graph, 2)
    other.restore(loaded)
    for t in range(5):
        np.testing.assert_array_equal(other.step(inputs[2:4, t]).numpy(), wanted[t])
        np.testing.assert_array_equal(evaluate_step(graph, inputs[2:4, t], loaded), wanted[t])
    assert (copied.position == [6, 3]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("layer0.ssd:H"), "'H' of 'layer0.ssd'"),
        (lambda t: t.update({"layer0.ssd:H": t["layer0.ssd:H"][:, :1].copy()}), "'H' of 'layer0.ssd'"),
        (lambda t: t.update({"layer0.ssd:H": t["layer0.ssd:H"] + (1 << 25)}), "'H' of 'layer0.ssd'"),
        (lambda t: t.update({"layer0.ssd:H": t["layer0.ssd:H"].astype(np.int32)}), "'H' of 'layer0.ssd'"),
        (lambda t: t["layer0.ssd:H"].fill(-(1 << 63)), "'H' of 'layer0.ssd'"),
        (lambda t: t.pop("position"), "positions"),
        (lambda t: t.update({"position": t["position"] - 9}), "positions"),
        (lambda t: t.update({"more": np.zeros(1)}), "'more'"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    graph, _ = language_model()
    path = tmp_path / "state"
    DecodingState.of(graph, 2).save(path)
    tensors = load_file(path)
    change(tensors)
    header = {"mambaint": f'{{"format":"mambaint-decoding-state","model_id":"{graph.model_id}","version":1}}'}
    save_file(tensors, path, header)
    with pytest.raises(MambaintError, match=words):
        DecodingState.load(path, graph)


def test_a_description_nested_beyond_reading_is_refused_in_one_line(tmp_path: Path) -> None:
    graph, _ = language_model()
    save_file({"position": np.zeros(1, np.int64)}, tmp_path / "state", {"mambaint": "[" * 100_000})
    with pytest.raises(MambaintError, match="not valid JSON"):
        DecodingState.load(tmp_path / "state", graph)


def test_states_of_others_are_refused(tmp_path: Path) -> None:
    graph, _ = language_model()
    other, _ = language_model(seed=1)
    DecodingState.of(other, 1).save(tmp_path / "state")
    with pytest.raises(MambaintError, match="not a decoding state of the model"):
        DecodingState.load(tmp_path / "state", graph)
    graph.save(tmp_path / "model.mint")
    with pytest.raises(MambaintError, match="not a decoding state"):
        DecodingState.load(tmp_path / "model.mint", graph)
    with pytest.raises(MambaintError, match="state is of the model"):
        Decoder(graph).restore(DecodingState.of(other, 1))
    with pytest.raises(MambaintError, match="of 3 sequences"):
        Decoder(graph, 2).restore(DecodingState.of(graph, 3))


# -- refusals ---------------------------------------------------------------------------------------------


def test_a_sum_over_time_is_refused_by_name() -> None:
    graph, _ = random_graph()
    for attempt in (lambda: DecodingState.of(graph, 1), lambda: Decoder(graph)):
        with pytest.raises(MambaintError, match=r"'pool' \(reduce\) needs all steps"):
            attempt()


def test_a_scan_without_state_ends_with_its_chunk() -> None:
    single = [make() for make in GRAPHS.values()]
    graph = next(g for g in single if any(n.op == "ssd" and len(n.inputs) == 4 for n in g.nodes))
    chunk = next(node for node in graph.nodes if node.op == "ssd").integer("chunk_size")
    step = random_batch(graph, count=1, seq_len=1)[:1, 0]
    state, decoder = DecodingState.of(graph, 1), Decoder(graph)
    for _ in range(chunk):
        evaluate_step(graph, step, state)
        decoder.step(step)
    for attempt in (lambda: evaluate_step(graph, step, state), lambda: decoder.step(step)):
        with pytest.raises(MambaintError, match=f"beyond the one chunk of {chunk} steps"):
            attempt()
    with pytest.raises(MambaintError, match="beyond the one chunk"):
        decoder.prefill([np.repeat(step, chunk + 1, 0)])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[], [1]], "prompt 0 is empty"),
        ([[1], [1, 11]], "input value 11"),
        ([[1], [1, -1]], "input value -1"),
        ([[1]], "1 prompts for 2 sequences"),
        ([[1], [[1]]], "shape"),
    ],
)
def test_bad_prompts_are_refused_and_change_nothing(prompts: Any, words: str) -> None:
    graph, inputs = language_model()
    decoder = Decoder(graph, 2)
    decoder.prefill(list(inputs[:2, :5]))
    before = decoder.snapshot()
    with pytest.raises(MambaintError, match=words):
        decoder.prefill(prompts)
    assert_same_state(decoder.snapshot(), before)


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, 11], [[1, 2]], 1.5, [0.5, 1]])
def test_bad_steps_are_refused_and_change_nothing(tokens: Any) -> None:
    graph, _ = language_model()
    decoder = Decoder(graph, 2)
    with pytest.raises(MambaintError):
        decoder.step(tokens)
    assert_same_state(decoder.snapshot(), DecodingState.of(graph, 2))


def test_cuda_graphs_elsewhere_are_refused() -> None:
    with pytest.raises(MambaintError, match="no CUDA graphs on the device 'cpu'"):
        Decoder(language_model()[0], cuda_graph=True)


# -- CUDA graphs ------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Collects the names of all tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        indices = args[1] if func.overloadpacket.__name__.startswith("index") and len(args) > 1 else ()
        if isinstance(indices, list | tuple) and any(
            i is not None and i.dtype == torch.bool for i in indices
        ):
            self.names.add("nonzero")
        return func(*args, **(kwargs or {}))


HOST = {"_local_scalar_dense", "item", "nonzero", "lift_fresh", "masked_select", "unique", "_unique2"}
"""What reads a value on the host, copies one from there, or has a shape that depends on values."""


def calls(work: Any) -> set[str]:
    with torch.inference_mode(), Calls() as mode:
        work()
    return mode.names


@pytest.mark.parametrize("name", CAUSAL)
def test_a_step_that_a_cuda_graph_could_not_hold_is_noticed(name: str) -> None:
    graph = GRAPHS[name]()
    decoder = Decoder(graph, 2)
    decoder._advance()
    decoder._end_chunks()
    assert not calls(lambda: (decoder._advance(), decoder._end_chunks())) & HOST


def test_the_check_for_host_reads_sees_them() -> None:
    x = torch.arange(3)
    for work in (lambda: x[0].item(), lambda: x[x > 1], lambda: torch.tensor([1.0])):
        assert calls(work) & HOST


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_replayed_steps_equal_eager_ones_on_the_device(chunk_size: int) -> None:
    graph, inputs = language_model(
        chunk_size=chunk_size, n_layer=2, activation="squareplus", gate="algebraic"
    )
    prompts = [inputs[0, :1], inputs[1, :4], inputs[2, :7]]
    host = Decoder(graph, 3)
    decoders = [Decoder(graph, 3, "cuda"), Decoder(graph, 3, "cuda", cuda_graph=True)]
    for _ in range(2):
        wanted = host.prefill(prompts)
        for decoder in decoders:
            assert (decoder.prefill(prompts).cpu() == wanted).all()
        for t in range(13):
            if t == 6:
                for decoder in (host, *decoders):
                    decoder.reset([1])
            wanted = host.step(inputs[:3, t])
            for decoder in decoders:
                assert (decoder.step(torch.from_numpy(inputs[:3, t]).cuda()).cpu() == wanted).all()
        for decoder in decoders:
            assert_same_state(decoder.snapshot(), host.snapshot())


# -- converted float models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["language", "language_odd", "mamba_language", "quaternion_lite"])
def test_a_converted_float_model_decodes_to_every_integer_of_its_whole_run(name: str) -> None:
    conversion, *_, tokens = converted(name, ConversionConfig(chunk_size=5))
    graph, inputs = conversion.graph, tokens[:3]
    whole = traced(graph, inputs)
    decoder, prefilled = Decoder(graph, 3), Decoder(graph, 3)
    for t in range(inputs.shape[1]):
        step: dict[str, Any] = {}
        decoder.step(inputs[:, t], step)
        assert_step_is_of_the_whole(graph, whole, t, step)
        prefilled.prefill(list(inputs[:, : t + 1]))
        assert_same_state(prefilled.snapshot(), decoder.snapshot())

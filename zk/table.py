"""The lookup table's true edges, found with EZKL itself.

EZKL fills the whole column of a lookup table, whatever range was declared; our gadgets are designed
against the filled column. A new EZKL that filled it differently would make remainder checks forgeable
without any other sign, so the edges are measured before any key is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from circuits.circuit import PublicTensor, table_high, table_low
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json, read_json
from zk import ezkl_calls, field
from zk.settings import canonical_settings, check_settings


def _one_lookup() -> bytes:
    from onnx import TensorProto, helper

    node = helper.make_node("HardSwish", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([node], "edges", [ends[0]], [ends[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    serialised: bytes = model.SerializeToString()
    return serialised


def prepare(
    folder: Path,
    *,
    logrows: int,
    public: tuple[PublicTensor, ...],
    committed: Sequence[int] = (),
    rows: int | None = None,
    lookups: bool = True,
) -> None:
    """Turn ``folder/circuit.onnx`` into guarded, canonical ``settings.json`` and ``model.ezkl``.

    Raises:
        MambaintError: if the guard refuses the settings.
        EzklError: if EZKL cannot read the graph.
    """
    onnx, settings = folder / "circuit.onnx", folder / "settings.json"
    ezkl_calls.gen_settings(onnx, settings, logrows, bool(committed))
    parsed = read_json(settings)
    # gen_settings fits logrows to its own idea; ours was designed together with the multipliers.
    parsed["run_args"]["logrows"] = logrows
    check_settings(
        parsed,
        logrows=logrows,
        public=public,
        committed=committed,
        ezkl_version=ezkl_calls.installed_version(),
        rows=rows,
        lookups=lookups,
    )
    settings.write_bytes(canonical_settings(parsed))
    ezkl_calls.compile_circuit(onnx, folder / "model.ezkl", settings)


def check_edges(folder: Path, logrows: int, committed: bool) -> None:
    """Measure the table of a one-lookup circuit in ``folder`` (an empty scratch folder).

    Args:
        committed: whether inputs are committed, as in the circuit the measurement is for.

    Raises:
        MambaintError: if the table does not end where the gadgets assume.
    """
    folder.mkdir()
    (folder / "circuit.onnx").write_bytes(_one_lookup())
    prepare(folder, logrows=logrows, public=(PublicTensor("y", (1,)),), committed=[1] if committed else [])
    low, high = table_low(logrows), table_high(logrows)
    expected = {low - 1: False, low: True, high: True, high + 1: False}
    for value, inside in expected.items():
        (folder / "input.json").write_bytes(canonical_json({"input_data": [[field.encode(value)]]}))
        outputs = ezkl_calls.gen_witness(
            folder / "input.json", folder / "model.ezkl", folder / "witness.json"
        )
        accepted = ezkl_calls.mock(folder / "witness.json", folder / "model.ezkl")
        exact = field.decode(outputs[0][0]) == max(value, 0)
        if accepted != inside or (inside and not exact):
            raise MambaintError(
                f"EZKL's lookup table for 2^{logrows} rows is not [{low}, {high}]: "
                f"{value} is {'accepted' if accepted else 'refused'} and gives {json.dumps(outputs)}",
                "install the EZKL version that mambaint pins",
            )

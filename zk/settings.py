"""EZKL's circuit settings: what we ask for, the guard on what EZKL made of it, and one canonical form.

EZKL is exact and sound for our circuits only in one corner of its options (see ``docs``): scales 0, no
built-in Freivalds, no range decompositions, one lookup type in one column. Nothing in EZKL enforces that
corner, and a settings file is not authenticated by a proof, so the guard runs before keys are made and
again on every verifier package that is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuits.circuit import PublicTensor, table_low
from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json

WIDTH = 2
"""Cells per row (``num_inner_cols``): the cheapest width measured."""

MARGIN_ROWS = 12
"""Rows of each column that cannot hold cells of the circuit (blinding and padding)."""

SMALLEST_LOGROWS = 8
LARGEST_LOGROWS = 26
"""BN254 ceremonies and EZKL stop there."""

_LOOKUP = {"HardSwish": {"scale": 1.0}}

_LEFT_AS_THEY_ARE = {
    "rebase_scale": None,
    "variables": [["batch_size", 1]],
    "rebase_frac_zero_constants": False,
    "decomp_base": 16384,
    "decomp_legs": 2,
    "bounded_log_lookup": False,
    "epsilon": 2.220446049250313e-16,
}


def chosen_run_arguments(logrows: int, committed: bool) -> dict[str, Any]:
    """The run arguments we set, as they are written in a settings file.

    The declared top of the lookup range only decides the number of table columns (one); EZKL fills the
    column up to ``circuits.circuit.table_high``. It is kept below that true top for every ``logrows``
    from 8 on, so that nothing in EZKL ever asks for a second column.

    Raises:
        MambaintError: if no such circuit can be made at this ``logrows``.
    """
    if not SMALLEST_LOGROWS <= logrows <= LARGEST_LOGROWS:
        raise MambaintError(
            f"a circuit cannot have 2^{logrows} rows (from 2^{SMALLEST_LOGROWS} to 2^{LARGEST_LOGROWS})",
            "choose a model or a segment length that fits",
        )
    return {
        "input_scale": 0,
        "param_scale": 0,
        "scale_rebase_multiplier": 1,
        "lookup_range": [table_low(logrows), (1 << (logrows - 1)) - 192],
        "logrows": logrows,
        "num_inner_cols": WIDTH,
        "input_visibility": "KZGCommit" if committed else "Private",
        "output_visibility": "Public",
        "param_visibility": "Fixed",
        "check_mode": "UNSAFE",
        "ignore_range_check_inputs_outputs": True,
        "disable_freivalds": True,
    }


def run_arguments(logrows: int, committed: bool) -> dict[str, Any]:
    """All run arguments a settings file of ours has: the chosen ones and the defaults we rely on."""
    return {**_LEFT_AS_THEY_ARE, **chosen_run_arguments(logrows, committed)}


def _refuse(reason: str, remedy: str) -> None:
    raise MambaintError(f"EZKL's settings for this circuit are refused: {reason}", remedy)


def _at(settings: dict[str, Any], *path: str) -> Any:
    value: Any = settings
    for key in path:
        if not isinstance(value, dict) or key not in value:
            _refuse(f"{'.'.join(path)} is missing", "install the EZKL version that mambaint pins")
        value = value[key]
    return value


def _same(value: Any, expected: Any) -> bool:
    # 0 == False and 1 == 1.0 in Python; in a settings file they are different values.
    return canonical_json(value) == canonical_json(expected)


def check_settings(
    settings: Any,
    *,
    logrows: int,
    public: Sequence[PublicTensor],
    committed: Sequence[int],
    ezkl_version: str,
    rows: int | None = None,
    lookups: bool = True,
) -> None:
    """Refuse settings under which a proof would not mean what we say it means.

    Args:
        settings: the parsed settings file, with ``run_args.logrows`` already ours.
        logrows: log2 of the rows the circuit was designed for.
        public: the circuit's outputs in order.
        committed: sizes of the inputs the proof commits to, in order; empty where inputs are plainly private.
        ezkl_version: version the settings must have been made by.
        rows: predicted number of rows; None if unknown (a verifier does not know it).
        lookups: whether the circuit may have any (a verifier need not know).

    Raises:
        MambaintError: naming the first setting that is wrong.
    """
    builder = "this is a fault of the circuit builder: report it with the model"
    if not isinstance(settings, dict):
        _refuse("they are not a JSON object", "check that the file is complete and unmodified")
    asked, found = run_arguments(logrows, bool(committed)), _at(settings, "run_args")
    if not isinstance(found, dict) or set(found) != set(asked):
        _refuse(
            "the set of run arguments is not the known one", "install the EZKL version that mambaint pins"
        )
    for name, value in asked.items():
        if not _same(found[name], value):
            _refuse(f"run argument {name} is {found[name]!r} and must be {value!r}", "make the keys again")
    shapes = [list(tensor.shape) for tensor in public]
    exact: list[tuple[tuple[str, ...], Any, str]] = [
        (("version",), ezkl_version, f"install ezkl=={ezkl_version}"),
        (("check_mode",), "UNSAFE", builder),
        (("einsum_params", "total_einsum_col_size"), 0, builder),
        (("required_range_checks",), [], builder),
        (("num_dynamic_lookups",), 0, builder),
        (("total_dynamic_col_size",), 0, builder),
        (("num_shuffles",), 0, builder),
        (("total_shuffle_col_size",), 0, builder),
        (("model_instance_shapes",), shapes, builder),
        (("model_output_scales",), [0] * len(public), builder),
        (("module_sizes", "polycommit"), list(committed), builder),
        (("module_sizes", "poseidon"), [0, [0]], builder),
    ]
    for path, value, remedy in exact:
        actual = _at(settings, *path)
        if not _same(actual, value):
            _refuse(f"{'.'.join(path)} is {actual!r} and must be {value!r}", remedy)
    scales = _at(settings, "model_input_scales")
    if not isinstance(scales, list) or not _same(scales, [0] * len(scales)):
        _refuse(f"model_input_scales is {scales!r} and must be all 0", builder)
    allowed = [[], [_LOOKUP]] if lookups else [[]]
    required = _at(settings, "required_lookups")
    if not any(_same(required, value) for value in allowed):
        _refuse(f"required_lookups is {required!r} and must be one of {allowed!r}", builder)
    _check_size(settings, logrows, public, committed, rows, builder)


def _check_size(
    settings: dict[str, Any],
    logrows: int,
    public: Sequence[PublicTensor],
    committed: Sequence[int],
    rows: int | None,
    builder: str,
) -> None:
    counted = _at(settings, "num_rows")
    constants = _at(settings, "total_const_size")
    if type(counted) is not int or type(constants) is not int:
        _refuse("num_rows and total_const_size must be integers", builder)
    if rows is not None and counted != rows:
        raise MambaintError(
            f"the cost model predicts {rows} rows and EZKL lays out {counted}",
            "this is a fault of the cost model: report it with the model",
        )
    room = (1 << logrows) - MARGIN_ROWS
    largest = max(counted, constants, sum(tensor.size for tensor in public), *committed)
    if largest > room:
        raise MambaintError(
            f"the circuit needs {largest} rows and 2^{logrows} has room for {room}",
            "build the circuit for a larger logrows",
        )


def canonical_settings(settings: dict[str, Any]) -> bytes:
    """One byte string for the same settings: no timestamp, sorted keys.

    EZKL writes the time and the hash-map order of each einsum's dimensions; both change from run to run.
    """
    return canonical_json({**settings, "timestamp": 0})

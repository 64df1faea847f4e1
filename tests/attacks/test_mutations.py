"""Random mutations of both files: never accepted, never anything but a verdict or a clear error."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.files import canonical_json
from tests.zk.conftest import Honest
from zk.package import decode_package
from zk.verify import check

FAST = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "cut", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutated(raw: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    content = bytearray(raw)
    for kind, where, value in edits:
        position = int(where * max(1, len(content)))
        if kind == "flip" and content:
            content[position] ^= value
        elif kind == "insert":
            content.insert(position, value)
        elif kind == "delete":
            del content[position : position + value]
        elif kind == "cut":
            del content[position:]
        elif kind == "copy":
            content[position:position] = content[position : position + value]
    return bytes(content)


@FAST
@given(edits=EDITS)
def test_mutated_proof_bytes_are_never_accepted(honest: Honest, edits: list[tuple[str, float, int]]) -> None:
    raw = mutated(honest.result.file, edits)
    verdict = check(raw, honest.package, hashlib.sha256(honest.package_bytes).hexdigest())
    assert verdict.valid == (raw == honest.result.file)
    assert "\n" not in verdict.reason


@FAST
@given(edits=EDITS)
def test_mutated_package_bytes_are_never_read(honest: Honest, edits: list[tuple[str, float, int]]) -> None:
    raw = mutated(honest.package_bytes, edits)
    if raw == honest.package_bytes:
        return
    with pytest.raises(MambaintError) as caught:
        decode_package(raw, "test")
    assert "\n" not in str(caught.value)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["format", "version", "model_id", "circuit_id", "verifier_package", "public", "segments", "other"]


@FAST
@given(field=st.sampled_from(FIELDS), value=JSON_VALUES)
def test_any_other_value_of_any_field_is_invalid(honest: Honest, field: str, value: Any) -> None:
    content = json.loads(honest.result.file)
    raw = canonical_json({**content, field: value}) + b"\n"
    verdict = check(raw, honest.package, hashlib.sha256(honest.package_bytes).hexdigest())
    assert verdict.valid == (raw == honest.result.file)


@FAST
@given(values=st.lists(st.integers(-(1 << 256), 1 << 256), min_size=3, max_size=3))
def test_no_other_public_values_verify(honest: Honest, values: list[int]) -> None:
    content = json.loads(honest.result.file)
    raw = canonical_json({**content, "public": {"logits": values}}) + b"\n"
    verdict = check(raw, honest.package, hashlib.sha256(honest.package_bytes).hexdigest())
    assert verdict.valid == (values == [2, -21, 20])

"""Files are written whole or not at all, and JSON that two readers could read differently is refused."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_int.errors import MambaintError
from mamba_int.files import (
    canonical_json,
    parse_json,
    read_bytes,
    read_json,
    replacing,
    write_bytes,
    write_json,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- writing --------------------------------------------------------------------------------------------


def test_a_write_replaces_the_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == {"file.bin"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("fault", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_failure_while_writing_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, fault: BaseException
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    wanted = MambaintError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(wanted), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise fault
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file.bin"}


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "write_bytes"])
def test_full_disk_is_a_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(MambaintError, match=r"cannot write .*file\.bin: No space left on device; choose"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file.bin"}


def test_disk_full_in_the_middle_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(MambaintError, match="No space left"), replacing(path) as temporary:
        temporary.write_bytes(b"ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (path.read_bytes(), names(tmp_path)) == (b"old", {"file.bin"})


def test_folder_that_may_not_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # Root may write anywhere, so the refusal is made by hand.
    monkeypatch.setattr("tempfile.mkstemp", refused)
    with pytest.raises(MambaintError, match=r"cannot write .*: Permission denied; choose a writable folder"):
        write_bytes(tmp_path / "file.bin", b"new")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("place", ["file/inside", "folder", "x" * 300])
def test_place_that_is_no_place_for_a_file_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MambaintError, match="cannot write") as caught:
        write_bytes(tmp_path / place, b"new")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"file", "folder"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [float("-inf")]}])
def test_what_json_cannot_say_is_not_written(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)
    assert names(tmp_path) == set()


# -- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["missing", "folder", "file/inside"])
def test_file_that_cannot_be_read_names_itself_and_the_remedy(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for read in (read_bytes, read_json):
        with pytest.raises(MambaintError) as caught:
            read(tmp_path / place, "look elsewhere")
        assert str(tmp_path / place) in caught.value.cause
        assert caught.value.remedy == "look elsewhere"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1, "a": 1}',
        b'{"x": {"a": 1, "b": 2, "a": 3}}',
        b"NaN",
        b"[Infinity]",
        b"[-Infinity]",
        b"1e999",
        b'{"a": [-1e999]}',
        b"[1.5e400]",
        b"9" * 5000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'"\xc3"',
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"[1,]",
        b"{'a': 1}",
        b"01",
        b"// comment\n1",
        b'"\n"',
    ],
    ids=lambda text: repr(text[:14]),
)
def test_json_that_is_not_strict_is_refused_in_one_sentence(text: bytes) -> None:
    with pytest.raises(MambaintError, match=r"^the file is not valid JSON \(") as caught:
        parse_json(text, "the file")
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@given(JSON)
def test_canonical_json_is_read_back_as_it_was(value: Any) -> None:
    content = canonical_json(value)
    assert parse_json(content, "x") == value
    assert content.isascii()
    assert canonical_json(json.loads(content)) == content


def test_canonical_json_does_not_know_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": {"d": 2, "c": "ä"}}) == b'{"a":{"c":"\\u00e4","d":2},"b":1}'
    assert canonical_json({"a": {"c": "ä", "d": 2}, "b": 1}) == canonical_json(
        {"b": 1, "a": {"d": 2, "c": "ä"}}
    )


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_one_sentence(content: bytes) -> None:
    try:
        parse_json(content, "x")
    except MambaintError as error:
        assert "\n" not in str(error)


# -- the error itself -----------------------------------------------------------------------------------


def test_error_keeps_cause_and_remedy_through_pickle() -> None:
    """A worker process hands it to its parent this way."""
    error = pickle.loads(pickle.dumps(MambaintError("the cause", "the remedy")))
    assert type(error) is MambaintError
    assert (error.cause, error.remedy, str(error)) == ("the cause", "the remedy", "the cause; the remedy")

"""Every example of docs/quaternion.md is run, with fewer steps and tokens where that changes no result."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from cli.main import main
from tests.quantize.importers.test_quaternion import checkpoint, saved

DOCUMENT = Path(__file__).parents[2] / "docs" / "quaternion.md"
SMALLER = {
    'from_preset("small", n_layer=6)': 'from_preset("small", n_layer=1)',
    "10000, (4, 512)": "10000, (1, 16)",
    "(2, 64))": "(2, 48))",
    "([2, 64, 10000])": "([2, 48, 10000])",
    "d_model = 192\nn_layer = 6\nd_state = 32": "d_model = 16\nn_layer = 2\nd_state = 4",
    "steps = 1500\nbatch_size = 64": "steps = 3\nbatch_size = 8\nvalidation_tokens = 512",
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Language and text of every block, in order."""
    text = DOCUMENT.read_text()
    for found, smaller in SMALLER.items():
        assert found in text, found
        text = text.replace(found, smaller)
    return BLOCK.findall(text)


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[1] == "train":
        arguments = [*arguments, "--steps", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, arguments


@pytest.mark.usefixtures("references")
def test_an_example_of_the_document_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    saved(tmp_path / "checkpoint.pt", checkpoint(lite=False))
    torch.manual_seed(0)
    runner = doctest.DocTestRunner()
    parser = doctest.DocTestParser()
    names: dict[str, object] = {}
    examples = 0
    for number, (language, text) in enumerate(blocks()):
        if language == "python":
            test = parser.get_doctest(text, names, f"block {number}", str(DOCUMENT), None)
            runner.run(test, clear_globs=False)
            names = test.globs
            failed = runner.summarize(verbose=False).failed
            assert not failed, capsys.readouterr().out
            examples += len(test.examples)
        elif language == "toml":
            name = text.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                run_command(shlex.split(line), monkeypatch)
                examples += 1
    assert examples > 60

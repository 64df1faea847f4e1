"""``mambaint quantize``, ``eval`` and what follows on float checkpoints, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits.runtime import OnnxRunner
from mamba_int.datasets import ClassificationData, DataSource, load_data, source_from_path
from mamba_int.graph import Graph, IntArray
from mamba_int.interpreter import evaluate
from mamba_int.operations.base import Trace
from quantize import quantize
from tests.cli.conftest import Cli
from tests.quantize.float_checkpoints import write_float_run, write_foreign

pytestmark = pytest.mark.usefixtures("references")

DIGITS = DataSource("digits")
TEXT = b"The cat sat on the mat; the dog did not. " * 30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_bytes(TEXT)
    return tmp_path


def csv(path: Path, features: int = 2, classes: str = "abc", steps: int = 3) -> Path:
    """Sequences of real features far from zero, on scales of their own."""
    generator = np.random.default_rng(0)
    rows = [
        (generator.normal(size=(steps, features)) * 10.0 ** np.arange(features) + 50 + 3 * (i % len(classes)))
        for i in range(60)
    ]
    np.savez(path, inputs=np.stack(rows), labels=np.array([classes[i % len(classes)] for i in range(60)]))
    return path


def test_float_run_is_calibrated_on_its_own_data_and_every_command_takes_the_result(
    folder: Path, cli: Cli
) -> None:
    (folder / "run").mkdir()
    write_float_run(folder / "run/checkpoint.safetensors", DIGITS)
    result = cli.json("quantize", "run", "--provable", "--samples", "8")
    assert result["equal_numpy_torch_onnx"] and result["max_bits"] <= 24
    assert {path.name for path in (folder / "run/quantized").iterdir()} == {
        "model.mint",
        "model.onnx",
        "report.json",
        "report.html",
    }
    graph = Graph.load(folder / result["model"])
    data = load_data(DIGITS)
    assert graph.card["dataset"] == {"name": data.name, "fingerprint": data.fingerprint()}
    assert graph.card["classes"] == list("0123456789")
    report = json.loads((folder / "run/quantized/report.json").read_text())
    assert report["model_id"] == result["model_id"] and report["comparison"]["layers"]
    scored = cli.json("eval", result["model"])
    assert scored["accuracy"] == result["test_accuracy"]
    assert cli.json("eval", "run")["accuracy"] == result["float_accuracy"]
    assert isinstance(data, ClassificationData)
    image = data.test_inputs[0]
    (folder / "x.json").write_text(json.dumps({"input_data": [image.flatten().tolist()]}))
    answer = cli.json("run", "--input", "x.json", "--model", result["model"])
    assert answer["outputs"] == evaluate(graph, image.numpy()[None])[0].tolist()
    assert answer["predicted"] in graph.card["classes"]
    assert cli.json("inspect", result["model"])["model_id"] == graph.model_id


def test_calibration_inputs_are_on_the_scale_of_the_training(folder: Path, cli: Cli) -> None:
    """Calibrated on other numbers than it was trained on, a model keeps its shape and loses its accuracy."""
    write_float_run(folder / "run.safetensors", DIGITS)
    result = cli.json("quantize", "run.safetensors", "--out", "q", "--samples", "64")
    report = json.loads((folder / "q/report.json").read_text())
    assert min(layer["sqnr_db"] for layer in report["comparison"]["layers"]) > 20
    assert abs(result["test_accuracy"] - result["float_accuracy"]) < 0.05


def test_foreign_classifier_reads_real_features_after_conversion(folder: Path, cli: Cli) -> None:
    """The file's offsets and scales must be in the graph: the float model knows nothing of them."""
    model = write_foreign(folder / "m", n_features=2, num_labels=3, pooling="mean")
    csv(folder / "d.npz")
    result = cli.json("quantize", "m", "--data", "d.npz", "--out", "q")
    graph = Graph.load(folder / result["model"])
    reals = np.load(folder / "d.npz")["inputs"][:1]
    (folder / "x.json").write_text(json.dumps({"input_data": [reals[0].flatten().tolist()]}))
    answer = cli.json("run", "--input", "x.json", "--model", result["model"])
    with torch.no_grad():
        expected = model(torch.tensor(reals, dtype=torch.float32)).logits[0]
    assert answer["logits"] == pytest.approx(expected.tolist(), abs=0.1)
    assert answer["predicted"] in ("a", "b", "c")
    scored = [cli.json("eval", name, "--data", "d.npz") for name in ("m", result["model"])]
    assert [score["arithmetic"] for score in scored] == ["float", "integer"]
    assert scored[0]["accuracy"] == result["float_accuracy"]
    assert scored[1]["accuracy"] == result["test_accuracy"]
    assert graph.card["dataset"]["name"] == load_data(source_from_path("d.npz")).name


def test_foreign_language_model_of_bytes_is_converted_and_continues_texts(folder: Path, cli: Cli) -> None:
    write_foreign(folder / "m", vocab_size=256, mixer="mamba", d_state=2)
    config = "[conversion]\nweight_bits = 6\n"
    (folder / "c.toml").write_text(config)
    arguments = ("--data", "t.txt", "--seq-len", "12", "--samples", "2", "--config", "c.toml", "--out", "q")
    result = cli.json("quantize", "m", *arguments)
    graph = Graph.load(folder / result["model"])
    assert graph.seq_len == 12 and graph.card["conversion"]["weight_bits"] == 6
    assert 0 < result["test_bits_per_byte"] < 12
    assert cli.json("eval", "m", "--data", "t.txt")["bits_per_byte"] == result["float_bits_per_byte"]
    text = cli.json("generate", "q", "--prompt", "The cat", "--max-tokens", "3", "--greedy")
    tokens = list(b"The cat")
    for token in text["results"][0]["tokens"]:
        inputs: IntArray = np.array(tokens)[None]
        assert token == evaluate(graph, inputs)[0, -1].argmax()
        tokens.append(token)


def test_text_is_read_with_the_tokenizer_that_lies_beside_the_model(folder: Path, cli: Cli) -> None:
    cli("tokenize", "t.txt", "--output", "t.tokens", "--vocab-size", "260")
    definition = load_data(source_from_path("t.tokens")).tokenizer  # type: ignore[union-attr]
    write_foreign(folder / "m", vocab_size=definition.vocab_size)
    arguments = ("--seq-len", "8", "--samples", "2", "--out", "q")
    code, _, fault = cli("quantize", "m", "--data", "t.txt", *arguments)
    assert code == 2 and "no tokenizer.json lies beside it" in fault
    tokens = cli.json("quantize", "m", "--data", "t.tokens", *arguments)
    (folder / "m/tokenizer.json").write_text(json.dumps(definition.definition))
    plain = cli.json("quantize", "m", "--data", "t.txt", *arguments)
    assert plain["tokenizer"] == "q/tokenizer.json"
    assert plain["test_bits_per_byte"] == pytest.approx(tokens["test_bits_per_byte"], rel=0.1)
    assert cli.json("eval", "q", "--data", "t.txt")["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lm"], "--data PATH"),
        (["lm", "--data", "missing.txt"], "cannot read"),
        (["lm", "--data", "d.npz"], "labelled sequences; give a text"),
        (["classes", "--data", "t.txt"], "is text; give a .csv"),
        (["classes", "--data", "wide.npz"], "has 3 features a step, the model 2"),
        (["classes", "--data", "two.npz"], "has 2 classes, the model 3"),
        (["classes", "--data", "d.npz", "--seq-len", "5"], "leave out --seq-len"),
        (["lm", "--data", "t.txt", "--seq-len", "5000"], "give a longer text"),
        (["lm", "--data", "big.tokens"], "has 260 tokens, the model 256"),
        (["lm", "--data", "t.txt", "--format", "minimama"], "did you mean 'minimamba'"),
        (["lm", "--data", "t.txt", "--config", "bad.toml"], "unknown key 'weight_bit'"),
        (["lm", "--data", "t.txt", "--config", "table.toml"], "[conversion]"),
        (["lm", "--data", "t.txt", "--config", "range.toml"], "choose 2 to 12"),
        (["nan", "--data", "t.txt"], "NaN or infinite"),
        (["unknown", "--data", "t.txt"], "no known architecture"),
        (["pickle.pt", "--data", "t.txt"], "pickle"),
        (["run.safetensors", "--data", "t.txt"], "not on the scale"),
        (["mixer.npz", "--data", "d.npz"], "a mixer alone"),
        (["native.safetensors", "--provable"], "leave out --provable"),
        (["native.safetensors", "--weights", "ternary"], "leave out --weights"),
        (["native.safetensors", "--reconstruct"], "leave out --reconstruct"),
        (["native.safetensors", "--finetune", "3"], "leave out --finetune"),
        (["lm", "--data", "t.txt", "--finetune", "3"], "add --weights ternary"),
        (["lm", "--data", "t.txt", "--config", "narrow.toml"], "bits"),
    ],
)
def test_fault_is_one_line_and_nothing_is_written(
    folder: Path, cli: Cli, arguments: list[str], words: str
) -> None:
    make(folder, arguments)
    # The refusal of a native run names the option at hand alone.
    samples = [] if arguments[0].startswith("native") else ["--samples", "2"]
    code, out, fault = cli("quantize", *arguments, *samples, "--out", "q")
    assert (code, out, fault.count("\n")) == (2, "", 1), fault
    assert words in fault and fault.startswith("mambaint: ")
    assert not (folder / "q").exists()


def make(folder: Path, arguments: list[str]) -> None:
    """What a case of the test above reads."""
    from safetensors.torch import save_file

    from tests.quantize.checkpoints import write_checkpoint

    model = arguments[0]
    if model in ("lm", "nan", "unknown"):
        write_foreign(folder / model, vocab_size=256)
    if model == "nan":
        weights = folder / "nan/model.safetensors"
        from safetensors.torch import load_file

        tensors = load_file(weights)
        tensors["backbone.layers.0.mixer.D"][0] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    if model == "unknown":
        (folder / "unknown/config.json").write_text('{"model_type": "llama"}')
    if model == "classes":
        write_foreign(folder / "classes", n_features=2, num_labels=3)
    if model == "pickle.pt":
        import pickle

        (folder / "pickle.pt").write_bytes(pickle.dumps({"weights": print}))
    if model == "run.safetensors":
        write_float_run(folder / "run.safetensors", DIGITS)
    if model == "native.safetensors":
        write_checkpoint(folder / "native.safetensors", DIGITS)
    if model == "mixer.npz":
        E, N, d = 8, 2, 4
        shapes = {
            "in_proj_weight": (2 * E, d),
            "conv1d_weight": (E, 1, 4),
            "conv1d_bias": (E,),
            "x_proj_weight": (1 + 2 * N, E),
            "dt_proj_weight": (E, 1),
            "A_log": (E, N),
            "D": (E,),
            "out_proj_weight": (d, E),
        }
        arrays: dict[str, Any] = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
        np.savez(folder / "mixer.npz", **arrays)
    csv(folder / "d.npz")
    csv(folder / "wide.npz", features=3)
    csv(folder / "two.npz", classes="ab")
    if "big.tokens" in arguments:
        from mamba_int.datasets import write_token_file

        write_token_file([folder / "t.txt"], folder / "big.tokens", vocab_size=260)
    (folder / "bad.toml").write_text("[conversion]\nweight_bit = 6\n")
    (folder / "table.toml").write_text("[model]\nweight_bits = 6\n")
    (folder / "range.toml").write_text("[conversion]\nweight_bits = 60\n")
    (folder / "narrow.toml").write_text("[conversion]\nmax_bits = 16\n")


def test_one_wrong_integer_of_a_converted_model_writes_nothing(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_float_run(folder / "run.safetensors", DIGITS)
    honest = OnnxRunner.__call__

    def lying(self: OnnxRunner, inputs: IntArray, trace: Trace | None = None) -> IntArray:
        if trace is None:
            return honest(self, inputs)
        tensors: dict[str, IntArray] = {}
        logits = honest(self, inputs, tensors)
        tensors["layer0.norm"][-1, 0, 0] += 1
        for name, tensor in tensors.items():
            trace[name] = tensor
        return logits

    monkeypatch.setattr(OnnxRunner, "__call__", lying)
    code, out, fault = cli("quantize", "run.safetensors", "--samples", "2", "--out", "q")
    assert (code, out, fault.count("\n")) == (2, "", 1)
    assert "ONNX Runtime" in fault and "layer0.norm" in fault and not (folder / "q").exists()


def test_every_way_to_ternary_weights_gives_ternary_weights_of_its_own(folder: Path, cli: Cli) -> None:
    """An option that is read and not acted upon would give the weights of the line before."""
    write_float_run(folder / "run.safetensors", DIGITS)
    ways = [[], ["--reconstruct"], ["--finetune", "2"]]
    found = []
    for way in ways:
        result = cli.json(
            "quantize", "run.safetensors", "--weights", "ternary", *way, "--samples", "8", "--out", "q"
        )
        assert result["equal_numpy_torch_onnx"]
        graph = Graph.load(folder / result["model"])
        assert graph.card.get("finetune_steps") == (2 if "--finetune" in way else None)
        nodes = [graph.by_name[f"layer0.{name}_rows"] for name in ("in_proj", "out_proj")]
        weights = [node.constants["weight"] for node in nodes]
        assert all(set(np.unique(weight)) == {-1, 0, 1} for weight in weights)
        found.append(b"".join(weight.tobytes() for weight in weights))
    assert len(set(found)) == len(ways)


def test_data_of_a_float_run_that_changed_is_refused_unless_given(folder: Path, cli: Cli) -> None:
    write_float_run(folder / "lm.safetensors", source_from_path("t.txt"))
    (folder / "t.txt").write_bytes(TEXT + b"!")
    code, _, fault = cli("quantize", "lm.safetensors", "--out", "q")
    assert code == 2 and "has changed since the training" in fault
    assert cli("quantize", "lm.safetensors", "--out", "q", "--data", "t.txt", "--samples", "2")[0] == 0


def test_the_command_and_python_make_one_model(folder: Path, cli: Cli) -> None:
    write_float_run(folder / "run.safetensors", DIGITS)
    code, out, _ = cli("quantize", "run.safetensors", "--samples", "4", "--json", "--out", "q")
    assert code == 0
    assert json.loads(out)["model_id"] == quantize(folder / "run.safetensors", samples=4).model_id


def test_a_large_model_is_compared_on_fewer_steps_but_on_every_tensor(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_float_run(folder / "lm.safetensors", source_from_path("t.txt"))
    whole = json.loads(cli("quantize", "lm.safetensors", "--samples", "2", "--json", "--out", "q")[1])
    monkeypatch.setattr("cli.quantize.LARGE_TEXT", 1 << 30)
    few = json.loads(cli("quantize", "lm.safetensors", "--samples", "2", "--json", "--out", "r")[1])
    assert few["equal_numpy_torch_onnx"] and few["values_compared"] < whole["values_compared"]
    assert few["model_id"] == whole["model_id"]
    honest = OnnxRunner.__call__

    def lying(self: OnnxRunner, inputs: IntArray, trace: Trace | None = None) -> IntArray:
        logits = honest(self, inputs, trace)
        return logits if trace is not None else logits + 1

    monkeypatch.setattr(OnnxRunner, "__call__", lying)
    code, _, fault = cli("quantize", "lm.safetensors", "--samples", "2", "--out", "s")
    assert code == 2 and "model.onnx differs" in fault and not (folder / "s").exists()

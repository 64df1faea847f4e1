"""Training: interruption changes no bit, damage is recognised, and the best weights are the ones kept."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mamba_int.datasets.text_file import split_text
from mamba_int.errors import MambaintError
from mamba_int.training import Progress, TrainingConfig, evaluate, load_checkpoint, train
from mamba_int.training.batches import make_batches
from mamba_int.training.metrics import read_metrics
from mamba_int.training.run import CHECKPOINT_FILE, LAST_FILE, METRICS_FILE, PLOT_FILE, STATE_FILE
from tests.mamba_int.stand_in import (
    RECIPE,
    SOURCE,
    TEXT_RECIPE,
    AlwaysBreaks,
    BreaksAt,
    StandIn,
    assert_same_tensors,
    fit,
    interrupt_at,
    make_config,
    make_data,
    tensors_of,
)

CPU = torch.device("cpu")


# -- resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "averaged", "text"])
@pytest.mark.parametrize("step", [1, 9, 17, 18, 19, 36])
def test_interrupted_training_ends_with_the_same_bits(tmp_path: Path, kind: str, step: int) -> None:
    config, data = RECIPE, None
    if kind == "averaged":
        config = dataclasses.replace(RECIPE, average_from=0.5, schedule="cosine")
    if kind == "text":
        config, data = TEXT_RECIPE, split_text(bytes(range(256)) * 8, "t")
    whole = fit(tmp_path / "whole", config, data=data)
    with pytest.raises(MambaintError, match=f"interrupted after step {step} of 37; .* resume"):
        fit(tmp_path / "parts", config, data=data, progress=interrupt_at(step))
    torch.manual_seed(99)
    parts = fit(tmp_path / "parts", config, data=data)
    assert parts.resumed and not whole.resumed
    assert (parts.test_metric, parts.best_step) == (whole.test_metric, whole.best_step)
    for name in (CHECKPOINT_FILE, LAST_FILE, STATE_FILE):
        assert_same_tensors(tmp_path / "whole" / name, tmp_path / "parts" / name)
    rows, again = (read_metrics(tmp_path / name / METRICS_FILE) for name in ("whole", "parts"))
    assert [row["step"] for row in rows] == [row["step"] for row in again]


def test_killed_training_repeats_the_steps_after_its_last_save(tmp_path: Path) -> None:
    fit(tmp_path / "whole")

    def die(now: Progress) -> None:
        if now.step == 32:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "parts", progress=die)
    with (tmp_path / "parts" / METRICS_FILE).open("a") as log:
        log.write('{"step": 3')
    fit(tmp_path / "parts")
    assert_same_tensors(tmp_path / "whole" / CHECKPOINT_FILE, tmp_path / "parts" / CHECKPOINT_FILE)
    steps = [row["step"] for row in read_metrics(tmp_path / "parts" / METRICS_FILE)]
    assert steps == [row["step"] for row in read_metrics(tmp_path / "whole" / METRICS_FILE)]
    assert steps == sorted(set(steps))


def test_finished_training_is_not_repeated_and_a_lost_checkpoint_is_made_again(tmp_path: Path) -> None:
    first = fit(tmp_path)
    called: list[Progress] = []
    second = fit(tmp_path, progress=called.append)
    assert not called and second.resumed
    assert (second.test_metric, second.best_step) == (first.test_metric, first.best_step)
    (tmp_path / CHECKPOINT_FILE).unlink()
    assert fit(tmp_path).best_step == RECIPE.steps


def test_folder_of_another_run_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    fit(tmp_path)
    before = (tmp_path / CHECKPOINT_FILE).read_bytes()
    other = dataclasses.replace(RECIPE, learning_rate=1e-3, seed=4)
    with pytest.raises(
        MambaintError, match=r"another run \(different: training.learning_rate, training.seed\)"
    ):
        fit(tmp_path, other)
    with pytest.raises(MambaintError, match=r"data\.fingerprint"):
        fit(tmp_path, data=make_data(61))
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == before
    assert not fit(tmp_path, other, restart=True).resumed
    assert load_checkpoint(tmp_path / CHECKPOINT_FILE).training_config == other


def test_signal_handlers_threads_and_random_state_are_given_back(tmp_path: Path) -> None:
    handler, threads, state = signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.get_rng_state()
    with pytest.raises(MambaintError):
        fit(tmp_path, progress=interrupt_at(3))
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_second_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    def twice(now: Progress) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, progress=twice)
    assert fit(tmp_path).resumed


# -- what is kept ---------------------------------------------------------------------------------------


def test_kept_checkpoint_is_the_best_validation_with_frozen_scales(tmp_path: Path) -> None:
    result = fit(tmp_path)
    rows = [row for row in read_metrics(tmp_path / METRICS_FILE) if "validation_accuracy" in row]
    frozen = [row for row in rows if row["step"] > RECIPE.steps // 2]
    best = max(frozen, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    assert result.best_step == best["step"]
    kept = load_checkpoint(result.checkpoint)
    assert kept.results["validation_accuracy"] == best["validation_accuracy"] == result.validation_metric
    assert kept.results["test_accuracy"] == result.test_metric
    assert bool(kept.model_state["frozen"])
    assert load_checkpoint(result.last_checkpoint).results["step"] == RECIPE.steps
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_checkpoint_gives_back_the_model_the_data_and_the_integers(tmp_path: Path) -> None:
    data = make_data()
    result = fit(tmp_path, data=data)
    kept = load_checkpoint(result.checkpoint)
    assert kept.model_config == make_config(data)
    assert kept.training_config == RECIPE
    assert kept.data.source == SOURCE
    assert kept.data.fingerprint == data.fingerprint()
    assert (kept.data.class_names, kept.data.input_low, kept.data.input_high) == (("c0", "c1", "c2"), 0, 16)
    model = StandIn(kept.model_config, 0)
    model.load_state_dict(kept.model_state)
    assert torch.equal(model.frozen_integers()["weight"], kept.integers["weight"])
    assert evaluate(model, data, "test", CPU).metric == result.test_metric


def test_average_and_not_the_last_weights_are_kept_when_averaging(tmp_path: Path) -> None:
    config = dataclasses.replace(RECIPE, average_from=0.5, validate_every=37)
    fit(tmp_path / "averaged", config)
    kept = tensors_of(tmp_path / "averaged" / LAST_FILE)["model.weight"]
    state = tensors_of(tmp_path / "averaged" / STATE_FILE)
    assert torch.equal(kept, state["average.0"])
    assert not torch.equal(kept, state["model.weight"])
    # Averaging only looks at the weights: the trajectory is that of a run without it.
    fit(tmp_path / "plain", dataclasses.replace(RECIPE, validate_every=37))
    assert torch.equal(state["model.weight"], tensors_of(tmp_path / "plain" / STATE_FILE)["model.weight"])


def test_float_twin_has_no_integers_and_its_own_learning_rate(tmp_path: Path) -> None:
    twin = dataclasses.replace(RECIPE, twin_learning_rate=3e-3).twin()
    assert (twin.learning_rate, RECIPE.twin().learning_rate) == (3e-3, 1e-2)
    result = fit(tmp_path, twin, arithmetic="float")
    assert load_checkpoint(result.checkpoint).integers == {}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs_still_end_with_a_frozen_checkpoint(tmp_path: Path, steps: int) -> None:
    result = fit(tmp_path, dataclasses.replace(RECIPE, steps=steps, freeze_at=1.0, validate_every=0))
    assert result.best_step == steps


def test_no_pickle_is_written(tmp_path: Path) -> None:
    fit(tmp_path)
    names = {CHECKPOINT_FILE, LAST_FILE, STATE_FILE, METRICS_FILE, PLOT_FILE}
    assert {path.name for path in tmp_path.iterdir()} == names


# -- faults while training ------------------------------------------------------------------------------


def test_one_bad_batch_is_left_out_and_spoils_nothing(tmp_path: Path) -> None:
    result = fit(tmp_path, build_model=BreaksAt)
    kept = load_checkpoint(result.last_checkpoint)
    assert kept.results["step"] == RECIPE.steps
    assert all(tensor.isfinite().all() for tensor in kept.model_state.values())


def test_lasting_divergence_stops_with_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(MambaintError, match=r"3 batches .* not finite.* at step 9; lower learning_rate"):
        fit(tmp_path, build_model=AlwaysBreaks)
    assert all(tensor.isfinite().all() for tensor in tensors_of(tmp_path / STATE_FILE).values())


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    called: list[Progress] = []
    with pytest.raises(MambaintError, match=r"cannot (write|remove|read)"):
        fit(tmp_path / place, progress=called.append)
    assert not called
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_leaves_the_last_state_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.write_bytes

    def full(path: Path, content: Any) -> int:
        if path.name.startswith(f".{CHECKPOINT_FILE}"):
            original(path, content[:100])
            raise OSError(28, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MambaintError, match="No space left on device"):
        fit(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {STATE_FILE, METRICS_FILE}
    monkeypatch.undo()
    assert fit(tmp_path).resumed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_classes": 4}, "n_classes = 4, the data made has 3"),
        ({"seq_len": 5}, "seq_len = 5"),
        ({"input_high": 15}, "input_high = 15"),
        ({"task": "language_model"}, "task = language_model"),
    ],
)
def test_model_that_does_not_fit_the_data_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    data = make_data()
    config = dataclasses.replace(make_config(data), **changes)
    with pytest.raises(MambaintError, match=words):
        train(config, RECIPE, data, SOURCE, tmp_path, build_model=StandIn)


def test_shift_that_would_leave_the_domain_and_short_text_are_refused(tmp_path: Path) -> None:
    data = dataclasses.replace(make_data(), input_low=1)
    with pytest.raises(MambaintError, match=r"outside the inputs 1\.\.16"):
        make_batches(data, RECIPE, CPU)
    text = split_text(bytes(100), "t")
    with pytest.raises(MambaintError, match="85 tokens, too few for a window of 128"):
        make_batches(text, TrainingConfig(), CPU)
    with pytest.raises(MambaintError, match="device 'gpu'"):
        fit(tmp_path, device="gpu")


# -- damaged files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("run")).checkpoint


def with_description(path: Path, target: Path, change: Any) -> Path:
    """Rewrite the description inside a checkpoint."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header["__metadata__"]["mambaint"])
    change(description)
    header["__metadata__"]["mambaint"] = json.dumps(description)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="other"), "is not a checkpoint but 'other'"),
        (lambda d: d.update(version=1), "checkpoint version 1, this program reads 2"),
        (lambda d: d.update(extra=1), "unknown entry 'extra'"),
        (lambda d: d.pop("data"), "lacks the entry 'data'"),
        (lambda d: d.update(results=[]), "a list as 'results'"),
        (lambda d: d["results"].update(speed=1), "unexpected results"),
        (lambda d: d["model"].update(d_modell=1), "unknown key 'd_modell'; did you mean 'd_model'"),
        (lambda d: d["training"].update(stepps=1), "unknown key 'stepps'; did you mean 'steps'"),
        (lambda d: d["data"].pop("name"), "lacks the entry 'name'"),
        (lambda d: d["data"].update(feature_scale=[1.0]), "inconsistent"),
        (lambda d: d["data"].update(feature_scale=["1", "1", "1"]), "inconsistent"),
        (lambda d: d["data"]["source"].update(kind="x"), r"\[data\] kind"),
        (lambda d: d["data"].update(tokenizer={"kind": "words"}), "holds no tokenizer"),
    ],
)
def test_altered_description_is_refused(checkpoint: Path, tmp_path: Path, change: Any, words: str) -> None:
    assert load_checkpoint(with_description(checkpoint, tmp_path / "same.safetensors", lambda d: None))
    path = with_description(checkpoint, tmp_path / "c.safetensors", change)
    with pytest.raises(MambaintError, match=words):
        load_checkpoint(path)


def test_foreign_tensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    for name, tensor in (
        ("weight", torch.zeros(2)),
        ("integer.weight", torch.zeros(2)),
        ("model.weight", torch.tensor([math.nan])),
        ("model.", torch.zeros(1)),
    ):
        path = tmp_path / "c.safetensors"
        path.write_bytes(safetensors.torch.save({**tensors_of(checkpoint), name: tensor}, metadata))
        with pytest.raises(MambaintError, match=f"unexpected or non-finite tensor '{name}'"):
            load_checkpoint(path)


def test_file_of_another_program_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    cases = {
        "a.safetensors": (safetensors.torch.save({"w": torch.zeros(2)}), "not written by mambaint"),
        "b.safetensors": (b"", "damaged or not a safetensors"),
        "c.safetensors": (b"PK\x03\x04" + bytes(100), "damaged or not a safetensors"),
        "d.pt": (checkpoint.read_bytes(), "is a pickle"),
        "e.safetensors": ((checkpoint.parent / STATE_FILE).read_bytes(), "'mambaint-training-state'"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MambaintError, match=words):
            load_checkpoint(tmp_path / name)
    with pytest.raises(MambaintError, match="cannot read"):
        load_checkpoint(tmp_path / "missing.safetensors")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_damaged_checkpoint_fails_with_one_sentence_only(
    checkpoint: Path, tmp_path: Path, draw: st.DataObject
) -> None:
    content = bytearray(checkpoint.read_bytes())
    if draw.draw(st.booleans()):
        content = content[: draw.draw(st.integers(0, len(content) - 1))]
        truncated = True
    else:
        content[draw.draw(st.integers(0, len(content) - 1))] ^= draw.draw(st.integers(1, 255))
        truncated = False
    path = tmp_path / "c.safetensors"
    path.write_bytes(bytes(content))
    try:
        load_checkpoint(path)
    except MambaintError as error:
        assert "\n" not in str(error)
    else:
        assert not truncated


def test_damaged_state_is_refused_and_restart_helps(tmp_path: Path) -> None:
    fit(tmp_path)
    state = tmp_path / STATE_FILE
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(MambaintError, match="--restart"):
        fit(tmp_path)
    assert not fit(tmp_path, restart=True).resumed


# -- recipe, batches, evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0, "epochs": 0},
        {"steps": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"beta2": 1.0},
        {"freeze_at": 1.5},
        {"average_from": 0.2},
        {"schedule": "step"},
        {"seed": -1},
        {"batch_size": True},
        {"label_smoothing": 1.0},
        {"gradient_clip": 0.0},
        {"micro_batches": 0},
        {"final_rate": 1.0},
        {"decay_rate_factor": 0.0},
        {"non_finite_limit": 0},
        {"weight_decay_on": "none"},
    ],
)
def test_impossible_recipe_is_refused_by_key(values: dict[str, Any]) -> None:
    with pytest.raises(MambaintError, match=r"\[training\] "):
        TrainingConfig.from_dict(values)


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    data = make_data(64)
    batches = make_batches(data, dataclasses.replace(RECIPE, shift_augmentation=0), CPU)
    epochs = [torch.cat([batches.at(4 * e + i)[0] for i in range(4)]) for e in range(2)]
    rows = sorted(data.train_inputs.flatten(1).tolist())
    assert [sorted(epoch.flatten(1).tolist()) for epoch in epochs] == [rows, rows]
    assert not torch.equal(*epochs)


def test_targets_are_the_next_bytes() -> None:
    text = split_text(bytes(i % 251 for i in range(3000)), "t")
    inputs, targets = make_batches(text, TEXT_RECIPE, CPU).at(3)
    assert inputs.shape == targets.shape == (16, 8)
    assert torch.equal((inputs + 1) % 251, targets)


def test_bits_per_byte_of_a_uniform_model_is_eight() -> None:
    text = split_text(bytes(range(256)) * 8, "t")
    model = StandIn(make_config(text), 0)
    nn.init.zeros_(model.weight)
    for window, limit in ((32, None), (1024, None), (7, 20)):
        score = evaluate(model, text, "test", CPU, window, limit)
        assert score.metric == pytest.approx(8.0)


@pytest.mark.gpu
def test_training_on_a_gpu_resumes_and_its_checkpoint_scores_the_same_on_the_cpu(tmp_path: Path) -> None:
    from mamba_int.model import MambaInt

    data = make_data()
    options: dict[str, Any] = {"data": data, "build_model": MambaInt, "device": "cuda"}
    with pytest.raises(MambaintError, match="interrupted after step 7"):
        fit(tmp_path, progress=interrupt_at(7), **options)
    result = fit(tmp_path, **options)
    assert result.resumed
    kept = load_checkpoint(result.checkpoint)
    model = MambaInt(kept.model_config, 0)
    model.load_state_dict(kept.model_state)
    assert evaluate(model, data, "test", CPU).metric == result.test_metric

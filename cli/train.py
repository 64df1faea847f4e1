"""``mambaint train``: train an integer model, and its float twin beside it if asked, or a float model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.terminal import live_console

if TYPE_CHECKING:
    from mamba_int.training import ModelConfig, Progress, TrainingConfig, TrainingResult

RUNS = Path("runs")
TWIN_FOLDER = "float-twin"


@contextmanager
def _progress_bar(label: str, to_stderr: bool, silent: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A live bar where there is a terminal to draw it on; otherwise nothing."""
    console = None if silent else live_console(to_stderr)
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None, numbers="")

        def show(now: Progress) -> None:
            quality = (
                f"acc {now.accuracy:.3f}"
                if now.accuracy is not None
                else f"{now.bits_per_byte:.3f} bits/byte"
            )
            validation = f"  val {now.validation:.3f}" if now.validation is not None else ""
            numbers = f"loss {now.loss:.3f}  {quality}{validation}  {now.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=now.step, total=now.steps, numbers=numbers)

        yield show


def _report(result: TrainingResult, twin: TrainingResult | None) -> dict[str, Any]:
    name = result.metric_name
    return {
        f"test_{name}": result.test_metric,
        f"validation_{name}": result.validation_metric,
        f"float_twin_{name}": twin.test_metric if twin else None,
        "train_seconds": round(result.train_seconds, 2),
        "checkpoint": str(result.checkpoint),
        "steps": result.steps,
        "best_step": result.best_step,
        "seed": result.seed,
        "resumed": result.resumed,
    }


def _show(report: dict[str, Any], name: str) -> None:
    unit = "accuracy" if name == "accuracy" else "bits per byte"
    lines = [
        (f"test {unit}", f"{report[f'test_{name}']:.4f}"),
    ]
    if report[f"validation_{name}"] is not None:
        lines.append((f"validation {unit}", f"{report[f'validation_{name}']:.4f}"))
    if report[f"float_twin_{name}"] is not None:
        lines.append((f"float twin, test {unit}", f"{report[f'float_twin_{name}']:.4f}"))
    resumed = ", resumed" if report["resumed"] else ""
    lines += [
        (
            "trained",
            f"{report['steps']} steps in {report['train_seconds']:.1f} s (seed {report['seed']}{resumed})",
        ),
        ("checkpoint", f"{report['checkpoint']} (step {report['best_step']})"),
    ]
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        click.echo(f"{label:<{width}}  {value}")


@click.command("train")
@click.option(
    "--preset", metavar="NAME", help="One that ships: digits (default), char, digits-mamba2, char-mamba2, ..."
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Tables [model], [training], [data]; overrides the preset key by key.",
)
@click.option(
    "--data",
    "data_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Your own data: .csv, .npz, .ts (UEA/UCR), .tokens (see mambaint tokenize), or any other as text.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Run folder [default: runs/<preset>]."
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of weights, data order and augmentation.")
@click.option("--steps", type=click.IntRange(min=1), help="Training steps, instead of the preset's length.")
@click.option("--twin/--no-twin", default=False, help="Also train the float twin, for comparison.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard, into the run folder.")
@click.option("--restart", is_flag=True, help="Discard what an earlier run left in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    preset: str | None,
    config_path: Path | None,
    data_path: Path | None,
    out: Path | None,
    seed: int | None,
    steps: int | None,
    twin: bool,
    device: str,
    tensorboard: bool,
    restart: bool,
    as_json: bool,
) -> int:
    """Train an integer Mamba model, or a float one to convert later.

    Without options: the digits preset, half a minute. Interrupt with Ctrl-C at any time; the same
    command resumes, with the same result as if it had not been interrupted.

    A [model] table with a mixer (mamba, mamba2, complex_mamba, quaternion) is of a float model, as are the
    presets whose names end in one; mambaint quantize converts it.

    Several GPUs: torchrun --nproc-per-node N -m cli.main train ...
    """
    from mamba_int.datasets import load_data
    from mamba_int.errors import MambaintError
    from mamba_int.experiment import resolve
    from mamba_int.training import joined, train
    from quantize.latest import remember_checkpoint

    first = True
    try:
        with joined(device) as (ranks, chosen):
            first = ranks.first
            with ranks.agreed():
                experiment = resolve(preset, config_path, data_path, seed, steps)
                if twin:
                    experiment.require_twin()
                data = load_data(experiment.source)
            folder = out if out is not None else RUNS / experiment.name

            def train_as(
                model: ModelConfig, recipe: TrainingConfig, into: Path, label: str
            ) -> TrainingResult:
                with _progress_bar(label, as_json, not first) as progress:
                    return train(
                        model,
                        recipe,
                        data,
                        experiment.source,
                        into,
                        restart=restart,
                        device=chosen,
                        ranks=ranks,
                        tensorboard=tensorboard,
                        progress=progress,
                    )

            model = experiment.model_config(data)
            result = train_as(model, experiment.training, folder, experiment.name)
            if out is None and first:
                remember_checkpoint(result.checkpoint)
            twin_result = None
            if twin:
                label = f"{experiment.name}, float twin"
                recipe = experiment.training.twin()
                twin_result = train_as(experiment.twin_config(data), recipe, folder / TWIN_FOLDER, label)
    except MambaintError:
        # Process 0 tells of it for all; see Ranks.agreed.
        if first:
            raise
        return 2
    if not first:
        return 0
    report = _report(result, twin_result)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _show(report, result.metric_name)
    return 0

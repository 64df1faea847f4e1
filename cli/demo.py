"""``mambaint demo``: the whole path on the embedded digits, ending in a verified proof."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import click

DIGIT_LINE = 1500
"""Which line of the digits is proved: one of the test lines, which no training sees."""


def _invoke(ctx: click.Context, module: str, **arguments: Any) -> dict[str, Any]:
    """Run another command as a user would with --json, and return what it prints."""
    import importlib

    command: click.Command = importlib.import_module(module).command
    out = io.StringIO()
    # verify ends an invalid proof with an exit code; what it printed is what counts here.
    with contextlib.redirect_stdout(out), contextlib.suppress(click.exceptions.Exit):
        ctx.invoke(command, as_json=True, **arguments)
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


def _picture(pixels: list[int]) -> str:
    """An 8x8 digit in characters, darker for more ink."""
    shades = " .:-=+*#%@"
    rows = [pixels[i : i + 8] for i in range(0, 64, 8)]
    return "\n".join("    " + "".join(shades[min(9, p * 9 // 16)] * 2 for p in row) for row in rows)


def _tampered(proof: Path, out: Path) -> Path:
    """The same proof claiming another answer: the two largest logits swapped."""
    from mamba_int.files import canonical_json, read_json, write_bytes

    document = read_json(proof)
    logits = document["public"]["logits"]
    first, second = sorted(range(len(logits)), key=logits.__getitem__)[-2:]
    logits[first], logits[second] = logits[second], logits[first]
    write_bytes(out, canonical_json(document) + b"\n")
    return out


@click.command(name="demo")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    metavar="DIR",
    help="Folder for everything the demo makes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.pass_context
def command(ctx: click.Context, out: Path, as_json: bool) -> None:
    """Train a digit classifier, quantize it, prove one private digit, verify the proof.

    \b
    Example:
      mambaint demo --out demo-out
    """
    from mamba_int.datasets.embedded import load_digits
    from mamba_int.files import write_json

    start = time.perf_counter()

    def say(text: str) -> None:
        if not as_json:
            click.echo(text)

    say("1/5  training a ternary integer Mamba on 1,437 handwritten digits (a minute or less)")
    trained = _invoke(ctx, "cli.train", preset="digits", out=out / "run", restart=True)
    say(f"     test accuracy {trained['test_accuracy']:.4f} in {trained['train_seconds']:.1f} s")

    say("2/5  quantizing: the frozen integers become the model")
    quantized = _invoke(ctx, "cli.quantize", checkpoint=Path(trained["checkpoint"]), out=out / "model")
    say(
        f"     NumPy = PyTorch = ONNX Runtime on {quantized['values_compared']:,} integers: "
        f"{quantized['equal_numpy_torch_onnx']}"
    )

    data = load_digits()
    index = DIGIT_LINE - len(data.train_labels) - len(data.validation_labels) - 1
    digit = [int(v) for v in data.test_inputs[index].flatten()]
    write_json(out / "digit.json", {"input_data": [digit]})
    say(f"3/5  proving what this digit is, without showing it\n{_picture(digit)}")
    proved = _invoke(
        ctx,
        "cli.prove",
        input_path=out / "digit.json",
        model=Path(quantized["model"]),
        out=out / "proof.json",
    )
    say(
        f"     {proved['rows']:,} rows of 2^{proved['logrows']}; keys {proved['keygen_seconds']:.1f} s; "
        f"proof {proved['prove_seconds']:.1f} s, {proved['peak_bytes'] / 1e6:.0f} MB, "
        f"{proved['proof_bytes']:,} bytes"
    )

    say("4/5  verifying with nothing but proof.json and verifier.zip")
    verified = _invoke(ctx, "cli.verify", proof=out / "proof.json", model_id=quantized["model_id"])
    say(f"     valid: {verified['valid']}, in {verified['verify_seconds'] * 1000:.0f} ms")

    say("5/5  the same proof with two logits swapped")
    tampered = _invoke(
        ctx,
        "cli.verify",
        proof=_tampered(out / "proof.json", out / "tampered.json"),
        verifier=out / "verifier.zip",
    )
    say(f"     valid: {tampered['valid']} ({tampered.get('reason', '')})")

    seconds = time.perf_counter() - start
    result = {
        "valid": verified["valid"],
        "tampered_valid": tampered["valid"],
        "test_accuracy": trained["test_accuracy"],
        "predicted": proved["predicted"],
        "label": data.class_names[int(data.test_labels[index])],
        "model_id": quantized["model_id"],
        "rows": proved["rows"],
        "logrows": proved["logrows"],
        "train_seconds": trained["train_seconds"],
        "keygen_seconds": proved["keygen_seconds"],
        "prove_seconds": proved["prove_seconds"],
        "verify_seconds": verified["verify_seconds"],
        "peak_bytes": proved["peak_bytes"],
        "proof_bytes": proved["proof_bytes"],
        "seconds": round(seconds, 1),
        "out": str(out),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        say(
            f"\nThe model {quantized['model_id'][:16]}... says '{proved['predicted']}' "
            f"(the label is '{result['label']}'),\nproved and verified in {seconds:.0f} s; all files are in "
            f"{out}/. The report is {out}/model/report.html.\nThe SRS was made here: good for development "
            "only (see README)."
        )
    if not verified["valid"] or tampered["valid"]:
        ctx.exit(2)

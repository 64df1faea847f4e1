"""``mambaint open``: check that the input a proof commits to is a given one."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="open")
@click.argument("proof", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.json",
    help='The supposed model input, {"input_data": [[...]]}.',
)
@click.option(
    "--opening",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The opening that prove --commit-input wrote.",
)
@click.option(
    "--verifier",
    type=click.Path(path_type=Path),
    help="Verifier package to trust.  [default: verifier.zip beside the proof]",
)
@click.option(
    "--srs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The whole SRS, which committing needs; the package names its SHA-256.  [default: the cache's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    proof: Path,
    input_path: Path,
    opening: Path,
    verifier: Path | None,
    srs: Path | None,
    as_json: bool,
) -> None:
    """Check that PROOF is valid and that the input it commits to is the given one.

    Exit code 0: it is. 1: checked and it is not. 2: could not be checked.

    \b
    Example:
      mambaint open proof.json --input x.json --opening proof.opening.json
    """
    from cli.verdict import DEVELOPMENT_LINE, verdict_json
    from quantize.input_file import read_input
    from zk.commitment import check_opening
    from zk.opening import read_opening
    from zk.package import read_package
    from zk.provable import input_graph
    from zk.verify import check, read_proof

    trusted = verifier if verifier is not None else proof.parent / "verifier.zip"
    package, digest = read_package(trusted)
    verdict = check(read_proof(proof), package, digest)
    salts = read_opening(opening)
    values = [int(value) for value in read_input(input_path, input_graph(package.statement)).ravel()]
    verdict = check_opening(verdict, package, values, salts, srs)
    if as_json:
        result = {**verdict_json(verdict, trusted), "input": str(input_path)}
        click.echo(json.dumps(result))
    else:
        head = (
            f"VALID: the committed input is {input_path}" if verdict.valid else f"INVALID: {verdict.reason}"
        )
        click.echo(
            f"{head}\n  {'model':<12} {verdict.model_id}\n  {'trusted':<12} {trusted} (sha256 {digest})"
        )
        if verdict.srs_kind == "development":
            click.echo(DEVELOPMENT_LINE)
    if not verdict.valid:
        ctx.exit(1)

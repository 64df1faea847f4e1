"""``mambaint setup``: make the keys of a model, and the package its verifiers need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.proving import DEVELOPMENT_NOTE, activity, proving_options

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from zk.keys import Keys


@click.command(name="setup")
@proving_options
@click.option(
    "--segment-steps",
    type=click.IntRange(1),
    metavar="N",
    help="Keys for proofs in linked segments of N steps.",
)
@click.option(
    "--stages",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="With --segment-steps: cut the model by layers into so many circuits.",
)
@click.option(
    "--public-states",
    is_flag=True,
    help="With --segment-steps: for proofs that show the states between segments.",
)
@click.option(
    "--greedy",
    is_flag=True,
    help="With --segment-steps: for proofs of what a language model generated (prove --greedy-after).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("verifier.zip"),
    show_default=True,
    help="Where to write the verifier package.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    model: Path | None,
    public_input: bool,
    commit_input: bool,
    logrows: int | None,
    lookups: str,
    srs_path: Path | None,
    srs_sha256: str | None,
    segment_steps: int | None,
    stages: int,
    public_states: bool,
    greedy: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Make the proving and verifying key of a model; write the verifier package.

    Keys are cached by circuit (in ~/.cache/mambaint, or $MAMBAINT_CACHE) and found there by prove, which
    makes them itself if need be.

    \b
    Example:
      mambaint setup --model runs/digits/quantized/model.mint --out verifier.zip
      mambaint setup --segment-steps 64
    """
    from mamba_int.errors import MambaintError
    from mamba_int.files import write_bytes
    from mamba_int.graph import Graph
    from quantize.latest import resolve_model
    from zk.provable import prepare

    graph = Graph.load(resolve_model(model))
    if segment_steps is None and (public_states or greedy or stages > 1):
        raise MambaintError(
            "--stages, --public-states and --greedy are for segments", "give --segment-steps as well"
        )
    with activity(as_json) as say:
        if segment_steps is None:
            ready = prepare(graph, public_input, commit_input, logrows, lookups, srs_path, srs_sha256, say)
            package, made = ready.package, [_described(ready.lowered.circuit, ready.keys)]
            srs = ready.keys.srs.kind
        else:
            from zk.prove_chain import prepare_chain

            if commit_input or lookups != "table":
                raise MambaintError(
                    "segments are proved without --commit-input and --lookups none", "leave them out"
                )
            chain = prepare_chain(
                graph,
                segment_steps,
                stages=stages,
                public_input=public_input,
                public_states=public_states,
                greedy=greedy,
                logrows=logrows,
                srs_path=srs_path,
                srs_sha256=srs_sha256,
                say=say,
            )
            package = chain.package
            made = [_described(part.lowered.circuit, part.keys) for part in chain.circuits]
            srs = chain.stages[0].keys.srs.kind
    write_bytes(out, package)
    result: dict[str, Any] = {"model_id": graph.model_id, "srs": srs, "verifier": str(out)}
    result |= made[0] if segment_steps is None else {"circuits": made}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for circuit in made:
        seconds = circuit["keygen_seconds"]
        how = f"made in {seconds:.1f} s" if seconds else "found in the cache"
        click.echo(f"keys      {how}: {circuit['rows']:,} rows of 2^{circuit['logrows']}")
        click.echo(f"circuit   {circuit['circuit_id']}")
    click.echo(f"model     {graph.model_id}")
    click.echo(f"verifier  {out}")
    if srs == "development":
        click.echo(DEVELOPMENT_NOTE)


def _described(circuit: Circuit, keys: Keys) -> dict[str, Any]:
    return {
        "circuit_id": keys.circuit_id,
        "rows": circuit.rows,
        "logrows": circuit.logrows,
        "keygen_seconds": round(keys.keygen_seconds, 3),
        "peak_bytes": keys.peak_bytes,
        "proving_key_bytes": keys.sizes["pk.key"],
        "proof_bytes": keys.proof_bytes,
    }

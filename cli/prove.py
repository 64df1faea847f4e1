"""``mambaint prove``: prove one inference of a quantized model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cli.proving import DEVELOPMENT_NOTE, activity, proving_options


@click.command(name="prove")
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.json",
    help='The model input, {"input_data": [[...]]}.',
)
@proving_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("proof.json"),
    show_default=True,
    help="The proof file; verifier.zip is written beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    input_path: Path,
    model: Path | None,
    public_input: bool,
    lookups: str,
    srs_path: Path | None,
    srs_sha256: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Prove that a model gives its answer on an input, which stays private unless --public-input.

    Writes the proof, and beside it verifier.zip: what a verifying party needs, and must get from someone
    it trusts. Keys are made on first use and cached.

    \b
    Example:
      mambaint prove --input x.json --out proof.json
      mambaint verify proof.json
    """
    from cli.proving import prepare, witness_of
    from mamba_int.files import write_bytes
    from mamba_int.graph import Graph
    from quantize.input_file import read_input
    from quantize.latest import resolve_model
    from zk.prove import prove

    graph = Graph.load(resolve_model(model))
    inputs = read_input(input_path, graph)
    with activity(as_json) as say:
        ready = prepare(graph, public_input, lookups, srs_path, srs_sha256, say)
        say("proving")
        witness = witness_of(graph, ready.lowered, inputs)
        proof = prove(ready.lowered.circuit, witness, ready.keys, ready.package)
    verifier = out.parent / "verifier.zip"
    write_bytes(verifier, ready.package)
    write_bytes(out, proof.file)

    circuit, keys = ready.lowered.circuit, ready.keys
    outputs = witness.public["logits"]
    classes = graph.card.get("classes") or []
    predicted = classes[outputs.index(max(outputs))] if len(classes) == len(outputs) else None
    result = {
        "model_id": graph.model_id,
        "circuit_id": keys.circuit_id,
        "rows": circuit.rows,
        "logrows": circuit.logrows,
        "keygen_seconds": round(keys.keygen_seconds, 3),
        "witness_seconds": round(proof.witness_seconds, 3),
        "prove_seconds": round(proof.prove_seconds, 3),
        "peak_bytes": proof.peak_bytes,
        "proof_bytes": proof.proof_bytes,
        "outputs": outputs,
        "predicted": predicted,
        "input_is_public": public_input,
        "srs": keys.srs.kind,
        "proof": str(out),
        "verifier": str(verifier),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    made = f"made in {keys.keygen_seconds:.1f} s" if keys.keygen_seconds else "from the cache"
    click.echo(
        f"proved    in {proof.prove_seconds:.1f} s, {proof.peak_bytes / 1e6:.0f} MB; keys {made}; "
        f"{circuit.rows:,} rows of 2^{circuit.logrows}"
    )
    if predicted is not None:
        click.echo(
            f"answer    {json.dumps(predicted)} (the input is {'public' if public_input else 'private'})"
        )
    click.echo(f"model     {graph.model_id}")
    click.echo(f"proof     {out} ({proof.proof_bytes:,} bytes of proof)")
    click.echo(f"verifier  {verifier}")
    if keys.srs.kind == "development":
        click.echo(DEVELOPMENT_NOTE)

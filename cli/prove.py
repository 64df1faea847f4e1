"""``mambaint prove``: prove one inference of a quantized model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.proving import DEVELOPMENT_NOTE, activity, proving_options

if TYPE_CHECKING:
    from zk.opening import Opening


def _earlier_opening(commit_input: bool, opening: Path | None, reuse_opening: Path | None) -> Opening | None:
    """The opening to reuse, if one is given; all three options are those of the command."""
    from mamba_int.errors import MambaintError
    from zk.opening import read_opening

    if not commit_input and (opening or reuse_opening):
        raise MambaintError(
            "--opening and --reuse-opening belong to --commit-input", "give --commit-input as well"
        )
    if opening and reuse_opening:
        raise MambaintError(
            "with --reuse-opening that file stays the opening of both proofs", "leave out --opening"
        )
    return read_opening(reuse_opening) if reuse_opening else None


class SegmentSteps(click.ParamType[int]):
    """A number of steps, or ``auto``, which is 0."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto":
            return 0
        steps: int = click.IntRange(1).convert(value, param, ctx)
        return steps


@click.command(name="prove")
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help='The model input, {"input_data": [[...]]}.',
)
@click.option(
    "--stream",
    is_flag=True,
    help="With --segment-steps: read the input from standard input while it arrives, a step in JSON a line; "
    "its end closes the chain.",
)
@proving_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("proof.json"),
    show_default=True,
    help="The proof file; verifier.zip is written beside it.",
)
@click.option(
    "--opening",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where --commit-input writes the opening: secret salts, which open the commitment. "
    "[default: beside the proof, .opening.json]",
)
@click.option(
    "--reuse-opening",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Commit with the salts of an earlier proof of the same input, so that both proofs show the same "
    "commitment. Needs the same SRS and the same number of rows (--logrows).",
)
@click.option(
    "--segment-steps",
    type=SegmentSteps(),
    metavar="N|auto",
    help="Prove in linked segments of N steps, with one key pair: any length at the same memory. auto: the "
    "length that makes the chain cheapest, in as few --stages as fit.",
)
@click.option(
    "--stages",
    type=click.IntRange(1),
    metavar="N",
    help="With --segment-steps: cut the model by layers as well, into N circuits with keys of their own, "
    "which need that much less memory  [default: 1; with auto the fewest that fit].",
)
@click.option(
    "--ram",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="With --segment-steps auto: memory that one prover may use  [default: what is free].",
)
@click.option(
    "--public-states",
    is_flag=True,
    help="With --segment-steps: show the states between segments, which say much of the input, instead of "
    "committing to them: a few rows less.",
)
@click.option(
    "--greedy-after",
    type=click.IntRange(1),
    metavar="P",
    help="With --segment-steps, of a language model: the first P tokens of the input are the prompt, which "
    "stays hidden; prove that all others are what greedy decoding gives, and show those instead of logits.",
)
@click.option(
    "--score-after",
    type=click.IntRange(1),
    metavar="P",
    help="With --segment-steps, of a language model: prove the total log-score (the logarithm of the "
    "probability) of all tokens after the first P, and show that alone: neither text nor logits.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="W",
    help="With --segment-steps: segments proved at a time; each takes the memory of one proof.  "
    "[default: 1; with --ray as many as the cluster holds]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="With --segment-steps: prove on the Ray cluster at this address, which needs the same mambaint on "
    "every node; 'local' starts one on this machine and stops it at the end. The nodes see the input and "
    "everything computed from it, and so does whoever can connect to them: use a cluster you trust.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def command(
    input_path: Path | None,
    stream: bool,
    model: Path | None,
    public_input: bool,
    commit_input: bool,
    logrows: int | None,
    lookups: str,
    srs_path: Path | None,
    srs_sha256: str | None,
    out: Path,
    opening: Path | None,
    reuse_opening: Path | None,
    segment_steps: int | None,
    stages: int | None,
    ram: float | None,
    public_states: bool,
    greedy_after: int | None,
    score_after: int | None,
    workers: int | None,
    ray: str | None,
    as_json: bool,
) -> None:
    """Prove that a model gives its answer on an input, which stays private unless --public-input.

    Writes the proof, and beside it verifier.zip: what a verifying party needs, and must get from someone
    it trusts. Keys are made on first use and cached. A run in segments that was interrupted goes on when the
    command is given again.

    \b
    Example:
      mambaint prove --input x.json --out proof.json
      mambaint verify proof.json
      mambaint prove --input x.json --commit-input --logrows 14 --out a/proof.json
      mambaint prove --input x.json --commit-input --logrows 14 --out b/proof.json \\
        --model other.mint --reuse-opening a/proof.opening.json
      mambaint prove --input long.json --segment-steps 64 --workers 2
      mambaint prove --input long.json --segment-steps 64 --ray auto
      mambaint prove --input text.json --segment-steps 64 --greedy-after 20
      mambaint prove --input text.json --segment-steps 64 --score-after 1
      sensor | mambaint prove --stream --segment-steps 64
    """
    from dataclasses import replace

    from circuits.circuit import COMMITTED_INPUT
    from mamba_int.errors import MambaintError
    from mamba_int.files import write_bytes
    from mamba_int.graph import Graph
    from quantize.input_file import read_input
    from quantize.latest import resolve_model
    from zk.jobs import draw_salts
    from zk.opening import Opening
    from zk.package import decode_package
    from zk.provable import prepare, witness_of
    from zk.prove import prove

    for_segments = (public_states, stages, workers, ray, stream, ram, greedy_after, score_after)
    if segment_steps is None and any(for_segments):
        raise MambaintError(
            "--stages, --public-states, --workers, --ray, --stream, --ram, --greedy-after, --score-after are "
            "for segments",
            "give --segment-steps as well",
        )
    if (input_path is None) != stream:
        raise MambaintError("the input is given once", "give --input FILE.json, or --stream")
    if segment_steps is not None:
        from cli.segments import ChainOptions, prove_in_segments

        if commit_input or opening or reuse_opening or lookups != "table":
            raise MambaintError(
                "segments are proved without --commit-input, openings and --lookups none", "leave them out"
            )
        options = ChainOptions(
            segment_steps,
            stages,
            ram,
            public_input,
            public_states,
            greedy_after,
            score_after,
            logrows,
            srs_path,
            srs_sha256,
        )
        prove_in_segments(input_path, resolve_model(model), options, out, workers, ray, as_json)
        return
    assert input_path is not None
    earlier = _earlier_opening(commit_input, opening, reuse_opening)
    kept = reuse_opening or opening or out.with_name(f"{out.stem}.opening.json")
    if commit_input and earlier is None and kept.exists():
        raise MambaintError(
            f"{kept} exists already, and the commitment it opens could not be opened without it",
            "move it away, choose another --opening, or give it as --reuse-opening",
        )
    graph = Graph.load(resolve_model(model))
    inputs = read_input(input_path, graph)
    with activity(as_json) as say:
        ready = prepare(graph, public_input, commit_input, logrows, lookups, srs_path, srs_sha256, say)
        package = decode_package(ready.package, "made here")
        if earlier is not None:
            earlier.check_reusable(package)
        say("proving")
        witness = witness_of(graph, ready.lowered, inputs)
        salts = list(earlier.salts) if earlier is not None else draw_salts()
        if commit_input:
            witness = replace(witness, salts={COMMITTED_INPUT: salts})
        proof = prove(ready.lowered.circuit, witness, ready.keys, ready.package)
    verifier = out.parent / "verifier.zip"
    if commit_input:
        commitment = proof.commitments[COMMITTED_INPUT]
        if earlier is not None and commitment != earlier.commitment:
            # Two commitments with the same salts would show the difference of the two inputs.
            raise MambaintError(
                f"the input is not the one that {kept} opens, so the proof was discarded",
                "give the same input as for the earlier proof, or prove without --reuse-opening",
            )
        proofs = 1 if earlier is None else earlier.proofs + 1
        # First of all files: a proof that was seen without its use being counted could be one too many.
        Opening(
            salts=tuple(salts),
            commitment=commitment,
            logrows=package.logrows,
            size=package.committed[0][1],
            srs_sha256=package.srs_sha256,
            proofs=proofs,
        ).write(kept)
    try:
        write_bytes(verifier, ready.package)
        write_bytes(out, proof.file)
    except MambaintError:
        if commit_input and earlier is None:
            kept.unlink(missing_ok=True)
        raise

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
        "commitments": proof.commitments,
        "opening": str(kept) if commit_input else None,
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
    if commit_input:
        click.echo(f"opening   {kept} (secret: it opens the commitment to the input)")
    if keys.srs.kind == "development":
        click.echo(DEVELOPMENT_NOTE)

"""``mambaint prove --segment-steps``: a sequence as a chain of linked segments."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import click

from cli.proving import DEVELOPMENT_NOTE, activity

Settings = tuple[int, bool, bool, int | None, Path | None, str | None]
"""Steps of a segment, --public-input, --public-states, --logrows, --srs, --srs-sha256."""


def prove_in_segments(
    input_path: Path, model: Path, settings: Settings, out: Path, workers: int, as_json: bool
) -> None:
    """Prove, write the proof and verifier.zip, and print what was done."""
    from circuits.segment import reduction
    from mamba_int.files import write_bytes
    from mamba_int.graph import Graph
    from quantize.input_file import read_input
    from zk.prove_chain import prepare_chain, prove_chain

    graph = Graph.load(model)
    inputs = read_input(input_path, graph, any_length=reduction(graph) is None)
    # Beside the proof: a run that goes on finds what is done.
    folder = out.with_name(f"{out.stem}.segments")
    steps, public_input, public_states, logrows, srs_path, srs_sha256 = settings
    with activity(as_json) as say:
        chain = prepare_chain(graph, steps, public_input, public_states, logrows, srs_path, srs_sha256, say)
        started, total = time.perf_counter(), -(-len(inputs) // steps)

        def tell(done: int, more: bool) -> None:
            left = (time.perf_counter() - started) / done * (total - done)
            say(f"proving, {done} of {total} segments, about {left:.0f} s left")

        say(f"proving {total} segments")
        proof = prove_chain(chain, [inputs], folder, workers, tell)
    verifier = out.parent / "verifier.zip"
    write_bytes(verifier, chain.package)
    write_bytes(out, proof.file)
    shutil.rmtree(folder, ignore_errors=True)

    keys = [circuit.keys for circuit in (chain.segment, chain.head) if circuit is not None]
    circuit = chain.segment.lowered.circuit
    result = {
        "model_id": graph.model_id,
        "steps": len(inputs),
        "segments": proof.segments,
        "segment_steps": steps,
        "proved_now": proof.proved,
        "rows": circuit.rows,
        "logrows": circuit.logrows,
        "keygen_seconds": round(sum(key.keygen_seconds for key in keys), 3),
        "prove_seconds": round(proof.prove_seconds, 3),
        "wall_seconds": round(proof.wall_seconds, 3),
        "peak_bytes": proof.peak_bytes,
        "file_bytes": len(proof.file),
        "outputs": proof.public["logits"],
        "input_is_public": public_input,
        "states_are_public": public_states,
        "srs": keys[0].srs.kind,
        "proof": str(out),
        "verifier": str(verifier),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    found = proof.segments - proof.proved
    click.echo(
        f"proved    {proof.segments} linked segments of {steps} steps in {proof.wall_seconds:.1f} s"
        f"{f' ({found} of them found from before)' if found else ''}, {proof.peak_bytes / 1e6:.0f} MB each; "
        f"{circuit.rows:,} rows of 2^{circuit.logrows}"
    )
    click.echo(f"states    {'public' if public_states else 'hidden behind commitments'}")
    click.echo(f"model     {graph.model_id}")
    click.echo(f"proof     {out} ({len(proof.file):,} bytes)")
    click.echo(f"verifier  {verifier}")
    if keys[0].srs.kind == "development":
        click.echo(DEVELOPMENT_NOTE)

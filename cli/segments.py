"""``mambaint prove --segment-steps``: a sequence as a chain of linked segments."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.proving import DEVELOPMENT_NOTE, activity
from cli.verdict import score_json, score_line

if TYPE_CHECKING:
    from zk.provers import Provers


@dataclass(frozen=True)
class ChainOptions:
    """The options of the command that decide which circuits and which proof are meant; see there."""

    segment_steps: int
    stages: int | None
    ram: float | None
    public_input: bool
    public_states: bool
    greedy_after: int | None
    score_after: int | None
    logrows: int | None
    srs_path: Path | None
    srs_sha256: str | None


def chosen_provers(workers: int | None, ray: str | None) -> Provers:
    """Those on this machine, or with an address those of a Ray cluster; arguments as of the command."""
    if ray is None:
        from zk.local_provers import LocalProvers

        return LocalProvers(workers or 1)
    from zk.ray_provers import RayProvers

    return RayProvers(ray, workers)


def prove_in_segments(
    input_path: Path | None,
    model: Path,
    options: ChainOptions,
    out: Path,
    workers: int | None,
    ray: str | None,
    as_json: bool,
) -> None:
    """Prove, write the proof and verifier.zip, and print what was done; without a path of a stream."""
    from circuits.segment import Segment, reduction
    from mamba_int.errors import MambaintError
    from mamba_int.files import move, write_bytes
    from mamba_int.graph import Graph
    from mamba_int.log_score import LogScore
    from quantize.input_file import read_input, read_steps
    from zk.chain_cut import Cut, pick_cut
    from zk.prove_chain import prepare_chain, prove_chain

    graph = Graph.load(model)
    inputs = None if input_path is None else read_input(input_path, graph, reduction(graph) is None)
    # Beside the proof: a run that goes on finds what is done.
    folder = out.with_name(f"{out.stem}.segments")
    cut = Cut(options.segment_steps, options.stages or 1)
    prompt = options.greedy_after or options.score_after or 0
    greedy, scored = options.greedy_after is not None, options.score_after is not None
    # A cluster that is not there is noticed before keys are made.
    with chosen_provers(workers, ray) as provers, activity(as_json) as say:
        if not cut.steps and inputs is None:
            raise MambaintError("a stream has no length to choose from", "give --segment-steps N")
        if not cut.steps and inputs is not None:
            cut = pick_cut(
                graph,
                len(inputs),
                Segment(0, hidden=not options.public_states, greedy=greedy, scored=scored),
                public_input=options.public_input,
                stages=options.stages,
                memory=None if options.ram is None else int(options.ram * 1e9),
                say=say,
            )
        chain = prepare_chain(
            graph,
            cut.steps,
            stages=cut.stages,
            public_input=options.public_input,
            public_states=options.public_states,
            greedy=greedy,
            scored=scored,
            logrows=options.logrows,
            srs_path=options.srs_path,
            srs_sha256=options.srs_sha256,
            say=say,
        )
        started = time.perf_counter()
        total = None if inputs is None else -(-len(inputs) // cut.steps) * cut.stages

        def tell(proved: int, found: int) -> None:
            done = proved + found
            # What an earlier run has proved says nothing of the rate.
            rate = proved / (time.perf_counter() - started)
            pace = f", {60 * rate:.1f} a minute" if rate else ""
            if total is None:
                say(f"proving the stream, {done} proofs done{pace}")
            else:
                left = f", about {(total - done) / rate:.0f} s left" if rate else ""
                say(f"proving, {done} of {total} proofs{pace}{left}")

        say("proving")
        pieces = read_steps(sys.stdin, graph) if inputs is None else [inputs]
        cores = os.cpu_count() or 1
        proof = prove_chain(chain, pieces, folder, prompt=prompt, provers=provers, checkers=cores, tell=tell)
    verifier = out.parent / "verifier.zip"
    write_bytes(verifier, chain.package)
    move(proof.file, out)
    shutil.rmtree(folder, ignore_errors=True)
    size = out.stat().st_size

    score = None
    if scored:
        frac = LogScore.of(graph).score_frac
        score = score_json(proof.public["score"][0], frac, prompt, proof.steps)
    keys = [circuit.keys for circuit in chain.circuits]
    circuit = max((part.lowered.circuit for part in chain.circuits), key=lambda part: part.rows)
    result = {
        "model_id": graph.model_id,
        "steps": proof.steps,
        "segments": proof.segments,
        "segment_steps": cut.steps,
        "stages": proof.stages,
        "proved_now": proof.proved,
        "rows": circuit.rows,
        "logrows": circuit.logrows,
        "keygen_seconds": round(sum(key.keygen_seconds for key in keys), 3),
        "prove_seconds": round(proof.prove_seconds, 3),
        "wall_seconds": round(proof.wall_seconds, 3),
        "peak_bytes": proof.peak_bytes,
        "file_bytes": size,
        "outputs": proof.public.get("logits", []),
        "generated": proof.public.get("tokens"),
        "score": score,
        "input_is_public": options.public_input,
        "states_are_public": options.public_states,
        "srs": keys[0].srs.kind,
        "proof": str(out),
        "verifier": str(verifier),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    found = proof.segments * proof.stages - proof.proved
    steps = f"{cut.steps} steps" + (f" in {proof.stages} stages each" if proof.stages > 1 else "")
    click.echo(
        f"proved    {proof.segments} linked segments of {steps} in {proof.wall_seconds:.1f} s"
        f"{f' ({found} proofs found from before)' if found else ''}, {proof.peak_bytes / 1e6:.0f} MB each; "
        f"{circuit.rows:,} rows of 2^{circuit.logrows}"
    )
    click.echo(f"states    {'public' if options.public_states else 'hidden behind commitments'}")
    if greedy:
        click.echo(f"generated {proof.steps - prompt} tokens, greedily, from a prompt of {prompt}")
    if score is not None:
        click.echo(f"score     {score_line(score)}")
    click.echo(f"model     {graph.model_id}")
    click.echo(f"proof     {out} ({size:,} bytes)")
    click.echo(f"verifier  {verifier}")
    if keys[0].srs.kind == "development":
        click.echo(DEVELOPMENT_NOTE)

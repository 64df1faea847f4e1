"""``mambaint verify``: check a proof against a verifier package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.verdict import DEVELOPMENT_LINE, score_line, shown_score, verdict_json

if TYPE_CHECKING:
    from zk.verify import Verdict


def _predicted(verdict: Verdict) -> str | None:
    """Name of the largest logit's class, if the package names the classes."""
    classes, logits = verdict.statement.get("classes"), verdict.public.get("logits")
    if not isinstance(classes, list) or not logits or len(classes) != len(logits):
        return None
    return str(classes[logits.index(max(logits))])


def _positions(only: str | None) -> range | None:
    """The segments that ``I..J`` names, J among them."""
    from mamba_int.errors import MambaintError

    if only is None:
        return None
    first, dots, last = only.partition("..")
    if not (first.isdecimal() and dots and last.isdecimal() and int(first) <= int(last)):
        raise MambaintError(f"--only {only} is not of the form I..J", "give two positions, such as 0..3")
    return range(int(first), int(last) + 1)


def _shown(values: list[int]) -> str:
    head = " ".join(str(value) for value in values[:32])
    return head if len(values) <= 32 else f"{head} ... ({len(values)} values)"


def _lines(verdict: Verdict, verifier: Path) -> list[str]:
    if not verdict.valid:
        from zk.verify_chain import PARTIAL

        partial = verdict.reason.removeprefix(f"{PARTIAL}: ")
        lines = [f"INVALID: {verdict.reason}" if partial == verdict.reason else f"PARTIAL: {partial}"]
    else:
        lines = [f"VALID in {verdict.verify_seconds * 1000:.0f} ms"]
        if "segments" in verdict.statement:
            steps, count = verdict.statement["seq_len"], verdict.statement["segments"]
            lines.append(f"  {'sequence':<12} {steps} steps in {count} linked segments")
        if "tokens" in verdict.public:
            prompt = verdict.statement["prompt_steps"]
            lines.append(f"  {'generated':<12} greedily, all tokens after a prompt of {prompt}")
        score = shown_score(verdict)
        for name, values in verdict.public.items():
            shown = _shown(values) if name != "score" or score is None else score_line(score)
            lines.append(f"  {name:<12} {shown}")
        predicted = _predicted(verdict)
        if predicted is not None:
            lines.append(f"  {'predicted':<12} {json.dumps(predicted)}")
        lines += [f"  {'commitment':<12} {point}" for point in verdict.commitments.values()]
    lines.append(f"  {'model':<12} {verdict.model_id}")
    lines.append(f"  {'trusted':<12} {verifier} (sha256 {verdict.package_sha256})")
    if verdict.srs_kind == "development":
        lines.append(DEVELOPMENT_LINE)
    return lines


@click.command(name="verify")
@click.argument("proof", type=click.Path(path_type=Path))
@click.option(
    "--verifier",
    type=click.Path(path_type=Path),
    help="Verifier package to trust.  [default: verifier.zip beside the proof]",
)
@click.option("--model-id", metavar="HEX", help="Refuse a proof about any other model.")
@click.option(
    "--rederive",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Also derive the verifying key anew from this model, and compare.",
)
@click.option(
    "--srs",
    "srs_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --rederive: the SRS the package names  [default: the one made on this machine].",
)
@click.option(
    "--same-input",
    type=click.Path(path_type=Path),
    metavar="OTHER.json",
    help="Verify this proof too, and that both commit to the same input (prove --commit-input). Needs the "
    "same SRS and the same number of rows (--logrows) in both.",
)
@click.option(
    "--other-verifier",
    type=click.Path(path_type=Path),
    help="Verifier package to trust for OTHER.  [default: verifier.zip beside it]",
)
@click.option(
    "--only",
    metavar="I..J",
    help="Of a proof in segments: check segments I to J alone. No proof of the whole: the exit code is 1.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Of a proof in segments: segments checked at a time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.pass_context
def command(
    ctx: click.Context,
    proof: Path,
    verifier: Path | None,
    model_id: str | None,
    rederive: Path | None,
    srs_path: Path | None,
    same_input: Path | None,
    other_verifier: Path | None,
    only: str | None,
    workers: int,
    as_json: bool,
) -> None:
    """Check PROOF against a verifier package you trust; the model is not needed.

    With --rederive the package need not be trusted to be the model's: that is checked too.

    Exit code 0: valid. 1: checked and invalid. 2: could not be checked.

    \b
    Example:
      mambaint verify proof.json --verifier verifier.zip
      mambaint verify a/proof.json --same-input b/proof.json
      mambaint verify long.json --workers 2
    """
    from mamba_int.errors import MambaintError
    from zk.chain_proof import is_chain
    from zk.verify import open_proof, verify

    trusted = verifier if verifier is not None else proof.parent / "verifier.zip"
    expected = model_id.lower() if model_id is not None else None
    if srs_path is not None and rederive is None:
        raise MambaintError("--srs is for --rederive", "give the model with --rederive, or leave --srs out")
    if other_verifier is not None and same_input is None:
        raise MambaintError("--other-verifier belongs to --same-input", "give the other proof as well")
    other = None
    with open_proof(proof) as stream:
        chained = is_chain(stream.read(64))
    if chained:
        from zk.verify_chain import verify_chain

        if same_input is not None:
            raise MambaintError("--same-input is for proofs in one piece", "leave it out for a chain")
        if rederive is None:
            verdict = verify_chain(proof, trusted, expected, workers, _positions(only))
        else:
            if only is not None:
                raise MambaintError("--only is no proof of the whole", "leave out --only or --rederive")
            from mamba_int.graph import Graph
            from quantize.latest import resolve_model
            from zk.rederive import verify_chain_rederived

            graph = Graph.load(resolve_model(rederive))
            verdict = verify_chain_rederived(proof, trusted, graph, expected, srs_path, workers=workers)
    elif only is not None:
        raise MambaintError(f"{proof} is a proof in one piece", "leave out --only")
    elif rederive is None and same_input is None:
        verdict = verify(proof, trusted, expected)
    elif rederive is not None:
        # Only now: without the model, verifying needs none of what lowers one.
        from mamba_int.graph import Graph
        from quantize.latest import resolve_model
        from zk.rederive import verify_rederived

        verdict = verify_rederived(proof, trusted, Graph.load(resolve_model(rederive)), expected, srs_path)
    if same_input is not None and (rederive is None or verdict.valid):
        from zk.commitment import verify_same_input

        other_trusted = other_verifier if other_verifier is not None else same_input.parent / "verifier.zip"
        verdict, other = verify_same_input(proof, trusted, same_input, other_trusted, expected)
    result, lines = verdict_json(verdict, trusted), _lines(verdict, trusted)
    if verdict.valid and rederive is not None:
        result["rederived"] = True
        lines.append(f"  {'rederived':<12} the verifying key is that of {rederive}")
    if other is not None:
        result["other"] = {"proof": str(same_input), **verdict_json(other, other_trusted)}
        lines += ["", f"{same_input}:", *_lines(other, other_trusted)]
        if verdict.valid:
            lines[0] += f", and the input is that of {same_input}"
    click.echo(json.dumps(result) if as_json else "\n".join(lines))
    if not verdict.valid:
        ctx.exit(1)

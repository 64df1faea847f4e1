"""How a verdict on a proof is shown, whichever command asked for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zk.verify import Verdict

DEVELOPMENT_LINE = (
    "  note: development SRS. Whoever generated it could forge proofs; "
    "use a ceremony SRS for anything that matters."
)


def score_json(score: int, score_frac: int, prompt: int, steps: int) -> dict[str, Any]:
    """A text's log-score: its integer, that of the tokens after a prompt, and what it is in bits."""
    from mamba_int.log_score import ERROR, bits

    tokens = steps - prompt
    return {
        "integer": score,
        "unit": f"2^-{score_frac} nats",
        "bits": bits(score, score_frac),
        "tokens": tokens,
        "prompt_steps": prompt,
        "bits_per_token": -bits(score, score_frac) / tokens,
        "error_bits_per_token": ERROR / math.log(2),
    }


def score_line(score: dict[str, Any]) -> str:
    """A :func:`score_json` in words."""
    return (
        f"{score['bits']:.4f} bits for {score['tokens']} tokens after a prompt of {score['prompt_steps']}: "
        f"{score['bits_per_token']:.4f} bits per token (within {score['error_bits_per_token']:.1g}); "
        f"exactly {score['integer']} x {score['unit']}"
    )


def shown_score(verdict: Verdict) -> dict[str, Any] | None:
    """The score that a valid proof shows, in the unit of the trusted package."""
    shown, stated = verdict.public.get("score"), verdict.statement
    frac, prompt, steps = (stated.get(name) for name in ("score_frac", "prompt_steps", "seq_len"))
    # Only a chain states all of these; other packages may state what they like.
    if "segments" not in stated or not shown or type(frac) is not int or type(prompt) is not int:
        return None
    return score_json(shown[0], frac, prompt, int(steps or 0))


def verdict_json(verdict: Verdict, verifier: Path) -> dict[str, Any]:
    """A verdict as JSON values; ``reason`` only where there is one."""
    result: dict[str, Any] = {
        "valid": verdict.valid,
        "model_id": verdict.model_id,
        "circuit_id": verdict.circuit_id,
        "outputs": verdict.public.get("logits", []),
        "public": verdict.public,
        "commitments": verdict.commitments,
        "verify_seconds": round(verdict.verify_seconds, 4),
        "srs": verdict.srs_kind,
        "verifier": {"path": str(verifier), "sha256": verdict.package_sha256},
    }
    if "segments" in verdict.statement:
        result |= {"steps": verdict.statement["seq_len"], "segments": verdict.statement["segments"]}
    if "prompt_steps" in verdict.statement:
        result["prompt_steps"] = verdict.statement["prompt_steps"]
    score = shown_score(verdict)
    if score is not None:
        result["score"] = score
    if not verdict.valid:
        result["reason"] = verdict.reason
    return result

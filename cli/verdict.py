"""How a verdict on a proof is shown, whichever command asked for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zk.verify import Verdict

DEVELOPMENT_LINE = (
    "  note: development SRS. Whoever generated it could forge proofs; "
    "use a ceremony SRS for anything that matters."
)


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
    if not verdict.valid:
        result["reason"] = verdict.reason
    return result

"""What a commitment to the model input is for: showing that two proofs share it, and which one it is.

A commitment is the point of the polynomial that runs through values and salts on the first rows of a column
of 2^logrows. It depends on nothing else but the SRS, so circuits of different models give the same point
for the same values and salts, if they have the same SRS, number of rows and number of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from circuits.circuit import COMMITTED_INPUT, SALTS, committed_values
from zk import field
from zk.opening import Opening
from zk.package import Package, read_package
from zk.process import run_job
from zk.srs import find_srs
from zk.verify import Verdict, check, read_proof


def verify_same_input(
    proof_path: Path,
    package_path: Path,
    other_proof_path: Path,
    other_package_path: Path,
    expected_model_id: str | None = None,
) -> tuple[Verdict, Verdict]:
    """Check two proofs, and that their inputs are the same integers in the same order.

    Args:
        proof_path: a proof.
        package_path: its verifier package.
        other_proof_path: the other proof.
        other_package_path: its verifier package; trusted like the first.
        expected_model_id: the model the first proof has to be about.

    Returns:
        The verdict on the first proof, invalid too if the inputs are not shown to be the same; and the
        verdict on the other proof alone.

    Raises:
        MambaintError: as :func:`zk.verify.verify`, for either.
    """
    package, digest = read_package(package_path)
    other_package, other_digest = read_package(other_package_path)
    verdict = check(read_proof(proof_path), package, digest, expected_model_id)
    other = check(read_proof(other_proof_path), other_package, other_digest)
    if not verdict.valid:
        return verdict, other
    reason = _difference(verdict, package, other, other_package)
    return (verdict.refused(reason) if reason else verdict), other


def _difference(verdict: Verdict, package: Package, other: Verdict, other_package: Package) -> str:
    if not other.valid:
        return f"the other proof is invalid: {other.reason}"
    for which, trusted in (("the proof", package), ("the other proof", other_package)):
        if not trusted.commits_to_input:
            return f"{which} does not commit to its input"
    if package.logrows != other_package.logrows:
        return (
            f"the commitments cannot be compared: one circuit has 2^{package.logrows} rows, the other "
            f"2^{other_package.logrows}"
        )
    # The secret behind the SRS is what counts, and the verifying part fixes it; the hash is a claim.
    if (package.verifying_srs, package.srs_sha256) != (other_package.verifying_srs, other_package.srs_sha256):
        return "the commitments cannot be compared: they were made with different SRS"
    counts = _input_values(package), _input_values(other_package)
    # Sizes alone are not enough: an odd number of values has a spare cell behind it that nothing reads.
    if None in counts:
        return "the commitments cannot be compared: a verifier package does not say how long its input is"
    if counts[0] != counts[1]:
        return f"the inputs are not the same: one has {counts[0]} values, the other {counts[1]}"
    if verdict.commitments != other.commitments:
        return "the proofs do not commit to the same input with the same salts"
    return ""


def _input_values(package: Package) -> int | None:
    """Number of values of the model input, if the statement says it and the committed size agrees."""
    steps, domain = package.statement.get("seq_len"), package.statement.get("input")
    features = domain.get("features") if isinstance(domain, dict) else None
    if type(steps) is not int or type(features) is not int or min(steps, features) < 0:
        return None
    count = steps * max(features, 1)
    return count if len(committed_values([0] * count, [0] * SALTS)) == package.committed[0][1] else None


def check_opening(
    verdict: Verdict,
    package: Package,
    values: Sequence[int],
    opening: Opening,
    srs: Path | None = None,
    cache: Path | None = None,
) -> Verdict:
    """Whether a proof commits to these values with these salts.

    Args:
        verdict: on the proof.
        package: its verifier package.
        values: the supposed model input, flattened row-major.
        opening: the supposed opening.
        srs: the full SRS file, which committing needs; default: that of the cache.
        cache: see :func:`zk.store.cache_folder`.

    Returns:
        The verdict, invalid too if the commitment is another one.

    Raises:
        MambaintError: if the SRS is missing.
    """
    if not verdict.valid:
        return verdict
    if not package.commits_to_input:
        return verdict.refused("the proof does not commit to its input")
    committed = committed_values(values, opening.salts)
    if len(committed) != package.committed[0][1]:
        return verdict.refused("the committed input has another size")
    job = {
        "values": [field.encode(value) for value in committed],
        "settings": package.settings.hex(),
        "vk": package.vk.hex(),
        "srs": str(find_srs(package.srs_sha256, package.logrows, srs, cache)),
    }
    point = run_job("commit", job, what="committing", timeout=300)["commitment"]
    if point != verdict.commitments[COMMITTED_INPUT]:
        return verdict.refused("the proof commits to another input, or with other salts")
    return verdict

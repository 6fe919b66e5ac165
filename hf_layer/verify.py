"""Compare the files of built kernel variants with the digests in their metadata.json.

    python -m hf_layer.verify build/                        every variant below a folder
    python -m hf_layer.verify org/flash-kda --version 1     this machine's variant from the Hub, or the cache
    python -m hf_layer.verify org/flash-kda --version 1 --all
    python -m hf_layer.verify build/ --write digests.json   note what was found
    python -m hf_layer.verify build/ --against digests.json and compare another build with it

`kernels.get_kernel` does not look at these digests. They tell a damaged or half-copied variant from a whole
one and are no signature: who can change a file can change metadata.json as well. Nothing is imported from the
variant.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ALGORITHMS = ("sha256", "sha512")
# Not part of a digest: the metadata, which holds it, and the signature of the metadata.
LEFT_OUT = ("metadata.json", "metadata.json.sigstore")


@dataclass(frozen=True)
class Report:
    """What became of one variant.

    Attributes:
        variant: name of its folder.
        digest: hex SHA-256 over names and hashes of its files as they are; the same for equal variants.
        problems: one line for each file that is not as metadata.json says, empty for a good variant.
    """

    variant: str
    digest: str
    problems: tuple[str, ...]


def find_variants(path: Path) -> list[Path]:
    """Folders with a metadata.json: `path` itself, or those in it, or in its build/.

    Raises:
        FileNotFoundError: there are none.
    """
    if (path / "metadata.json").is_file():
        return [path]
    for place in (path, path / "build"):
        if found := sorted(file.parent for file in place.glob("[!.]*/metadata.json")):
            return found
    raise FileNotFoundError(f"{path}: no variant there, that is a folder with a metadata.json")


def hash_files(variant: Path, algorithm: str) -> dict[str, str]:
    """Relative path -> base64 hash of each file, as kernel-builder computes them: byte code is left out."""
    hashes = {}
    for folder, subfolders, names in os.walk(variant):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(variant).as_posix()
            if relative not in LEFT_OUT and path.suffix != ".pyc":
                content = path.read_bytes()  # a link, as in the Hub's cache, stands for what it leads to
                hashes[relative] = base64.b64encode(hashlib.new(algorithm, content).digest()).decode()
    return hashes


def verify_variant(variant: Path) -> Report:
    """Compare one variant with its own metadata.json. Bad metadata is a problem, no exception."""
    algorithm, expected, problems = _recorded_digest(variant)
    found = hash_files(variant, algorithm)
    if not problems:
        problems += [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
        problems += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
        problems += [
            f"changed: {name}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ]
    table = json.dumps(sorted(hash_files(variant, "sha256").items()))
    return Report(variant.name, hashlib.sha256(table.encode()).hexdigest(), tuple(problems))


def _recorded_digest(variant: Path) -> tuple[str, dict[str, str], list[str]]:
    """Algorithm and file hashes of metadata.json, and why they are of no use, if they are not."""
    try:
        metadata = json.loads((variant / "metadata.json").read_text())
        digest = metadata.get("digest")
    except (OSError, ValueError, AttributeError) as error:
        return "sha256", {}, [f"metadata.json can't be read: {error}"]
    if not isinstance(digest, dict) or not isinstance(digest.get("files"), dict):
        return "sha256", {}, ["metadata.json has no digest"]
    algorithm = str(digest.get("algorithm")).lower()
    if algorithm not in ALGORITHMS:
        return (
            "sha256",
            {},
            [f"digest of an unknown algorithm: expected {' or '.join(ALGORITHMS)}, got {algorithm}"],
        )
    return algorithm, digest["files"], []


def download(repo_id: str, version: int | None, revision: str | None, all_variants: bool) -> Path:
    """Folder of a Hub repository's variant for this machine, or of the repository with all its variants.

    Nothing is executed, so the publisher need not be trusted. With HF_HUB_OFFLINE=1 it is the cached part of
    the repository, whichever variants that has.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from kernels.install import install_kernel

    if not all_variants and not constants.HF_HUB_OFFLINE:
        return install_kernel(repo_id, version=version, revision=revision, trust_remote_code=True)
    wanted = revision or f"v{version}"
    try:
        return Path(snapshot_download(repo_id, repo_type="kernel", revision=wanted, allow_patterns="build/*"))
    except LocalEntryNotFoundError as error:
        if (partial := getattr(error, "snapshot_path", None)) is None:
            raise
        return Path(partial)


def compare(reports: list[Report], noted: dict[str, str]) -> list[str]:
    """How the variants differ from those that `--write` noted earlier, one line each."""
    found = {report.variant: report.digest for report in reports}
    lines = [f"{name}: not there now" for name in sorted(noted.keys() - found.keys())]
    lines += [f"{name}: was not there before" for name in sorted(found.keys() - noted.keys())]
    lines += [
        f"{name}: digest {found[name]}, before {noted[name]}"
        for name in sorted(found.keys() & noted.keys())
        if found[name] != noted[name]
    ]
    return lines


def main(words: list[str] | None = None) -> int:
    """Exit code: 0 all is as recorded, 1 it is not, 2 there is nothing to look at."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_layer.verify",
        description="Compare built kernel variants with the digests in their metadata.json.",
    )
    parser.add_argument("place", help="a repository, build/ or variant folder; or a Hub repository")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--version", type=int, help="of the Hub repository (default: 1)")
    which.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--all", action="store_true", help="of the Hub repository: every variant")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the variants' digests there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with digests written before")
    arguments = parser.parse_args(words)
    version = 1 if arguments.version is None and arguments.revision is None else arguments.version
    try:
        path = Path(arguments.place)
        if not path.is_dir():
            path = download(arguments.place, version, arguments.revision, arguments.all)
        reports = [verify_variant(variant) for variant in find_variants(path)]
        noted = json.loads(arguments.against.read_text()) if arguments.against else None
        if arguments.write:
            table = {report.variant: report.digest for report in reports}
            arguments.write.write_text(json.dumps(table, indent=2) + "\n")
    except Exception as error:  # whatever a download or a file system throws is the answer
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for report in reports:
        print(f"{report.variant}: {'; '.join(report.problems) or 'ok'} ({report.digest[:16]})")
    differences = [] if noted is None else compare(reports, noted)
    for line in differences:
        print(line)
    return 1 if differences or any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())

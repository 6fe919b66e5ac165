"""python -m hf_layer.verify: the digest of metadata.json against the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hub_client import NAME, current_variants
from kernels._rust import Digest, DigestAlgorithm

from hf_layer import verify


@pytest.fixture
def variant(variant_dir, tmp_path) -> Path:
    """A copy of a real variant."""
    return Path(shutil.copytree(variant_dir, tmp_path / "build" / variant_dir.name))


def test_hashes_are_those_of_kernel_builder(variant):
    """Byte code, the metadata and its signature are left out, as there; hidden files are not."""
    (variant / "__pycache__").mkdir(exist_ok=True)
    for name in ("__pycache__/ops.pyc", "stray.pyc", "metadata.json.sigstore", ".hidden"):
        (variant / name).write_text("x")
    for algorithm in (DigestAlgorithm.SHA256, DigestAlgorithm.SHA512):
        expected = Digest.hash_variant(algorithm, variant).files
        assert verify.hash_files(variant, str(algorithm)) == expected
        assert ".hidden" in expected and "metadata.json" not in expected


@pytest.mark.parametrize("place", ["repository", "build", "variant"])
def test_good_variant(variant, capsys, place):
    path = {"repository": variant.parent.parent, "build": variant.parent, "variant": variant}[place]
    assert verify.main([str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{variant.name}: ok (")


def damage_byte(variant: Path) -> None:
    (extension,) = variant.glob("*.so")
    content = bytearray(extension.read_bytes())
    content[len(content) // 2] ^= 1
    extension.write_bytes(content)


def edit_metadata(variant: Path, change) -> None:
    path = variant / "metadata.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_byte, "changed: _flash_kda_"),
        (lambda variant: (variant / "ops.py").unlink(), "missing: ops.py"),
        (lambda variant: (variant / "extra.py").write_text(""), "unexpected: extra.py"),
        (lambda variant: edit_metadata(variant, lambda m: m.pop("digest")), "metadata.json has no digest"),
        (
            lambda variant: edit_metadata(variant, lambda m: m["digest"].update(algorithm="md5")),
            "unknown algorithm: expected sha256 or sha512, got md5",
        ),
        (lambda variant: (variant / "metadata.json").write_text("{"), "metadata.json can't be read"),
    ],
    ids=["one bit", "missing file", "extra file", "no digest", "algorithm", "broken metadata"],
)
def test_damaged_variant(variant, capsys, damage, message):
    damage(variant)
    assert verify.main([str(variant)]) == 1
    output = capsys.readouterr().out
    assert message in output and output.count("\n") == 1


def test_nothing_there(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no variant there" in error and error.count("\n") == 1


def test_comparing_two_builds(variant, tmp_path, capsys):
    """What the nightly rebuild does: note the digests, build again, compare."""
    noted = tmp_path / "digests.json"
    assert verify.main([str(variant), "--write", str(noted)]) == 0
    assert verify.main([str(variant), "--against", str(noted)]) == 0
    capsys.readouterr()
    (variant / "ops.py").write_text("")
    assert verify.main([str(variant), "--against", str(noted)]) == 1
    assert f"{variant.name}: digest " in capsys.readouterr().out
    noted.write_text(json.dumps({"torch-stable-abi211-cu999-x86_64-linux": "0"}))
    assert verify.main([str(variant), "--against", str(noted)]) == 1
    output = capsys.readouterr().out
    assert "cu999-x86_64-linux: not there now" in output
    assert f"{variant.name}: was not there before" in output


def test_from_the_hub_and_from_the_cache(client, hub, real_files):
    """Every variant of the repository, without trust: nothing of it is executed."""
    code = "import sys; from hf_layer.verify import main; sys.exit(main(['org/flash-kda', {}]))"
    result = client.run(code.format("'--all'"))
    assert result.returncode == 0, result.stderr
    names = {path.split("/")[1] for path in real_files if path.startswith("build/")}
    assert names <= {line.split(":")[0] for line in result.stdout.splitlines()}
    assert all(": ok (" in line for line in result.stdout.splitlines())

    commit = hub.repositories[NAME].branches["v1"]
    assert client.run(code.format(f"'--revision', {commit!r}")).returncode == 0
    hub.requests.clear()
    offline = client.run(code.format(f"'--revision', {commit!r}"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and ": ok (" in offline.stdout, offline.stderr
    assert hub.requests == []


def test_unknown_repository(client):
    code = "import sys; from hf_layer.verify import main; sys.exit(main(['org/nothing']))"
    result = client.run(code)
    assert result.returncode == 2 and result.stderr.startswith("error: ")


def test_variants_of_this_checkout(variant_dir):
    """What stands in build/ and is current is whole."""
    for path in current_variants():
        assert verify.verify_variant(path).problems == ()

""".github/workflows: linted, pinned, with the least rights, and in step with the scripts that they call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_layer import verify

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}


def jobs() -> list:
    return [
        pytest.param(job, id=f"{name}-{key}")
        for name, flow in WORKFLOWS.items()
        for key, job in flow["jobs"].items()
    ]


def steps(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job.get("steps", [])]


def commands(workflow: str) -> str:
    return "\n".join(step.get("run", "") for step in steps(workflow))


def triggers(workflow: str) -> dict:
    return WORKFLOWS[workflow][True]  # YAML 1.1 reads the key `on` as true


def test_the_four_workflows():
    assert set(WORKFLOWS) == {"build", "test", "publish", "nightly"}


def test_actionlint():
    """Syntax, expressions, contexts, needs, runner labels."""
    program = shutil.which("actionlint") or shutil.which("actionlint", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("no actionlint in PATH")
    result = subprocess.run(
        [program, "-no-color", "-config-file", ROOT / ".github/actionlint.yaml", *FILES],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("job", jobs())
def test_jobs_end(job):
    """A job that hangs is stopped, and says itself when; a called workflow does that in its own jobs."""
    assert ("uses" in job) != ("timeout-minutes" in job and "runs-on" in job)


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_least_rights(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in WORKFLOWS[name]["jobs"].values())
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_actions_are_pinned(name):
    """To a commit: a tag can be moved. Local workflows need none."""
    used = [step["uses"] for step in steps(name) if "uses" in step]
    used += [job["uses"] for job in WORKFLOWS[name]["jobs"].values() if "uses" in job]
    for action in used:
        assert re.search(r"@[0-9a-f]{40}$|^docker://[\w./-]+:\d+\.\d+\.\d+$|^\./", action), action


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_no_expression_inside_a_script(name):
    """Values reach a shell through its environment: a branch's name can't become a command."""
    assert "${{" not in commands(name)


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_scripts_and_options_exist(name):
    text = commands(name)
    for path in re.findall(r"(?<![\w./-])((?:scripts|tests|\.ci)/[\w/.-]+)", text):
        assert (ROOT / path).exists(), path
    for options in re.findall(r"hf_layer\.verify (.+)", text):
        for option in re.findall(r"--[\w-]+", options):
            assert option in Path(verify.__file__).read_text(), option


def test_builds_are_locked_and_cached():
    """Nix takes the builder and torch of flake.lock, and their binaries from the public cache."""
    for name in ("build", "publish", "nightly"):
        runs = re.findall(r"nix (?:run|build|flake check) .*", commands(name))
        assert runs and all("--no-update-lock-file" in run or "--inputs-from ." in run for run in runs)
        caches = [step for step in steps(name) if "cachix-action" in step.get("uses", "")]
        assert caches and all(step["with"] == {"name": "huggingface", "skipPush": True} for step in caches)


def test_both_machines_are_built():
    for name, job in (("build", "variants"), ("publish", "upload")):
        matrix = WORKFLOWS[name]["jobs"][job]["strategy"]["matrix"]["include"]
        assert [entry["system"] for entry in matrix] == ["x86_64-linux", "aarch64-linux"]


def test_gpu_tests_follow_the_build():
    job = WORKFLOWS["test"]["jobs"]["gpu"]
    assert job["needs"] == "build" and "gpu" in job["runs-on"]
    assert "-m kernels_ci" in commands("test") and ".#ci-test" in commands("test")


def test_only_a_tag_publishes():
    assert triggers("publish") == {"push": {"tags": ["v*.*.*"]}}
    assert "build-and-upload" in commands("publish")
    assert WORKFLOWS["publish"]["jobs"]["upload"]["needs"] == "build"
    assert "--against built.json" in commands("publish")
    for name, path in zip(WORKFLOWS, FILES, strict=True):
        assert name == "publish" or not re.search(
            r"secrets\.|build-and-upload|\bupload --", path.read_text()
        ), name


def test_the_nightly_run_compares_two_builds():
    assert "schedule" in triggers("nightly")
    assert WORKFLOWS["nightly"]["jobs"]["compare"]["needs"] == ["nix", "local"]
    assert "diff nix-one/digests.json nix-two/digests.json" in commands("nightly")
    assert "diff local-one/digests.json local-two/digests.json" in commands("nightly")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the workflow's Python has tomllib")
@pytest.mark.parametrize(
    ("tag", "good"), [("v{package}", True), ("v9.0.0", False), ("v{package}.1", False)], ids=str
)
def test_tag_check(tag, good):
    """The publishing workflow's own code: it passes for this state's tag and stops for others."""
    (code,) = re.findall(r"<<'CODE'\n(.*?)CODE", commands("publish"), re.DOTALL)
    package = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TAG": tag.format(package=package)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) == good, result.stderr
    assert good or result.stderr.startswith("tag ")

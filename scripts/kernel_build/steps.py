"""Incremental steps: a command that makes a file, run again only when its words or an input changed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from . import BuildError


@dataclass(frozen=True)
class Step:
    """A command that makes `output`.

    Attributes:
        name: what people call it, e.g. the source file.
        command: the words that decide the result.
        output: the file made.
        inputs: files read; a compilation adds the headers that its compiler reports (`depfile`).
        tools: names and versions of the compilers behind the command.
        log: where the command's output is kept.
        depfile: whether the command takes -MD -MF FILE.
        extra: words that change how the command runs and not what it makes, e.g. its number of threads.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]
    tools: str
    log: Path
    depfile: bool = True
    extra: tuple[str, ...] = ()

    @property
    def _stamp(self) -> Path:
        return self.output.with_name(self.output.name + ".json")

    def is_current(self) -> bool:
        """Whether this very command made `output`, with these tools and from the same content."""
        try:
            stamp = json.loads(self._stamp.read_text())
            recorded = (stamp["command"], stamp["tools"], stamp["output"])
            inputs = stamp["inputs"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if recorded != (list(self.command), self.tools, content_hash(self.output)):
            return False
        given = {str(path) for path in self.inputs}
        return given <= inputs.keys() and all(
            content_hash(Path(path)) == digest for path, digest in inputs.items()
        )

    def run(self) -> None:
        """Make `output`. It appears complete or not at all.

        Raises:
            BuildError: the command failed; its output is in `log`.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        part = self.output.with_name(self.output.name + ".part")
        depfile = self.output.with_name(self.output.name + ".d")
        words = [*self.command, *self.extra, "-o", str(part)]
        if self.depfile:
            words += ["-MD", "-MF", str(depfile)]
        started = time.time()
        result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log.write_text(f"{' '.join(words)}\n\n{result.stdout}")
        if result.returncode != 0:
            part.unlink(missing_ok=True)
            errors = [line for line in result.stdout.splitlines() if "error" in line.lower()]
            first = (errors or result.stdout.splitlines() or ["no output"])[0].strip()
            raise BuildError(f"{self.name}: exit code {result.returncode}: {first} (all of it in {self.log})")

        read = {*self.inputs, *(read_depfile(depfile) if self.depfile else ())}
        self._stamp.unlink(missing_ok=True)
        os.replace(part, self.output)
        if any(path.stat().st_mtime > started for path in read):
            return  # edited while the command ran: without a stamp the step runs again next time
        stamp = {
            "command": list(self.command),
            "tools": self.tools,
            "output": content_hash(self.output),
            "inputs": {str(path): content_hash(path) for path in sorted(read)},
        }
        self._stamp.write_text(json.dumps(stamp, indent=1))


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file, None when there is none."""
    try:
        status = path.stat()
        return _content_hash(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@functools.cache
def _content_hash(path: Path, mtime_ns: int, size: int) -> str:
    """Remembered per time stamp and size: the objects of one build share most of their headers."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_depfile(path: Path) -> list[Path]:
    """The prerequisites of a Makefile rule as compilers write it: lines and blanks escaped by a backslash."""
    text = path.read_text().replace("\\\n", " ")
    prerequisites = text.partition(": ")[2]
    return [Path(word.replace("\\ ", " ")).resolve() for word in re.findall(r"(?:\\ |\S)+", prerequisites)]

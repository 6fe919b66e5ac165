"""build.toml, read and validated with the parser of the `kernels` package, and the state of its sources."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from . import BuildError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

COMPILED_SUFFIXES = (".cu", ".cpp")
BACKENDS = ("cpu", "cuda")  # that the script builds, in this order
_CAPABILITY = re.compile(r"(\d+)\.(\d)[af]?")


@dataclass(frozen=True)
class Section:
    """One `[kernel.NAME]` table, or `[torch]` itself (name "torch", no backend, no capabilities)."""

    name: str
    backend: str | None
    sources: tuple[str, ...]
    include: tuple[str, ...]
    cxx_flags: tuple[str, ...]
    cuda_flags: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()

    @property
    def compiled(self) -> list[str]:
        """The sources that become an object; the others are headers."""
        return [source for source in self.sources if source.endswith(COMPILED_SUFFIXES)]

    def pick(self, archs: list[str]) -> list[str]:
        """The capabilities to compile for when `archs` are asked for. 9.0 picks 9.0 and 9.0a. A section that
        has none of them is compiled for all of its own: the others still link against its functions."""
        bases = {base_capability(arch) for arch in archs}
        picked = [capability for capability in self.capabilities if base_capability(capability) in bases]
        return picked or list(self.capabilities)


@dataclass(frozen=True)
class Project:
    """A kernel repository: its root folder and what its build.toml says."""

    root: Path
    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    python_depends: dict[str, tuple[str, ...]]
    data_extensions: tuple[str, ...]
    stable_abi: tuple[int, int]
    sections: tuple[Section, ...]

    def sections_of(self, backend: str) -> list[Section]:
        """What a variant for `backend` is compiled from: `[torch]` and the kernels of that backend."""
        return [section for section in self.sections if section.backend in (None, backend)]

    @property
    def python_name(self) -> str:
        return self.name.replace("-", "_")

    @property
    def torch_target(self) -> str:
        """The definition by which torch's headers keep to the stable ABI's version."""
        major, minor = self.stable_abi
        return f"TORCH_TARGET_VERSION={(major << 56) | (minor << 48):#x}ULL"

    @property
    def capabilities(self) -> list[str]:
        """All capabilities of all sections, lowest first."""
        found = {capability for section in self.sections for capability in section.capabilities}
        return sorted(found, key=_capability_key)

    @property
    def python_files(self) -> list[Path]:
        """The files of torch-ext/<package> that go into a variant."""
        package = self.root / "torch-ext" / self.python_name
        files = (path for extension in self.data_extensions for path in package.rglob(f"*.{extension}"))
        return sorted(path for path in files if path.name != "_ops.py" and "__pycache__" not in path.parts)

    def kernel_id(self, archs: list[str], debug: bool) -> str:
        """Name of the operator namespace: another for every state of the sources, scripts and options.

        A Python identifier in kernel-builder's form, `_<name>_<backend>_<hash>`; no absolute path, time or
        compiler goes into the hash. `archs` are those of a CUDA variant; without any it is the CPU's.
        """
        backend = "cuda" if archs else "cpu"
        scripts = Path(__file__).resolve().parent
        builder = [("", path) for path in [scripts.parent / "build_kernel.py", *sorted(scripts.glob("*.py"))]]
        sections = self.sections_of(backend)
        sources = [(source, self.root / source) for section in sections for source in section.sources]
        python = [(str(path.relative_to(self.root)), path) for path in self.python_files]
        digest = hashlib.sha256()
        for name, path in [("build.toml", self.root / "build.toml"), *sorted(sources), *python, *builder]:
            content = path.read_bytes()
            digest.update(f"{name or path.name}\0{len(content)}\0".encode() + content)
        digest.update(" ".join(archs).encode())
        return f"_{self.python_name}_{backend}_{digest.hexdigest()[:12]}" + ("_debug" if debug else "")


def base_capability(capability: str) -> str:
    """The plain capability: 9.0 for "9.0", "9.0a" and "9.0+PTX"."""
    return capability.removesuffix("+PTX").rstrip("af")


def _capability_key(capability: str) -> tuple[int, int, str]:
    major, minor = base_capability(capability).split(".")
    return int(major), int(minor), capability


def open_project(root: Path) -> Project:
    """Read ROOT/build.toml.

    Raises:
        BuildError: no build.toml, one that the `kernels` parser refuses, no backend that is built here, no
            stable ABI version or more than one, a capability that is none, or a source file that is not
            there.
    """
    from kernels._rust import Build

    path = root / "build.toml"
    if not path.is_file():
        raise BuildError(f"{path}: no such file")
    try:
        Build.open(root)
    except ValueError as error:
        raise BuildError(f"{path}: {' '.join(str(error).split())}") from error

    with path.open("rb") as file:
        table = tomllib.load(file)
    general, torch = table["general"], table.get("torch", {})
    backends = tuple(backend for backend in BACKENDS if backend in general["backends"])
    stable_abi = torch.get("stable-abi", {})
    if isinstance(stable_abi, dict):
        versions = {stable_abi.get(backend) for backend in backends}
        stable_abi = versions.pop() if len(versions) == 1 else None
    if not backends or not stable_abi:
        raise BuildError(
            f"{path}: expected the backend cuda or cpu, and in [torch.stable-abi] one version X.Y for both"
        )

    sections = [_section("torch", torch)]
    sections += [
        _section(name, kernel)
        for name, kernel in table.get("kernel", {}).items()
        if kernel["backend"] in backends
    ]
    for section in sections:
        for source in section.sources:
            if not (root / source).is_file():
                raise BuildError(f"{path}: {section.name}: source {source} does not exist")
        if section.backend == "cuda" and not section.capabilities:
            raise BuildError(f"{path}: {section.name}: expected cuda-capabilities, got none")
        for capability in section.capabilities:
            if not _CAPABILITY.fullmatch(capability.removesuffix("+PTX")):
                raise BuildError(
                    f"{path}: {section.name}: {capability!r} is no CUDA capability (like 9.0 or 9.0a)"
                )

    major, minor = (int(part) for part in stable_abi.split(".")[:2])
    return Project(
        root=root,
        name=general["name"],
        version=general["version"],
        license=general["license"],
        backends=backends,
        python_depends={
            backend: (
                *general.get("python-depends", ()),
                *general.get(backend, {}).get("python-depends", ()),
            )
            for backend in backends
        },
        data_extensions=("py", *torch.get("pyext", ())),
        stable_abi=(major, minor),
        sections=tuple(sections),
    )


def _section(name: str, table: dict) -> Section:
    return Section(
        name=name,
        backend=table.get("backend"),
        sources=tuple(table.get("src", ())),
        include=tuple(table.get("include", ())),
        cxx_flags=tuple(table.get("cxx-flags", ())),
        cuda_flags=tuple(table.get("cuda-flags", ())),
        capabilities=tuple(table.get("cuda-capabilities", ())),
        depends=tuple(table.get("depends", ())),
    )


def select_archs(project: Project, asked: str | None) -> list[str] | None:
    """The value of `--archs` as capabilities of build.toml, or None when all are meant.

    `asked` is a list separated by commas or spaces, or "native" for the GPU of this machine.

    Raises:
        BuildError: an architecture that build.toml has not, or "native" without a GPU that it serves.
    """
    if asked is None:
        return None
    known = project.capabilities
    if asked == "native":
        return [_native_arch(known)]
    archs = asked.replace(",", " ").split()
    for arch in archs:
        if arch not in known:
            raise BuildError(
                f"--archs: unknown architecture {arch!r}, expected native or some of {', '.join(known)}"
            )
    if not archs:
        raise BuildError(f"--archs: expected native or some of {', '.join(known)}, got nothing")
    return [arch for arch in known if arch in archs]


def _native_arch(known: list[str]) -> str:
    import torch

    if not torch.cuda.is_available():
        raise BuildError("--archs native: this machine has no CUDA device")
    device = torch.cuda.get_device_capability()
    same_major = [arch for arch in known if _capability_key(arch)[0] == device[0]]
    served = [arch for arch in same_major if _capability_key(arch)[1] <= device[1]]
    if not served:
        raise BuildError(
            f"--archs native: none of {', '.join(known)} serves a device of {device[0]}.{device[1]}"
        )
    return base_capability(served[-1])

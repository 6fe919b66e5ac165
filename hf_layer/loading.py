"""Finding and loading the flash-kda kernel package, and keeping the reason when there is none.

Three places are looked at, and the first that exists decides:

1. `LOCAL_KERNELS="org/flash-kda=DIR"`, the override of the `kernels` package;
2. the `build/` folder of the source checkout that this file belongs to (`scripts/build_kernel.py` fills it);
3. the Hub, through `kernels.get_kernel`.

On a machine without a CUDA device the second is the CPU's variant, if the checkout has one built, and the
Hub is not asked: without either there is no kernel, a reason, and no network traffic.
A caller who names a folder gets the kernel from there and nowhere else, and one who names a Hub repository
or a revision gets it from the Hub, or from LOCAL_KERNELS, with or without a CUDA device.
Nothing is imported, opened or asked for before `load_kernel` is called.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

REPO_ID = "org/flash-kda"
VERSION = 1
ENV_REPO = "FLASH_KDA_REPO"
ENV_TRUST = "FLASH_KDA_TRUST_REMOTE_CODE"

logger = logging.getLogger(__name__)

# Results by arguments. Not functools.lru_cache: torch.compile looks a dictionary up but traces through that.
_loads: dict[tuple, KernelLoad] = {}


@dataclass(frozen=True)
class KernelLoad:
    """What `load_kernel` found.

    Attributes:
        module: the kernel package (`fwd`, `chunk_kda`, `layers`, `reference`), or None.
        source: where it came from, in words: "LOCAL_KERNELS", "the checkout's build/", "the Hub
            (org/flash-kda)" or a folder. None when no place was tried.
        reason: why `module` is None; None when it is not.
    """

    module: ModuleType | None
    source: str | None
    reason: str | None

    @property
    def status(self) -> str:
        """One line for people: the variant and where it was loaded from, or why the reference runs."""
        if self.module is None:
            return f"reference: {self.reason}"
        return f"flash-kda kernel {Path(self.module.__file__).parent.name} loaded from {self.source}"


def load_kernel(
    repo_id: str | None = None,
    version: int | None = VERSION,
    revision: str | None = None,
    trust_remote_code: bool | list[str] | tuple[str, ...] | None = None,
    path: str | os.PathLike | None = None,
) -> KernelLoad:
    """Load the kernel package, once per set of arguments and value of LOCAL_KERNELS.

    Args:
        repo_id: Hub repository. Default: the environment variable FLASH_KDA_REPO, else "org/flash-kda".
        version: major version of the package on the Hub; not used when `revision` is given.
        revision: branch, tag or commit on the Hub, instead of a version.
        trust_remote_code: as in `kernels.get_kernel`. The kernel is native code, so code from the Hub is
            refused by default unless its publisher is trusted there. Default: True when
            FLASH_KDA_TRUST_REMOTE_CODE=1.
        path: folder with the package, instead of all other places: a repository, its build/, or one variant.

    Returns:
        A `KernelLoad`. Failures are not raised: they are in its `reason`, and stay there (no second try).

    Raises:
        ValueError: `path` is given together with `repo_id` or `revision`.
    """
    if path is not None and (repo_id is not None or revision is not None):
        raise ValueError(f"path: expected no repo_id and no revision with it, got {repo_id!r}, {revision!r}")
    if trust_remote_code is None:
        trust_remote_code = os.environ.get(ENV_TRUST, "0") not in ("", "0")
    several = isinstance(trust_remote_code, (list, tuple))
    trust = tuple(trust_remote_code) if several else bool(trust_remote_code)
    place = "folder" if path is not None else "hub" if repo_id or revision is not None else "any"
    repo_id = os.fspath(path) if path is not None else repo_id or os.environ.get(ENV_REPO) or REPO_ID
    version = None if revision is not None else version
    key = (place, repo_id, version, revision, trust, os.environ.get("LOCAL_KERNELS", ""))
    if key not in _loads:
        _loads[key] = _load(*key)
    return _loads[key]


def kernel_status() -> str:
    """One line that says which kernel `load_kernel()` gives, or why the reference runs instead."""
    return load_kernel().status


def reference_reason(
    package: ModuleType, head_dim: int, device: torch.device, dtype: torch.dtype, gradient: bool = False
) -> str | None:
    """Why a kernel package sends a layer's calls to its reference, in a line; None: its kernel serves them.

    The package itself is asked, with tensors that have no memory: q, k, v and beta in `dtype` on `device`, a
    float32 gate, and with `gradient` the wish for one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.set_grad_enabled(gradient):
        x = torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype, requires_grad=gradient)
        g = torch.empty(1, 1, 1, head_dim, device=device)
        beta = torch.empty(1, 1, 1, device=device, dtype=dtype)
        return package.api.reference_reason(x, x, x, g, beta, None, None, None)


def _load(
    place: str,
    repo_id: str,
    version: int | None,
    revision: str | None,
    trust: bool | tuple[str, ...],
    local_kernels: str,
) -> KernelLoad:
    """`place` is "folder" (then `repo_id` is one), "hub", or "any" of the three that the module names."""
    gpu = torch.cuda.is_available()
    backend = {} if gpu else {"backend": "cpu"}
    overridden = place != "folder" and any(
        entry.partition("=")[0] == repo_id for entry in local_kernels.split(":")
    )
    folder = Path(repo_id) if place == "folder" else None
    if place == "any" and not overridden:
        folder = checkout_with_build()
        if folder is None and not gpu:
            return KernelLoad(None, None, "no CUDA device")

    if overridden:
        source = "LOCAL_KERNELS"
    elif folder is None:
        source = f"the Hub ({repo_id})"
    else:
        source = repo_id if place == "folder" else "the checkout's build/"

    try:
        from kernels import get_kernel, get_local_kernel

        if overridden or (folder is not None and (folder / "metadata.json").is_file()):
            backend = {}  # one variant may be named, of either kind
        if folder is not None:
            module = get_local_kernel(folder, **backend)
        else:
            trusted = list(trust) if isinstance(trust, tuple) else trust
            module = get_kernel(
                repo_id, version=version, revision=revision, trust_remote_code=trusted, **backend
            )
    except Exception as error:  # whatever a download, a resolver or the dynamic linker throws is the reason
        load = KernelLoad(None, source, _one_line(source, error, trust))
    else:
        load = KernelLoad(module, source, None)
    logger.info(load.status)
    return load


def checkout_with_build() -> Path | None:
    """Root of the source checkout this package runs from, if it holds a built variant for this machine (for
    GPUs where there is one, else for CPUs); else None."""
    root = Path(__file__).resolve().parent.parent
    for_cpu = ["cpu" in path.parent.name.split("-") for path in root.glob("build/*/metadata.json")]
    if (root / "build.toml").is_file() and (not torch.cuda.is_available()) in for_cpu:
        return root
    return None


def _one_line(source: str, error: Exception, trust: bool | tuple[str, ...]) -> str:
    text = " ".join(str(error).split())
    hint = f" ({ENV_TRUST}=1 trusts it)" if "trust_remote_code" in text and trust is False else ""
    return f"{source}: {type(error).__name__}: {text}{hint}"

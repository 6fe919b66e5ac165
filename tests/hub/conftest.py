"""Fixtures: the loopback Hub with the real build/ on it, and a client with an empty cache."""

from __future__ import annotations

import pytest
import torch
from hub_client import NAME, ROOT, Client, backend_of, current_variants, stand_in
from loopback import Files, LoopbackHub, Repository, read_files


@pytest.fixture(scope="session")
def real_files(variant_dir) -> Files:
    """The repository as it would be uploaded: build/ with every variant of the present sources, a page."""
    files = {"README.md": (ROOT / "README.md").read_bytes()}
    for variant in {variant_dir, *current_variants()}:
        files |= read_files(variant, f"build/{variant.name}/")
    return files


@pytest.fixture(scope="session")
def loadable_files(real_files) -> Files:
    """`real_files`, and a stand-in if none of its variants can be loaded by this torch."""
    wanted = "cpu" if torch.version.cuda is None else "cuda"
    if any(backend_of(variant) == wanted for variant in current_variants()):
        return real_files
    return real_files | stand_in(1)


@pytest.fixture
def hub(loadable_files):
    """A Hub with org/flash-kda, version 1."""
    with LoopbackHub() as server:
        repository = server.repositories[NAME] = Repository()
        repository.commit("main", {"README.md": b"# flash-kda\n"})
        repository.commit("v1", loadable_files)
        yield server


@pytest.fixture
def client(hub, tmp_path) -> Client:
    """A user with an empty cache."""
    home = tmp_path / "home"
    home.mkdir()
    return Client(hub, home)

"""What `hf_layer.fla` uses of flash-linear-attention 0.6, for machines that have no FLA.

FLA imports Triton, which is large and needs a GPU to be of use. The dispatcher is a page of Python: here
are its three names with the behaviour that our backends rely on, so that these are tested everywhere.
Where FLA is installed the same tests run on FLA itself.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

logger = logging.getLogger("fla.backends")


class BaseBackend:
    backend_type = "base"
    package_name = None
    env_var = None
    default_enable = True
    priority = 5

    @classmethod
    def is_available(cls) -> bool:
        return True

    def get_implementation(self, name: str):
        return getattr(self, name, None)

    def verify(self, name: str, *args, **kwargs):
        verifier = getattr(self, f"{name}_verifier", None)
        if verifier is None:
            return True, None
        try:
            return verifier(*args, **kwargs)
        except Exception as error:
            return False, str(error)


of_operations: dict[str, dict[str, BaseBackend]] = {}


def dispatch(entry):
    """Ask the backends of a function, or of the operation named, lowest priority first, then call it."""
    if isinstance(entry, str):
        return functools.partial(_dispatch, of_operations.setdefault(entry, {}))
    return _dispatch({}, entry)


def _dispatch(backends: dict[str, BaseBackend], entry):
    @functools.wraps(entry)
    def wrapper(*args, **kwargs):
        for backend in sorted(backends.values(), key=lambda backend: backend.priority):
            if backend.is_available() and backend.is_enabled():
                accepted, reason = backend.verify(entry.__name__, *args, **kwargs)
                if not accepted:
                    logger.info("%s rejected: %s", backend.backend_type, reason)
                    continue
                implementation = backend.get_implementation(entry.__name__)
                if implementation is not None:
                    return implementation(*args, **kwargs)
        return entry(*args, **kwargs)

    wrapper.backends = backends
    return wrapper


def register(entry):
    def add(backend_class):
        backend = backend_class()
        backends = of_operations.setdefault(entry, {}) if isinstance(entry, str) else entry.backends
        backends[backend.backend_type] = backend
        return backend_class

    return add


def modules() -> dict[str, ModuleType]:
    """fla, fla.backends, fla.ops and fla.ops.kda for sys.modules; its functions are for the test to set."""
    fla, backends, ops, kda = (ModuleType(n) for n in ("fla", "fla.backends", "fla.ops", "fla.ops.kda"))
    fla.backends, fla.ops, ops.kda = backends, ops, kda
    backends.BaseBackend, backends.dispatch, backends.register = BaseBackend, dispatch, register
    kda.chunk_kda = None
    return {module.__name__: module for module in (fla, backends, ops, kda)}

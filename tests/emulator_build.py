"""The GPU's operators on CPU tensors: the kernels' sources, compiled as C++ and run by tests/emulator."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from kernel_build.config import open_project

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "tests/emulator"
SOURCES = [
    *EMULATOR.glob("*.cpp"),
    ROOT / "torch-ext/torch_binding.cpp",
    ROOT / "kda_kernel/decode/fused_api.cpp",
    ROOT / "kda_kernel/layer/api.cpp",
    *(path for path in (ROOT / "kda_kernel").glob("*.cpp") if path.name != "cuda_backend.cpp"),
]
# They use what they declare in shared memory as any other, and tests/emulator/accesses.cpp looks on.
WATCHED = [EMULATOR / f"{name}.cpp" for name in ("decode_portable", "decode_sm90", "watched_faults")]
NAMESPACE = "flash_kda_emulated"

# Bytes of shared memory that a CTA may have, by compute capability.
SHARED = {"9.0": 227 << 10, "8.0": 163 << 10, "8.6": 99 << 10}


@dataclass
class Emulated:
    """What tests use of the kernel package, with the emulated operators."""

    ops: object
    reference: object
    reference_decode: object
    library: ctypes.CDLL

    def use(
        self, cluster_ctas: int = 1, shared_bytes: int = SHARED["9.0"], seed: int = 0, sms: int = 132
    ) -> None:
        """The device of later calls, by the most CTAs of a cluster, a CTA's shared memory and how many SMs it says
        it has; its warps' order."""
        self.library.emulator_configure(cluster_ctas, shared_bytes, ctypes.c_uint64(seed), sms)


class InSeveralOrders:
    """Operators that run once on each of some devices (arguments of `Emulated.use`), and give the same bits there.

    Only the last device's run is on the arguments themselves, the others are on copies.
    """

    def __init__(self, emulated: Emulated, devices: list[dict]) -> None:
        self.emulated, self.devices = emulated, devices

    def __getattr__(self, name: str):
        operator = getattr(self.emulated.ops, name)

        def run(*arguments):
            copies = [copy.deepcopy(arguments) for _ in self.devices[1:]]
            written = []
            for device, given in zip(self.devices, [*copies, arguments], strict=True):
                self.emulated.use(**device)
                result = operator(*given)
                written.append([everything(x) for x in (*given, result) if isinstance(x, torch.Tensor)])
                same = all(map(torch.equal, written[0], written[-1]))
                assert same, f"{name}: not the same on {self.devices[0]} and {device}"
            return result

        return run


def instead_of_a_gpu(emulated: Emulated, devices: list[dict], monkeypatch, *modules) -> Emulated:
    """For the tests of `modules`, of tests/gpu: their tensors are on the CPU, the operators run on `devices`."""
    for module in modules:
        monkeypatch.setattr(module, "DEVICE", "cpu")
    return replace(emulated, ops=InSeveralOrders(emulated, devices))


def everything(x: torch.Tensor) -> torch.Tensor:
    """The bytes of all the memory that x is a part of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def build(toolchain, folder: Path) -> Path:
    """The operators with the emulator as their backend, as a library."""
    torch_include = toolchain.torch_dir / "include"
    includes = [
        EMULATOR, ROOT / "kda_kernel", ROOT / "torch-ext", torch_include, toolchain.cuda_home / "include",
    ]  # fmt: skip
    defined = [
        f"TORCH_EXTENSION_NAME={NAMESPACE}",
        open_project(ROOT).torch_target,
        "aoti_torch_device_type_cuda=aoti_torch_device_type_cpu",  # a tensor on the CPU is one on the GPU
    ]
    options = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden"]
    options += [*(f"-D{name}" for name in defined), *(f"-I{path}" for path in includes)]

    def run(*arguments: object) -> None:
        command = [str(toolchain.host_compiler), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        run(*options, *(["-fsanitize=thread"] if source in WATCHED else []), "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / f"{NAMESPACE}.so"
    libraries = [f"-L{toolchain.torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]
    run("-shared", *objects, *libraries, "-o", library)
    return library


def load(library: Path, package) -> Emulated:
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulator_fault.restype = ctypes.c_char_p
    return Emulated(getattr(torch.ops, NAMESPACE), package.reference, package.reference_decode, loaded)

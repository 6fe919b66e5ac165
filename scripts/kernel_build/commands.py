"""The compiler and linker commands of a build, kernel-builder's flags, and the files generated for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import Project, Section
from .steps import Step
from .toolchain import Toolchain

PYTHON_ABI = "3.9"
MANYLINUX = "manylinux_2_28"

# kernel-builder writes a header of this name and with these three macros beside torch_binding.cpp.
REGISTRATION_H = """\
// Generated. Macros that take the namespace from a macro, TORCH_EXTENSION_NAME.
#pragma once

#include <Python.h>

#define FLASH_KDA_JOIN_EXPANDED(a, b) a##b
#define FLASH_KDA_JOIN(a, b) FLASH_KDA_JOIN_EXPANDED(a, b)
#define FLASH_KDA_QUOTE_EXPANDED(a) #a
#define FLASH_KDA_QUOTE(a) FLASH_KDA_QUOTE_EXPANDED(a)

#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, KEY, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, KEY, MODULE)

// An empty Python module: importing it loads the library, and with it the operators.
#define REGISTER_EXTENSION(NAME)                                                             \\
  PyMODINIT_FUNC FLASH_KDA_JOIN(PyInit_, NAME)() {                                           \\
    static struct PyModuleDef module = {                                                     \\
        PyModuleDef_HEAD_INIT, FLASH_KDA_QUOTE(NAME), nullptr, 0, nullptr};                  \\
    return PyModule_Create(&module);                                                         \\
  }
"""

# manylinux_2_28 ends at glibc 2.28 and GLIBCXX_3.4.24. The headers of newer compilers (seen: g++ 12) refer
# to a few symbols beyond that. Defined in the extension, they are not looked up in the user's libraries.
MANYLINUX_CPP = """\
#include <new>
#include <sstream>

// Default constructors: GLIBCXX_3.4.26. str() with a ref qualifier (C++20): GLIBCXX_3.4.29.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// GLIBCXX_3.4.29, from std::allocator.
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// GLIBC_2.32, from std::shared_ptr; 0 means that there may be other threads: reference counts stay atomic.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
"""

# Python finds PyInit_ by name; everything else must not meet the symbols of other libraries.
EXPORTS_MAP = "{ global: PyInit_*; local: *; };\n"


@dataclass(frozen=True)
class Plan:
    """What one build makes: its objects, and how they are linked."""

    project: Project
    toolchain: Toolchain
    archs: dict[str, list[str]]
    kernel_id: str
    debug: bool
    jobs: int
    objects: Path
    logs: Path

    def write_generated(self) -> None:
        """Write the generated sources. Files that already read so are left alone."""
        generated = {
            "registration.h": REGISTRATION_H,
            "manylinux.cpp": MANYLINUX_CPP,
            "exports.map": EXPORTS_MAP,
        }
        self.generated.mkdir(parents=True, exist_ok=True)
        for name, text in generated.items():
            path = self.generated / name
            if not path.is_file() or path.read_text() != text:
                path.write_text(text)

    @property
    def backend(self) -> str:
        return "cpu" if self.toolchain.nvcc is None else "cuda"

    @property
    def generated(self) -> Path:
        return self.objects / "generated"

    def compile_steps(self) -> list[Step]:
        """One step per .cu and .cpp, the longest (CUDA) first."""
        sections = self.project.sections_of(self.backend)
        steps = [self._compile(section, source) for section in sections for source in section.compiled]
        shim = self.generated / "manylinux.cpp"
        steps.append(self._step("manylinux.cpp", self._cxx([]), shim))
        return sorted(steps, key=lambda step: not step.name.endswith(".cu"))

    def link_step(self, objects: list[Path]) -> Step:
        """Link the extension.

        libcudart is linked dynamically, as by kernel-builder: a CUDA torch has it loaded already, whatever
        toolkit the machine has, and the static one would bring in symbols of this machine's glibc
        (manylinux_2_34 here). Symbols of libtorch_cuda stay unresolved until torch has loaded it.
        """
        exports = self.generated / "exports.map"
        command = [
            str(self.toolchain.host_compiler), "-shared",
            *map(str, objects),
            f"-Wl,--version-script={exports}", "-Wl,--gc-sections", "-Wl,--build-id=none",
            f"-L{self.toolchain.torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed",
        ]  # fmt: skip
        if self.backend == "cuda":
            command.append(str(self.toolchain.cudart))
        if not self.debug:
            command.append("-s")
        return Step(
            name=f"{self.kernel_id}.abi3.so",
            command=tuple(command),
            output=self.objects / "extension.so",
            inputs=(*objects, exports),
            tools=self.toolchain.description,
            log=self.logs / "link.log",
            depfile=False,
        )

    def _compile(self, section: Section, source: str) -> Step:
        path = self.project.root / source
        if source.endswith(".cu"):
            threads = max(1, min(self.jobs, len(self.archs[section.name])))
            # nvcc gives what is local to a file a name with the hash of the file's absolute path; with this
            # path instead, the same source makes the same object in every folder.
            name = ["-Xcudafe", f"--orig_src_path_name=/{self.project.name}/{source}"]
            return self._step(source, self._nvcc(section) + name, path, extra=("--threads", str(threads)))
        return self._step(source, self._cxx(self._flags(section) + list(section.cxx_flags)), path)

    def _step(self, name: str, command: list[str], source: Path, extra: tuple[str, ...] = ()) -> Step:
        flat = name.replace("/", "-")
        return Step(
            name=name,
            command=(*command, "-c", str(source)),
            output=self.objects / f"{flat}.o",
            inputs=(source,),
            tools=self.toolchain.description,
            log=self.logs / f"{flat}.log",
            extra=extra,
        )

    @property
    def _prefix_maps(self) -> list[str]:
        """Keep the places of this machine out of the binary (__FILE__, debug information)."""
        tools = self.toolchain
        folders = {
            self.project.root: ".",
            self.generated: "generated",
            tools.torch_dir: "torch",
        }
        if tools.cuda_home is not None:
            folders[tools.cuda_home] = "cuda"
        if tools.cutlass_include is not None:
            folders[tools.cutlass_include] = "cutlass"
        return [f"-ffile-prefix-map={folder}={name}" for folder, name in folders.items()]

    def _flags(self, section: Section) -> list[str]:
        """Definitions and include folders, the same for both compilers."""
        flags = [f"-D{self.project.torch_target}"]
        flags += ["-DUSE_CUDA=1", "-DCUDA_KERNEL"] if self.backend == "cuda" else ["-DCPU_KERNEL"]
        if section.name == "torch":  # the name changes with every source: keep it out of the CUDA objects
            python_abi = "0x{:02x}{:02x}0000".format(*map(int, PYTHON_ABI.split(".")))
            flags += [f"-DTORCH_EXTENSION_NAME={self.kernel_id}", f"-DPy_LIMITED_API={python_abi}"]
        folders = [self.project.root / folder for folder in section.include]
        flags += [f"-I{folder}" for folder in (*folders, self.generated)]
        system = [self.toolchain.torch_dir / "include", self.toolchain.python_include]
        if self.toolchain.cutlass_include is not None:
            system.append(self.toolchain.cutlass_include)
        return flags + [word for folder in system for word in ("-isystem", str(folder))]

    def _cxx(self, flags: list[str]) -> list[str]:
        command = [str(self.toolchain.host_compiler), "-std=c++20", "-O3", "-DNDEBUG", "-Wall", "-fPIC"]
        command += ["-fvisibility=hidden", "-fno-gnu-unique", "-ffunction-sections", *self._prefix_maps]
        if self.debug:
            command.append("-g")
        command += flags
        if self.toolchain.cuda_home is not None:
            command += ["-isystem", str(self.toolchain.cuda_home / "include")]
        return command

    def _nvcc(self, section: Section) -> list[str]:
        command = [str(self.toolchain.nvcc), "-ccbin", str(self.toolchain.host_compiler), "-std=c++17"]
        command += ["-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
        host_flags = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
        # nvcc hands these to a shell, and folders may hold blanks.
        host_flags += [f'"{flag}"' for flag in self._prefix_maps]
        command += ["-Xcompiler", ",".join(host_flags)]
        if self.debug:
            command.append("-lineinfo")
        for capability in self.archs[section.name]:
            number = capability.removesuffix("+PTX").replace(".", "")
            command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if capability.endswith("+PTX"):
                command += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        return [*command, *self._flags(section), *section.cuda_flags]

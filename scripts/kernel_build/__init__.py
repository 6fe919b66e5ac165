"""What `scripts/build_kernel.py` is made of: build.toml (`config`), the compilers (`toolchain`), incremental
compilation (`steps`) and the folder that the `kernels` package loads (`variant`)."""


class BuildError(Exception):
    """Something a person has to put right; its text is one line."""

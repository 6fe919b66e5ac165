#!/usr/bin/env python3
"""Make a CUDA toolkit of NVIDIA's wheels, for `scripts/build_kernel.py --variant`. Needs a package index.

It goes below build/.toolkits, or where FLASH_KDA_TOOLKITS says, and nothing else on the machine changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernel_build import BuildError
from kernel_build.toolkits import WHEELS, fetch, short_name

ROOT = Path(__file__).resolve().parent.parent


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    versions = {short_name(cuda): cuda for cuda in WHEELS}
    parser.add_argument("variant", choices=versions, help="which CUDA release")
    arguments = parser.parse_args(words)
    try:
        print(fetch(versions[arguments.variant], ROOT))
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

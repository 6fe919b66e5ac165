"""kda_kernel/common/per_device.h: what a launch keeps for each device, in a program without a device."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Exits with the line of the first expectation that does not hold.
PROGRAM = """
#include <thread>
#include <vector>

#include "common/per_device.h"

#define EXPECT(condition) \\
  if (!(condition)) return __LINE__

kda::PerDevice numbers, others;

int main() {
  int runs = 0, value = 0;
  const auto find = [&](int device, int& found) {
    ++runs;
    found = 100 + device;
    return cudaSuccess;
  };
  const auto fail = [&](int, int& found) {
    ++runs;
    found = 7;
    return cudaErrorInvalidDevice;
  };
  EXPECT(numbers.get(1, value, fail) == cudaErrorInvalidDevice && runs == 1);  // an error is not kept
  EXPECT(numbers.get(1, value, find) == cudaSuccess && value == 101 && runs == 2);
  value = 0;
  EXPECT(numbers.get(1, value, fail) == cudaSuccess && value == 101 && runs == 2);
  EXPECT(numbers.get(0, value, find) == cudaSuccess && value == 100 && runs == 3);
  EXPECT(others.get(1, value, find) == cudaSuccess && value == 101 && runs == 4);
  for (int n = 1; n <= 2; ++n) {  // more devices than are kept
    EXPECT(numbers.get(1000, value, find) == cudaSuccess && value == 1100 && runs == 4 + n);
  }

  std::vector<std::thread> threads;
  std::vector<int> found(8);
  for (int n = 0; n < 8; ++n) {
    threads.emplace_back([&, n] {
      for (int device = 2; device < 60; ++device) {
        int mine = 0;
        numbers.get(device, mine, [](int device, int& value) {
          value = 100 + device;
          return cudaSuccess;
        });
        found[n] += mine == 100 + device;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int count : found) EXPECT(count == 58);
  return 0;
}
"""


def test_found_once_for_each_device(toolchain, tmp_path):
    source, program = tmp_path / "per_device.cpp", tmp_path / "per_device"
    source.write_text(PROGRAM)
    command = [
        toolchain.host_compiler,
        "-std=c++17",
        "-pthread",
        "-Wall",
        "-Werror",
        f"-I{ROOT / 'kda_kernel'}",
    ]
    command += [f"-I{toolchain.cuda_home / 'include'}", source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([program]).returncode == 0, "the exit code is the line in PROGRAM"

// Stands in for the header that kernel-builder makes: the operators have the name that the build gives, and those for a GPU
// serve tensors of the CPU.
#pragma once

#define STABLE_TORCH_LIBRARY_EXPAND(N, M) STABLE_TORCH_LIBRARY(N, M)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(N, K, M) STABLE_TORCH_LIBRARY_IMPL(N, CPU, M)
#define REGISTER_EXTENSION(N)

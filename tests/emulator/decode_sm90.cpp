// The decode kernels from compute capability 9.0 on, whose fused step takes a cluster; under names of their own, for
// decode_portable.cpp has the others.
#include "emulator.h"

#define __CUDA_ARCH__ 900
#define decode decode_sm90
#define launch_decode launch_decode_sm90
#define launch_fused_decode launch_fused_decode_sm90
#include "decode/decode.cu"

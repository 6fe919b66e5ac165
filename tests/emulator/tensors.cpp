// Tensor copies (TMA): what the driver makes of a tensor's description, and what a copy of a box does.
#include "emulator.h"

namespace emulator {

void copy_box(const TensorMap& map, const int (&from)[4], uint8_t* shared, bool to_shared) {
  const int columns = map.box[0], row_bytes = columns * map.elem_bytes;
  int row = 0;
  for (int batch = 0; batch < map.box[3]; ++batch) {
    for (int token = 0; token < map.box[2]; ++token) {
      for (int head = 0; head < map.box[1]; ++head, ++row) {
        for (int column = 0; column < columns; ++column) {
          const int64_t at[4] = {from[0] + column, from[1] + head, from[2] + token, from[3] + batch};
          uint64_t offset = 0;
          bool inside = true;
          for (int i = 0; i < 4; ++i) {
            inside &= at[i] >= 0 && at[i] < static_cast<int64_t>(map.sizes[i]);
            offset += at[i] * map.strides[i];
          }
          // The units' number in its low bits changes with the number of 128-byte lines.
          const int byte = row * row_bytes + column * map.elem_bytes;
          uint8_t* place = shared + (byte ^ byte / 128 % map.swizzled_units * 16);
          if (to_shared && inside) {
            std::memcpy(place, map.data + offset, map.elem_bytes);
          } else if (to_shared) {
            std::memset(place, 0, map.elem_bytes);
          } else if (inside) {
            std::memcpy(map.data + offset, place, map.elem_bytes);
          }
        }
      }
    }
  }
}

namespace {

// What the driver refuses, the emulator does.
CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                  const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                  const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const bool wide = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const bool all = swizzle == CU_TENSOR_MAP_SWIZZLE_128B, pairs = swizzle == CU_TENSOR_MAP_SWIZZLE_32B;
  bool valid = (wide || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) && rank == 4 && (all || pairs) &&
               interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0;
  TensorMap tensor{.data = static_cast<uint8_t*>(data), .elem_bytes = wide ? 4 : 2, .swizzled_units = all ? 8 : 2};
  tensor.strides[0] = tensor.elem_bytes;
  for (int i = 0; i < 4 && valid; ++i) {
    tensor.sizes[i] = sizes[i];
    tensor.box[i] = box[i];
    if (i > 0) tensor.strides[i] = strides[i - 1];
    valid = sizes[i] > 0 && sizes[i] <= 1ull << 32 && box[i] > 0 && box[i] <= 256 && steps[i] == 1 &&
            (i == 0 || (strides[i - 1] % 16 == 0 && strides[i - 1] < 1ull << 40));
  }
  valid = valid && static_cast<int>(box[0]) * tensor.elem_bytes <= tensor.swizzled_units * 16;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &tensor, sizeof(tensor));
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace emulator

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&emulator::encode_tensor_map);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

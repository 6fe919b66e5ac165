// Stands in for CUTLASS's header: registers are not emulated.
#pragma once

namespace cutlass::arch {

template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}

}  // namespace cutlass::arch

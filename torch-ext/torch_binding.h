#pragma once

#include "api.h"
#if !defined(CPU_KERNEL)
#include "decode/fused_api.h"
#endif
#include "layer/api.h"

#include "emulator.h"

#include "prefill/portable.cu"

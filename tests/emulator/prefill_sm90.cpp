#include "emulator.h"

#include "prefill/sm90.cu"

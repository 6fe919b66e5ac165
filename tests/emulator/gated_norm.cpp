#include "emulator.h"

#include "layer/gated_norm.cu"

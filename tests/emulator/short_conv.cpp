#include "emulator.h"

#include "layer/short_conv.cu"

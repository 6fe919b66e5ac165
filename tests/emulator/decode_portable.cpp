#include "emulator.h"

#include "decode/decode.cu"

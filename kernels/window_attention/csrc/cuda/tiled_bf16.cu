#include "tiled_launch.h"

WA_TILED_FOR(bf16, bf16)

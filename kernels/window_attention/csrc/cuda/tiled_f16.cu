#include "tiled_launch.h"

WA_TILED_FOR(f16, f16)

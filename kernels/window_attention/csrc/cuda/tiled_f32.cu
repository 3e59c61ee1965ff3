#include "tiled_launch.h"

WA_TILED_FOR(f32, float)

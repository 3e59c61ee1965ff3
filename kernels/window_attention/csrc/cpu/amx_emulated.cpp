// build: -ffp-contract=fast -fno-math-errno
// The code of amx.cpp on any processor, for tests: only the operations on tiles are replaced. Never
// chosen by itself.
#define WA_ISA amx_emulated
#define WA_NAME "amx_emulated"
#define WA_KERNELS kernels_amx_emulated
#define WA_MULTIPLIES_BF16
#define WA_TILES
#define WA_TILES_EMULATED
#include "isa.h"

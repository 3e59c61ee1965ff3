// build[x86_64]: -mamx-tile -mamx-bf16 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma -mf16c -mprfchw
// build[x86_64]: -ffp-contract=fast -fno-math-errno -Wno-uninitialized -Wno-maybe-uninitialized
#define WA_ISA amx
#define WA_NAME "amx"
#define WA_KERNELS kernels_amx
#define WA_MULTIPLIES_BF16
#define WA_TILES
#include "isa.h"

// build[x86_64]: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx2 -mfma -mf16c -mprfchw
// build[x86_64]: -ffp-contract=fast -fno-math-errno -Wno-uninitialized -Wno-maybe-uninitialized
#define WA_ISA avx512_bf16
#define WA_NAME "avx512bf16"
#define WA_KERNELS kernels_avx512_bf16
#define WA_MULTIPLIES_BF16
#include "isa.h"

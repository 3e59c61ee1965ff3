// build[x86_64]: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mprfchw
// build[x86_64]: -ffp-contract=fast -fno-math-errno -Wno-uninitialized -Wno-maybe-uninitialized
#define WA_ISA avx512
#define WA_NAME "avx512"
#define WA_KERNELS kernels_avx512
#include "isa.h"

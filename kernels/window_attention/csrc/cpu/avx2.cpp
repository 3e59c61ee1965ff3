// build[x86_64]: -mavx2 -mfma -mf16c -mprfchw -ffp-contract=fast -fno-math-errno
#define WA_ISA avx2
#define WA_NAME "avx2"
#define WA_KERNELS kernels_avx2
#include "isa.h"

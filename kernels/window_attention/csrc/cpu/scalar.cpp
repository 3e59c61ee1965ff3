// build: -ffp-contract=fast -fno-math-errno
// What every processor of this kind can do: four floats at a time, SSE2 or NEON or none of them as
// the compiler sees fit.
#define WA_ISA scalar
#define WA_NAME "scalar"
#define WA_KERNELS kernels_scalar
#include "isa.h"

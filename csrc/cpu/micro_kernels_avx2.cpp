#define DCA_ISA_TABLE kMicroKernelsAvx2
#define DCA_ISA_NAME "avx2"
#define DCA_ISA_LANES 8
#define DCA_ISA_PANEL 2
#include "micro_kernels.inc"

#define DCA_ISA_TABLE kMicroKernelsAvx512
#define DCA_ISA_NAME "avx512"
#define DCA_ISA_LANES 16
#define DCA_ISA_PANEL 4
#include "micro_kernels.inc"

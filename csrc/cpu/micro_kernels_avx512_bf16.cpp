#define DCA_ISA_TABLE kMicroKernelsAvx512BFloat16
#define DCA_ISA_NAME "avx512_bf16"
#define DCA_ISA_LANES 16
#define DCA_ISA_PANEL 4
#define DCA_ISA_BFLOAT16
#include "micro_kernels.inc"

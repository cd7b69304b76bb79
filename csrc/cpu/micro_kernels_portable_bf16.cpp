#define DCA_ISA_TABLE kMicroKernelsPortableBFloat16
#define DCA_ISA_NAME "portable_bf16"
#define DCA_ISA_LANES 4
#define DCA_ISA_PANEL 2
#define DCA_ISA_BFLOAT16
#include "micro_kernels.inc"

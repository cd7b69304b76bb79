#define DCA_ISA_TABLE kMicroKernelsAmxBFloat16
#define DCA_ISA_NAME "amx_bf16"
#define DCA_ISA_LANES 16
#define DCA_ISA_PANEL 4
#define DCA_ISA_AMX
#include "micro_kernels.inc"

#define DCA_ISA_TABLE kMicroKernelsPortable
#define DCA_ISA_NAME "portable"
#define DCA_ISA_LANES 4
#define DCA_ISA_PANEL 2
#include "micro_kernels.inc"

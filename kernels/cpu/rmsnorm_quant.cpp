#include "rmsnorm_quant.h"

int rmsq::RMSQ_ISA::rms_norm_quant_rows() { return 0; }

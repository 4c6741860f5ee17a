#pragma once
#include "isa.h"

RMSQ_DECLARE_KERNEL(int rms_norm_quant_rows())

// The kernels for bfloat16, which fused_floats.cpp shares none of.
#include "fused.h"

template void d2moe::fused_experts<d2moe::BFloat16>(const d2moe::CallC&);

// Together: in codes both are multiplied by the same kernels.
#include "fused.h"

template void d2moe::fused_experts<d2moe::Float32>(const d2moe::CallC&);
template void d2moe::fused_experts<d2moe::Float16>(const d2moe::CallC&);

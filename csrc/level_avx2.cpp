// The avx2 level. Compiled with its instruction set's flags (CMakeLists.txt), so it may share no inline or template
// function with another unit: the linker would keep one copy for all. Hence the namespace, and no standard containers.
#include <immintrin.h>

#include "kernels.h"

namespace meprop {
namespace level_avx2 {
#include "simd_avx2.h"

#include "level.inl"
}  // namespace level_avx2

const Kernels kAvx2 = {"avx2", level_avx2::kTyped<float>, level_avx2::kTyped<Bf16>,
                       level_avx2::kMaps, level_avx2::kLstm, level_avx2::kLstmProducts<float>,
                       level_avx2::kLstmProducts<Bf16>, level_avx2::kOptimizer<float>, level_avx2::kOptimizer<Bf16>};
}  // namespace meprop

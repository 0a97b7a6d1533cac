// The avx512 level. Compiled with its instruction set's flags (CMakeLists.txt), so it may share no inline or template
// function with another unit: the linker would keep one copy for all. Hence the namespace, and no standard containers.
#include <immintrin.h>

#include "kernels.h"

namespace meprop {
namespace level_avx512 {
#include "simd_avx512.h"

#include "level.inl"
}  // namespace level_avx512

const Kernels kAvx512 = {"avx512", level_avx512::kTyped<float>, level_avx512::kTyped<Bf16>,
                         level_avx512::kMaps, level_avx512::kLstm, level_avx512::kLstmProducts<float>,
                         level_avx512::kLstmProducts<Bf16>, level_avx512::kOptimizer<float>,
                         level_avx512::kOptimizer<Bf16>};
}  // namespace meprop

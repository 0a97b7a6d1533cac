// The scalar level. Compiled with its instruction set's flags (CMakeLists.txt), so it may share no inline or template
// function with another unit: the linker would keep one copy for all. Hence the namespace, and no standard containers.
#include "kernels.h"

namespace meprop {
namespace level_scalar {
#include "simd_scalar.h"

#include "level.inl"
}  // namespace level_scalar

const Kernels kScalar = {"scalar", level_scalar::kTyped<float>, level_scalar::kTyped<Bf16>,
                         level_scalar::kMaps, level_scalar::kLstm, level_scalar::kLstmProducts<float>,
                         level_scalar::kLstmProducts<Bf16>, level_scalar::kOptimizer<float>,
                         level_scalar::kOptimizer<Bf16>};
}  // namespace meprop

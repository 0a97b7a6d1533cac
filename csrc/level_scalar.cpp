// The scalar level. Compiled with its instruction set's flags (CMakeLists.txt), so it may share no inline or template
// function with another unit: the linker would keep one copy for all. Hence the namespace, and no standard containers.
#include "kernels.h"

namespace meprop {
namespace level_scalar {
#include "constants.inl"
#include "simd_scalar.h"
#include "topk.inl"
}  // namespace level_scalar

const Kernels kScalar = {"scalar", level_scalar::topk_rows<float>, level_scalar::topk_rows<Bf16>};
}  // namespace meprop

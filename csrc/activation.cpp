#include "drivers.h"
#include "selected.h"
#include "team.h"

namespace meprop {
namespace {

template <class T, class Body>
Status for_parts(const Dropout& of, int64_t entries, T* result, int threads, Body body) {
  if (threads < 1 || of.dropped >> 16 != 0 || !fits<T>(1, entries, 0)) return Status::kBadSize;
  prefer_large_pages(result, static_cast<size_t>(entries) * sizeof(T));
  run_team(team_size(threads, entries, 0), [&](Team team) { body(team.part(entries, kBitBlock)); });
  return Status::kOk;
}

}  // namespace

template <class T>
Status drop(const Kernels& kernels, const Dropout& of, int64_t entries, const T* x, T* y, uint64_t* bits, int threads) {
  return for_parts(of, entries, y, threads,
                   [&](Range part) { typed<T>(kernels).drop(of, x, part.begin, part.end, y, bits); });
}

template <class T>
Status drop_gradient(const Kernels& kernels, const Dropout& of, int64_t entries, const T* grad, const T* x,
                     const uint64_t* bits, T* grad_x, int threads) {
  return for_parts(of, entries, grad_x, threads, [&](Range part) {
    typed<T>(kernels).drop_gradient(of, grad, x, bits, part.begin, part.end, grad_x);
  });
}

#define MEPROP_INSTANTIATE(T)                                                                           \
  template Status drop(const Kernels&, const Dropout&, int64_t, const T*, T*, uint64_t*, int);          \
  template Status drop_gradient(const Kernels&, const Dropout&, int64_t, const T*, const T*, const uint64_t*, T*, int);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)
#undef MEPROP_INSTANTIATE

}  // namespace meprop

#include <cmath>

#include "drivers.h"
#include "team.h"

namespace meprop {
namespace {

constexpr int64_t kLineFloats = 16;  // of a cache line, which two threads do not share

// Some neighbours in a row of the parameter. They begin at the place `at` in its memory.
struct Stretch {
  int64_t row, at, width;
};

template <class Apply>
class Applying : public GradientTaker {
 public:
  // `indices` are the rows of the parameter that those of the gradient are of. Null if they are the same.
  Applying(int64_t width, const int64_t* indices, Apply apply) : width_(width), indices_(indices), apply_(apply) {}
  void take(int64_t row, int64_t column, int64_t width, const float* grad) const override {
    if (indices_ != nullptr) row = indices_[row];
    apply_(Stretch{row, row * width_ + column, width}, grad);
  }

 private:
  int64_t width_;
  const int64_t* indices_;
  Apply apply_;
};

// Calls apply(stretch, grad) for all that moves, with its gradient, or null where it has none.
template <class Apply>
Status for_rows(const Kernels& kernels, const SparseRows& call, Apply apply) {
  if (call.threads < 1 || call.count < 0 || !fits<float>(call.rows, call.width, 0)) return Status::kBadSize;
  const bool whole = call.indices == nullptr && call.count > 0;
  if (whole && call.count != call.rows) return Status::kBadSize;
  if (!whole && (call.count > call.rows || !ascending(call.indices, call.count, call.rows))) return Status::kBadIndex;
  if (call.product != nullptr) {
    if (call.count == 0) return Status::kOk;  // a linear map has an output
    const Applying<Apply> taker(call.width, call.indices, apply);
    LinearBackward<float> product = *call.product;
    product.outputs = call.count, product.inputs = call.width, product.threads = call.threads;
    product.taker = &taker;
    return linear_backward(kernels, product);
  }
  const int64_t moving = call.every_row ? call.rows : call.count;
  const auto row_at = [&](int64_t row) { return Stretch{row, row * call.width, call.width}; };
  run_team(team_size(call.threads, moving * call.width, 0), [&](Team team) {
    if (whole) {
      const Range part = team.part(call.rows * call.width, kLineFloats);
      if (part.size() > 0) apply(Stretch{0, part.begin, part.size()}, call.grad + part.begin);
      return;
    }
    const Range part = team.part(moving);
    if (!call.every_row) {
      for (int64_t i = part.begin; i < part.end; ++i) apply(row_at(call.indices[i]), call.grad + i * call.width);
      return;
    }
    const int64_t* end = call.indices + call.count;
    const int64_t* next = std::lower_bound(call.indices, end, part.begin);
    for (int64_t row = part.begin; row < part.end; ++row) {
      const bool has_gradient = next != end && *next == row;
      apply(row_at(row), has_gradient ? call.grad + (next - call.indices) * call.width : nullptr);
      next += has_gradient;
    }
  });
  return Status::kOk;
}

// What a stretch of a matrix begins with; null of null.
template <class T>
T* at(T* matrix, const Stretch& stretch) {
  return matrix != nullptr ? matrix + stretch.at : nullptr;
}

Rounding rounding(uint64_t key, const Stretch& stretch) { return {key, stretch.at}; }

template <class S>
const OptimizerKernels<S>& of_states(const Kernels& kernels);
template <>
const OptimizerKernels<float>& of_states(const Kernels& kernels) {
  return kernels.optimizer;
}
template <>
const OptimizerKernels<Bf16>& of_states(const Kernels& kernels) {
  return kernels.narrow_optimizer;
}

}  // namespace

bool ascending(const int64_t* indices, int64_t count, int64_t rows) {
  bool valid = count == 0 || (indices[0] >= 0 && indices[count - 1] < rows);
  for (int64_t i = 1; i < count; ++i) valid &= indices[i - 1] < indices[i];
  return valid;
}

template <class S>
Status sgd_rows(const Kernels& kernels, const SparseRows& call, const Sgd<S>& options) {
  SgdStep of_all;
  of_all.l2 = static_cast<float>(options.weight_decay);
  of_all.lr = static_cast<float>(options.lr);
  of_all.momentum = of_all.keep = static_cast<float>(options.momentum);
  of_all.add = static_cast<float>(1 - options.dampening);
  of_all.nesterov = options.nesterov;
  return for_rows(kernels, call, [&](const Stretch& part, const float* grad) {
    SgdStep step = of_all;
    if (options.keep != nullptr) step.keep = options.keep[part.row];
    of_states<S>(kernels).sgd(step, rounding(options.key, part), part.width, grad, at(call.weight, part),
                              at(call.copy, part), at(options.buffer, part));
  });
}

template <class S>
Status adam_rows(const Kernels& kernels, const SparseRows& call, const Adam<S>& options) {
  AdamStep of_all;
  of_all.l2 = options.decoupled ? 0.0f : static_cast<float>(options.weight_decay);
  of_all.shrink = options.decoupled ? static_cast<float>(1 - options.lr * options.weight_decay) : 1.0f;
  of_all.keep_first = static_cast<float>(options.beta1), of_all.first = static_cast<float>(1 - options.beta1);
  of_all.keep_second = static_cast<float>(options.beta2), of_all.second = static_cast<float>(1 - options.beta2);
  of_all.step_size = static_cast<float>(options.lr / (1 - std::pow(options.beta1, options.step)));
  of_all.root_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(options.beta2, options.step)));
  of_all.eps = static_cast<float>(options.eps);
  return for_rows(kernels, call, [&](const Stretch& part, const float* grad) {
    AdamStep step = of_all;
    if (options.keep_first != nullptr) step.keep_first = options.keep_first[part.row];
    if (options.keep_second != nullptr) step.keep_second = options.keep_second[part.row];
    if (options.shrink != nullptr) step.shrink = options.shrink[part.row];
    of_states<S>(kernels).adam(step, rounding(options.key, part), part.width, grad, at(call.weight, part),
                               at(call.copy, part), at(options.first, part), at(options.second, part));
  });
}

template <class S>
Status adagrad_rows(const Kernels& kernels, const SparseRows& call, const Adagrad<S>& options) {
  const AdagradStep step = {static_cast<float>(options.weight_decay), static_cast<float>(options.lr),
                            static_cast<float>(options.eps)};
  return for_rows(kernels, call, [&](const Stretch& part, const float* grad) {
    of_states<S>(kernels).adagrad(step, rounding(options.key, part), part.width, grad, at(call.weight, part),
                                  at(call.copy, part), at(options.sum, part));
  });
}

#define MEPROP_INSTANTIATE(S)                                                    \
  template Status sgd_rows(const Kernels&, const SparseRows&, const Sgd<S>&);    \
  template Status adam_rows(const Kernels&, const SparseRows&, const Adam<S>&);  \
  template Status adagrad_rows(const Kernels&, const SparseRows&, const Adagrad<S>&);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)
#undef MEPROP_INSTANTIATE

}  // namespace meprop

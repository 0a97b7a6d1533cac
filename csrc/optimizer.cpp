#include <cmath>

#include "drivers.h"
#include "team.h"

namespace meprop {
namespace {

// Calls apply(row, grad) for each row that moves, with its gradient, or null where it has none.
template <class Apply>
Status for_rows(const SparseRows& call, Apply apply) {
  if (call.threads < 1 || call.count < 0 || !fits<float>(call.rows, call.width, 0)) return Status::kBadSize;
  if (call.count > call.rows || !ascending(call.indices, call.count, call.rows)) return Status::kBadIndex;
  const int64_t moving = call.every_row ? call.rows : call.count;
  run_team(team_size(call.threads, moving * call.width, 0), [&](Team team) {
    const Range part = team.part(moving);
    if (!call.every_row) {
      for (int64_t i = part.begin; i < part.end; ++i) apply(call.indices[i], call.grad + i * call.width);
      return;
    }
    const int64_t* end = call.indices + call.count;
    const int64_t* next = std::lower_bound(call.indices, end, part.begin);
    for (int64_t row = part.begin; row < part.end; ++row) {
      const bool has_gradient = next != end && *next == row;
      apply(row, has_gradient ? call.grad + (next - call.indices) * call.width : nullptr);
      next += has_gradient;
    }
  });
  return Status::kOk;
}

// What a row of [rows, width] begins with; null of null.
template <class T>
T* at(T* matrix, const SparseRows& call, int64_t row) {
  return matrix != nullptr ? matrix + row * call.width : nullptr;
}

}  // namespace

bool ascending(const int64_t* indices, int64_t count, int64_t rows) {
  bool valid = count == 0 || (indices[0] >= 0 && indices[count - 1] < rows);
  for (int64_t i = 1; i < count; ++i) valid &= indices[i - 1] < indices[i];
  return valid;
}

Status sgd_rows(const Kernels& kernels, const SparseRows& call, const Sgd& options) {
  SgdStep of_all;
  of_all.l2 = static_cast<float>(options.weight_decay);
  of_all.lr = static_cast<float>(options.lr);
  of_all.momentum = of_all.keep = static_cast<float>(options.momentum);
  of_all.add = static_cast<float>(1 - options.dampening);
  of_all.nesterov = options.nesterov;
  return for_rows(call, [&](int64_t row, const float* grad) {
    SgdStep step = of_all;
    if (options.keep != nullptr) step.keep = options.keep[row];
    kernels.optimizer.sgd(step, call.width, grad, at(call.weight, call, row), at(options.buffer, call, row));
  });
}

Status adam_rows(const Kernels& kernels, const SparseRows& call, const Adam& options) {
  AdamStep of_all;
  of_all.l2 = options.decoupled ? 0.0f : static_cast<float>(options.weight_decay);
  of_all.shrink = options.decoupled ? static_cast<float>(1 - options.lr * options.weight_decay) : 1.0f;
  of_all.keep_first = static_cast<float>(options.beta1), of_all.first = static_cast<float>(1 - options.beta1);
  of_all.keep_second = static_cast<float>(options.beta2), of_all.second = static_cast<float>(1 - options.beta2);
  of_all.step_size = static_cast<float>(options.lr / (1 - std::pow(options.beta1, options.step)));
  of_all.root_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(options.beta2, options.step)));
  of_all.eps = static_cast<float>(options.eps);
  return for_rows(call, [&](int64_t row, const float* grad) {
    AdamStep step = of_all;
    if (options.keep_first != nullptr) step.keep_first = options.keep_first[row];
    if (options.keep_second != nullptr) step.keep_second = options.keep_second[row];
    if (options.shrink != nullptr) step.shrink = options.shrink[row];
    kernels.optimizer.adam(step, call.width, grad, at(call.weight, call, row), at(options.first, call, row),
                           at(options.second, call, row));
  });
}

Status adagrad_rows(const Kernels& kernels, const SparseRows& call, const Adagrad& options) {
  const AdagradStep step = {static_cast<float>(options.weight_decay), static_cast<float>(options.lr),
                            static_cast<float>(options.eps)};
  return for_rows(call, [&](int64_t row, const float* grad) {
    kernels.optimizer.adagrad(step, call.width, grad, at(call.weight, call, row), at(options.sum, call, row));
  });
}

}  // namespace meprop

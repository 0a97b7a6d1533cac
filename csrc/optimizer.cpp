#include <cmath>

#include "drivers.h"
#include "team.h"

namespace meprop {
namespace {

bool valid(const SparseRows& call) {
  if (call.threads < 1 || call.count < 0 || call.count > call.rows || !fits<float>(call.rows, call.width, 0)) return false;
  return call.row_step == nullptr || call.step >= 1;
}

// Calls apply(step, row, grad) for each row that moves: its gradient, null where it has none, and step_of(missed), where
// `missed` counts the steps that its state has missed. Most rows have missed alike, and powers are dear.
template <class StepOf, class Apply>
Status for_rows(const SparseRows& call, StepOf step_of, Apply apply) {
  if (!valid(call)) return Status::kBadSize;
  if (!ascending(call.indices, call.count, call.rows)) return Status::kBadIndex;
  const int64_t moving = call.every_row ? call.rows : call.count;
  run_team(team_size(call.threads, moving * call.width, 0), [&](Team team) {
    const Range part = team.part(moving);
    double known = 0;
    auto step = step_of(known);
    const auto visit = [&](int64_t row, const float* grad) {
      if (call.row_step != nullptr) {
        const double missed = call.step - 1 - static_cast<double>(call.row_step[row]);
        if (missed != known) step = step_of(known = missed);
        call.row_step[row] = static_cast<float>(call.step);
      }
      apply(step, row, grad);
    };
    if (!call.every_row) {
      for (int64_t i = part.begin; i < part.end; ++i) visit(call.indices[i], call.grad + i * call.width);
      return;
    }
    const int64_t* end = call.indices + call.count;
    const int64_t* next = std::lower_bound(call.indices, end, part.begin);
    for (int64_t row = part.begin; row < part.end; ++row) {
      const bool has_gradient = next != end && *next == row;
      visit(row, has_gradient ? call.grad + (next - call.indices) * call.width : nullptr);
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

bool copy_agrees(const float* weight, const Bf16* bf16_copy, int64_t size, int64_t samples) {
  const int64_t stride = std::max<int64_t>(1, size / samples) | 1;  // odd, so that the samples lie in different columns
  for (int64_t i = 0; i < size; i += stride) {
    const bool nan = weight[i] != weight[i];  // has many forms, and torch's casts give others than ours
    if (nan ? (bf16_copy[i].bits & 0x7fff) <= 0x7f80 : rounded_to_bf16(weight[i]).bits != bf16_copy[i].bits) return false;
  }
  return true;
}

Status sgd_rows(const Kernels& kernels, const SparseRows& call, const Sgd& options) {
  SgdStep up_to_date;
  up_to_date.l2 = static_cast<float>(options.weight_decay);
  up_to_date.lr = static_cast<float>(options.lr);
  up_to_date.momentum = static_cast<float>(options.momentum);
  up_to_date.add = static_cast<float>(1 - options.dampening);
  up_to_date.nesterov = options.nesterov;
  const auto step_of = [&](double missed) {
    SgdStep step = up_to_date;
    step.keep = static_cast<float>(std::pow(options.momentum, missed + 1));
    return step;
  };
  return for_rows(call, step_of, [&](const SgdStep& step, int64_t row, const float* grad) {
    kernels.optimizer.sgd(step, call.width, grad, at(call.weight, call, row), at(options.buffer, call, row),
                          at(call.bf16_copy, call, row));
  });
}

Status adam_rows(const Kernels& kernels, const SparseRows& call, const Adam& options) {
  AdamStep up_to_date;
  up_to_date.l2 = options.decoupled ? 0.0f : static_cast<float>(options.weight_decay);
  up_to_date.first = static_cast<float>(1 - options.beta1);
  up_to_date.second = static_cast<float>(1 - options.beta2);
  up_to_date.step_size = static_cast<float>(options.lr / (1 - std::pow(options.beta1, call.step)));
  up_to_date.root_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(options.beta2, call.step)));
  up_to_date.eps = static_cast<float>(options.eps);
  const double shrink = options.decoupled ? 1 - options.lr * options.weight_decay : 1;
  const auto step_of = [&](double missed) {
    AdamStep step = up_to_date;
    step.keep_first = static_cast<float>(std::pow(options.beta1, missed + 1));
    step.keep_second = static_cast<float>(std::pow(options.beta2, missed + 1));
    step.shrink = static_cast<float>(std::pow(shrink, missed + 1));
    return step;
  };
  return for_rows(call, step_of, [&](const AdamStep& step, int64_t row, const float* grad) {
    kernels.optimizer.adam(step, call.width, grad, at(call.weight, call, row), at(options.first, call, row),
                           at(options.second, call, row), at(call.bf16_copy, call, row));
  });
}

Status adagrad_rows(const Kernels& kernels, const SparseRows& call, const Adagrad& options) {
  const AdagradStep up_to_date = {static_cast<float>(options.weight_decay), static_cast<float>(options.lr),
                             static_cast<float>(options.eps)};
  return for_rows(call, [&](double) { return up_to_date; }, [&](const AdagradStep& step, int64_t row, const float* grad) {
    kernels.optimizer.adagrad(step, call.width, grad, at(call.weight, call, row), at(options.sum, call, row),
                              at(call.bf16_copy, call, row));
  });
}

}  // namespace meprop

// Optimizers' updates of one row of a parameter, for any level. Included inside a level's namespace, after lstm.inl.
//
// Every level rounds alike: no multiply-add is fused here, as torch's own optimizers do not rely on one either.

// Calls update(g, w, place, count), which returns the new w, for each vector of the row. Whole vectors have a constant
// count, so that nothing is asked for each of them.
template <class Update>
inline void update_row(int64_t width, float l2, const float* grad, float* weight, Update update) {
  const F32 decay = broadcast(l2);
  const auto update_some = [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    const F32 w = load_some(weight + at, count);
    F32 g = load_or_zero(grad, at, count);
    if (l2 != 0) g = add(g, multiply(decay, w));
    store_some(weight + at, update(g, w, at, count), count);
  };
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) update_some(at, kLanes);
  if (at < width) update_some(at, width - at);
}

inline void sgd_row(const SgdStep& step, int64_t width, const float* grad, float* weight, float* buffer) {
  const F32 lr = broadcast(step.lr), momentum = broadcast(step.momentum);
  const F32 keep = broadcast(step.keep), fresh = broadcast(step.add);
  update_row(width, step.l2, grad, weight, [=](F32 g, F32 w, int64_t at, int64_t count) __attribute__((always_inline)) {
    if (buffer != nullptr) {
      const F32 sum = add(multiply(keep, load_some(buffer + at, count)), multiply(fresh, g));
      store_some(buffer + at, sum, count);
      g = step.nesterov ? add(g, multiply(momentum, sum)) : sum;
    }
    return subtract(w, multiply(lr, g));
  });
}

inline void adam_row(const AdamStep& step, int64_t width, const float* grad, float* weight, float* first, float* second) {
  const F32 shrink = broadcast(step.shrink), size = broadcast(step.step_size);
  const F32 keep_first = broadcast(step.keep_first), new_first = broadcast(step.first);
  const F32 keep_second = broadcast(step.keep_second), new_second = broadcast(step.second);
  const F32 root_scale = broadcast(step.root_scale), eps = broadcast(step.eps);
  update_row(width, step.l2, grad, weight, [=](F32 g, F32 w, int64_t at, int64_t count) __attribute__((always_inline)) {
    const F32 mean = add(multiply(keep_first, load_some(first + at, count)), multiply(new_first, g));
    const F32 square = add(multiply(keep_second, load_some(second + at, count)), multiply(multiply(new_second, g), g));
    store_some(first + at, mean, count);
    store_some(second + at, square, count);
    const F32 root = add(multiply(root_scale, square_root(square)), eps);
    return subtract(multiply(shrink, w), multiply(size, divide(mean, root)));
  });
}

inline void adagrad_row(const AdagradStep& step, int64_t width, const float* grad, float* weight, float* sum) {
  const F32 lr = broadcast(step.lr), eps = broadcast(step.eps);
  update_row(width, step.l2, grad, weight, [=](F32 g, F32 w, int64_t at, int64_t count) __attribute__((always_inline)) {
    const F32 squares = add(load_some(sum + at, count), multiply(g, g));
    store_some(sum + at, squares, count);
    return subtract(w, multiply(lr, divide(g, add(square_root(squares), eps))));
  });
}

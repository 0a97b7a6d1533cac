// Kernels of convolutions of which some maps of the output gradient are kept. Included inside a level's namespace,
// after products.inl.

// Panels of so many lines have their sums in registers. What a panel leaves is computed in narrower ones.
constexpr int kMapLines = 8;

template <class T>
double sum_squares(const T* from, int64_t size) {
  constexpr int kParts = 16;  // sums side by side, in an order that is the same at every level
  double parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= size; i += kParts)
    for (int p = 0; p < kParts; ++p) {
      const double value = static_cast<double>(to_float(from[i + p]));
      parts[p] += value * value;
    }
  for (int p = 0; i < size; ++i, ++p) {
    const double value = static_cast<double>(to_float(from[i]));
    parts[p] += value * value;
  }
  double sum = 0;
  for (int p = 0; p < kParts; ++p) sum += parts[p];
  return sum;
}

template <class T>
void add_scaled(const T* from, float factor, int64_t size, double* sums) {
  const double by = static_cast<double>(factor);
  for (int64_t i = 0; i < size; ++i) sums[i] += by * static_cast<double>(to_float(from[i]));
}

template <int Lines>
inline void gather_patches_of(const float* source, const int32_t* places, const float* coefficients, int64_t count,
                              float* sums) {
  Line<float> lines[Lines];
  for (int i = 0; i < Lines; ++i) lines[i].begin_with(sums + i * kLanes);
  for (int64_t t = 0; t < count; ++t) {
    const F32 coefficient = broadcast(coefficients[t]);
    const float* from = source + places[t];
    for (int i = 0; i < Lines; ++i) lines[i].add_product(coefficient, Line<float>::load(from + i * kLanes));
  }
  for (int i = 0; i < Lines; ++i) lines[i].store(sums + i * kLanes);
}

inline void gather_patches(const float* source, const int32_t* places, const float* coefficients, int64_t count,
                           int64_t width, float* sums) {
  int64_t j = 0;
  for (; j + kMapLines * kLanes <= width; j += kMapLines * kLanes)
    gather_patches_of<kMapLines>(source + j, places, coefficients, count, sums + j);
  for (; j + 4 * kLanes <= width; j += 4 * kLanes)
    gather_patches_of<4>(source + j, places, coefficients, count, sums + j);
  for (; j + kLanes < width; j += 2 * kLanes) gather_patches_of<2>(source + j, places, coefficients, count, sums + j);
  if (j < width) gather_patches_of<1>(source + j, places, coefficients, count, sums + j);
}

// The sums of one place, from `out` on, with its terms from `begin` to `end`.
template <int Lines>
inline void add_patch(const float* source, int64_t source_ld, const Patches& all, int32_t begin, int32_t end,
                      float* out) {
  Line<float> lines[Lines];
  for (int i = 0; i < Lines; ++i) lines[i].begin_with(out + i * kLanes);
  for (int32_t t = begin; t < end; ++t) {
    const F32 coefficient = broadcast(all.coefficients[t]);
    const float* from = source + all.rows[t] * source_ld;
    for (int i = 0; i < Lines; ++i) lines[i].add_product(coefficient, Line<float>::load(from + i * kLanes));
  }
  for (int i = 0; i < Lines; ++i) lines[i].store(out + i * kLanes);
}

inline void add_patches(const float* source, int64_t source_ld, const Patches& all, int64_t width, float* out) {
  for (int64_t place = 0; place < all.count; ++place) {
    const int32_t begin = all.starts[place], end = all.starts[place + 1];
    float* to = out + all.places[place];
    int64_t j = 0;
    for (; j + kMapLines * kLanes <= width; j += kMapLines * kLanes)
      add_patch<kMapLines>(source + j, source_ld, all, begin, end, to + j);
    for (; j + 4 * kLanes <= width; j += 4 * kLanes) add_patch<4>(source + j, source_ld, all, begin, end, to + j);
    for (; j + kLanes <= width; j += kLanes) add_patch<1>(source + j, source_ld, all, begin, end, to + j);
    for (; j < width; ++j) {  // beyond them lies another place, which infinity times zero would spoil
      float sum = to[j];
      for (int32_t t = begin; t < end; ++t) sum += all.coefficients[t] * source[all.rows[t] * source_ld + j];
      to[j] = sum;
    }
  }
}

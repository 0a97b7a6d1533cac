// Products with a selection, for any level. Included inside a level's namespace, after its vector type.
//
// Every product has the form out[r] = sum over terms of coefficient * source[row]: the input gradient gathers rows of
// the weight, the weight gradient gathers rows of the input. A kernel computes one panel of columns, kPanelLines lines
// wide, whose sums stay in registers. Rows of a large matrix lie a page or more apart, where they collide in the caches
// and in the address translation; the drivers therefore copy a large source, some panels at a time, into adjacent rows
// first (pack). Sums run in the order of the terms, in float32, whoever computes them: the result does not depend on
// the number of threads. `S` is the type of the source, `T` that of the coefficients and of the results.

// To the nearest bfloat16, ties to even, in the upper half of each word. A NaN stays one.
inline U32 rounded_to_bf16(F32 a) {
  const U32 bits = as_bits(a);
  const U32 half = plus(splat(0x7fffu), both(down_16(bits), splat(1)));
  return where_nan(a, splat(0x7fc00000u), plus(bits, half));
}

// A line of T: one vector of words. Lines of bfloat16 hold two entries a word, summed apart as floats.
template <class T>
struct Line;

template <>
struct Line<float> {
  static constexpr int kEntries = kLanes;
  static constexpr int kSums = 1;
  struct Entries {
    F32 all;
  };
  static Entries load(const float* from) { return {as_float(load_words(from))}; }

  // The entries of one of the sums alone.
  static F32 load_part(const float* from, int) { return load(from).all; }

  F32 sums[kSums] = {zero()};
  void begin_with(const float* from) { sums[0] = as_float(load_words(from)); }
  void scale(F32 factor) { sums[0] = multiply(factor, sums[0]); }
  void add_product(F32 coefficient, Entries from) { sums[0] = multiply_add(coefficient, from.all, sums[0]); }
  void store(float* to) const { store_words(to, as_bits(sums[0])); }
};

template <>
struct Line<Bf16> {
  static constexpr int kEntries = 2 * kLanes;
  static constexpr int kSums = 2;
  struct Entries {
    F32 even, odd;
  };
  static Entries load(const Bf16* from) {
    const U32 words = load_words(from);
    return {as_float(up_16(words)), as_float(both(words, splat(0xffff0000u)))};
  }

  static F32 load_part(const Bf16* from, int part) {
    return as_float(part == 0 ? up_16(load_words(from)) : load_upper_halves(from));
  }

  F32 sums[kSums] = {zero(), zero()};  // of the even and of the odd entries
  void begin_with(const float* from) {
    float of_even[kLanes], of_odd[kLanes];
    for (int i = 0; i < kLanes; ++i) of_even[i] = from[2 * i], of_odd[i] = from[2 * i + 1];
    sums[0] = as_float(load_words(of_even)), sums[1] = as_float(load_words(of_odd));
  }
  void scale(F32 factor) { sums[0] = multiply(factor, sums[0]), sums[1] = multiply(factor, sums[1]); }
  void add_product(F32 coefficient, Entries from) {
    sums[0] = multiply_add(coefficient, from.even, sums[0]);
    sums[1] = multiply_add(coefficient, from.odd, sums[1]);
  }
  void store(float* to) const {
    store_words(to, as_bits(first_pairs(sums[0], sums[1])));
    store_words(to + kLanes, as_bits(last_pairs(sums[0], sums[1])));
  }
  void store(Bf16* to) const {
    const U32 even = down_16(rounded_to_bf16(sums[0])), odd = both(rounded_to_bf16(sums[1]), splat(0xffff0000u));
    store_words(to, either(even, odd));
  }
};

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

// The lines of the source in a panel: as many columns as kPanelLines lines of results have.
template <class S, class T>
constexpr int kSourceLines = kPanelLines * Line<T>::kEntries / Line<S>::kEntries;

// The widest panel has as many lines as registers hold sums, but no more than 8: what is gained then is little.
template <class S>
constexpr int kGatherLines = kSumRegisters / Line<S>::kSums < 8 ? kSumRegisters / Line<S>::kSums : 8;

// The sums of one output row within a panel of so many lines.
template <class S, int Lines>
struct PanelSums {
  static constexpr int kWidth = Lines * Line<S>::kEntries;
  Line<S> lines[Lines];

  void begin_with(const float* sums, int64_t width) {
    float whole[kWidth] = {};
    __builtin_memcpy(whole, sums, static_cast<size_t>(width) * sizeof(float));
    for (int i = 0; i < Lines; ++i) lines[i].begin_with(whole + i * Line<S>::kEntries);
  }

  void scale(float by) {
    const F32 factor = broadcast(by);
    for (int i = 0; i < Lines; ++i) lines[i].scale(factor);
  }

  void add_product(float coefficient, const S* source) {
    const F32 factor = broadcast(coefficient);
    for (int i = 0; i < Lines; ++i) lines[i].add_product(factor, Line<S>::load(source + i * Line<S>::kEntries));
  }

  template <class T>
  void store(T* to, int64_t width) const {
    if (width == kWidth) {
      for (int i = 0; i < Lines; ++i) lines[i].store(to + i * Line<S>::kEntries);
      return;
    }
    T whole[kWidth];
    for (int i = 0; i < Lines; ++i) lines[i].store(whole + i * Line<S>::kEntries);
    __builtin_memcpy(to, whole, static_cast<size_t>(width) * sizeof(T));
  }
};

template <class T>
void pack(const T* source, int64_t source_ld, const int32_t* rows, int64_t count, int64_t width, T* packed,
          int64_t packed_ld) {
  constexpr int kAhead = 8;  // rows; the hardware does not prefetch across pages
  constexpr int64_t kCacheLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i, packed += packed_ld) {
    const T* from = source + (rows != nullptr ? rows[i] : i) * source_ld;
    if (i + kAhead < count) {
      const T* next = source + (rows != nullptr ? rows[i + kAhead] : i + kAhead) * source_ld;
      for (int64_t j = 0; j < width; j += kCacheLine) __builtin_prefetch(next + j);
    }
    int64_t j = 0;
    for (; j + Line<T>::kEntries <= width; j += Line<T>::kEntries) store_words(packed + j, load_words(from + j));
    __builtin_memcpy(packed + j, from + j, static_cast<size_t>(width - j) * sizeof(T));
    __builtin_memset(packed + width, 0, static_cast<size_t>(packed_ld - width) * sizeof(T));
  }
}

// Transposes as many rows of a matrix as a line has entries, and as many columns.
inline void transpose_square(const float* from, int64_t from_ld, float* to, int64_t to_ld) {
  U32 rows[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load_words(from + i * from_ld);
  transpose(rows);
  for (int i = 0; i < kLanes; ++i) store_words(to + i * to_ld, rows[i]);
}
// A word has two entries of a row. They go to two rows, in which each is half of a word.
inline void transpose_square(const Bf16* from, int64_t from_ld, Bf16* to, int64_t to_ld) {
  U32 even[kLanes], odd[kLanes];  // rows
  for (int i = 0; i < kLanes; ++i) {
    even[i] = load_words(from + 2 * i * from_ld);
    odd[i] = load_words(from + (2 * i + 1) * from_ld);
  }
  transpose(even);
  transpose(odd);
  for (int i = 0; i < kLanes; ++i) {
    store_words(to + 2 * i * to_ld, either(both(even[i], splat(0xffffu)), up_16(odd[i])));
    store_words(to + (2 * i + 1) * to_ld, either(down_16(even[i]), both(odd[i], splat(0xffff0000u))));
  }
}

template <class T>
void pack_transposed(const T* source, int64_t source_ld, int64_t count, int64_t width, T* packed, int64_t packed_ld) {
  constexpr int64_t kSide = Line<T>::kEntries;
  constexpr int64_t kAhead = 256 / sizeof(T);  // entries; the hardware does not follow so many rows, or across pages
  for (int64_t column = 0; column < packed_ld; column += kSide) {
    const T* from = source + column * source_ld;
    int64_t i = 0;
    if (column + kSide <= width)
      for (; i + kSide <= count; i += kSide) {
        for (int64_t c = 0; c < kSide && i + kAhead < count; ++c) __builtin_prefetch(from + c * source_ld + i + kAhead);
        transpose_square(from + i, source_ld, packed + i * packed_ld + column, packed_ld);
      }
    for (; i < count; ++i)
      for (int64_t c = 0; c < kSide; ++c)
        packed[i * packed_ld + column + c] = column + c < width ? from[c * source_ld + i] : T{};
  }
}

template <class T>
inline int64_t first_term(const Terms<T>& terms, int64_t row) {
  return terms.starts != nullptr ? terms.starts[row] : row * terms.per_row;
}

// What the sums of an output row begin with, where there is a base or none.
template <class S, class T, int Lines, bool HasBase>
struct FirstSums {
  FirstSums(Base<T>, int64_t) {}
  PanelSums<S, Lines> of_row(int64_t) const { return {}; }
};

template <class S, class T, int Lines>
struct FirstSums<S, T, Lines, true> {
  PanelSums<S, Lines> unscaled;
  const T* factors;

  FirstSums(Base<T> base, int64_t width) : factors(base.factors) { unscaled.begin_with(base.row, width); }
  PanelSums<S, Lines> of_row(int64_t row) const {
    PanelSums<S, Lines> sums = unscaled;
    if (factors != nullptr) sums.scale(to_float(factors[row]));
    return sums;
  }
};

template <class S, class T, int Lines, bool HasBase>
inline void gather_lines(const S* source, int64_t source_ld, const Terms<T>& terms, Base<T> base, int64_t row_begin,
                         int64_t row_end, int64_t width, T* out, int64_t out_ld) {
  const FirstSums<S, T, Lines, HasBase> first(base, width);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t end = first_term(terms, row + 1);
    PanelSums<S, Lines> sums = first.of_row(row);
    for (int64_t i = first_term(terms, row); i < end; ++i)
      sums.add_product(to_float(terms.coefficients[i]), source + terms.rows[i] * source_ld);
    sums.store(out + row * out_ld, width);
  }
}

// The gather_lines for this width: of half a panel, or of as few panels as it takes.
template <class S, class T, bool HasBase, int Panels = 1>
inline auto gather_of(int64_t width) {
  constexpr int kPanels = Panels * kSourceLines<S, T>, kLines = kPanels < kGatherLines<S> ? kPanels : kGatherLines<S>;
  if constexpr (Panels == 1 && kLines % 2 == 0)
    if (width <= kLines / 2 * Line<S>::kEntries) return gather_lines<S, T, kLines / 2, HasBase>;
  if constexpr (kLines < kGatherLines<S>)
    if (width > kLines * Line<S>::kEntries) return gather_of<S, T, HasBase, Panels + 1>(width);
  return gather_lines<S, T, kLines, HasBase>;
}

template <class S, class T>
void gather_product(const S* source, int64_t source_ld, const Terms<T>& terms, Base<T> base, int64_t row_begin,
                    int64_t row_end, int64_t width, T* out, int64_t out_ld) {
  const auto gather = base.row != nullptr ? gather_of<S, T, true>(width) : gather_of<S, T, false>(width);
  gather(source, source_ld, terms, base, row_begin, row_end, width, out, out_ld);
}

// `Rows` output rows at once, so that each line of the panel is loaded once for all of them.
template <class S, class T, int Rows, bool HasBase>
inline void dense_rows(const S* source, int64_t source_ld, int64_t depth, const T* coefficients, int64_t row_stride,
                       int64_t depth_stride, Base<T> base, int64_t width, T* out, int64_t out_ld) {
  PanelSums<S, kSourceLines<S, T>> sums[Rows];
  if constexpr (HasBase) {
    const FirstSums<S, T, kSourceLines<S, T>, true> first(base, width);
    for (int r = 0; r < Rows; ++r) sums[r] = first.of_row(r);
  }
  for (int64_t d = 0; d < depth; ++d, source += source_ld, coefficients += depth_stride) {
    F32 factors[Rows];
    for (int r = 0; r < Rows; ++r) factors[r] = broadcast(to_float(coefficients[r * row_stride]));
    for (int i = 0; i < kSourceLines<S, T>; ++i)
      for (int part = 0; part < Line<S>::kSums; ++part) {
        // Not read from memory for each row.
        const F32 entries = in_register(Line<S>::load_part(source + i * Line<S>::kEntries, part));
        for (int r = 0; r < Rows; ++r) {
          F32& sum = sums[r].lines[i].sums[part];
          sum = multiply_add(factors[r], entries, sum);
        }
      }
  }
  for (int r = 0; r < Rows; ++r) sums[r].store(out + r * out_ld, width);
}

template <class S, class T, int Rows, bool HasBase>
inline void dense_rest(int64_t rows, const S* source, int64_t source_ld, int64_t depth, const T* coefficients,
                       int64_t row_stride, int64_t depth_stride, Base<T> base, int64_t width, T* out, int64_t out_ld) {
  if (rows == Rows)
    dense_rows<S, T, Rows, HasBase>(source, source_ld, depth, coefficients, row_stride, depth_stride, base, width, out,
                                    out_ld);
  else if constexpr (Rows > 1)
    dense_rest<S, T, Rows - 1, HasBase>(rows, source, source_ld, depth, coefficients, row_stride, depth_stride, base,
                                        width, out, out_ld);
}

template <class S, class T, bool HasBase>
inline void dense_blocks(const S* source, int64_t source_ld, int64_t depth, const T* coefficients, int64_t row_stride,
                         int64_t depth_stride, Base<T> base, int64_t row_begin, int64_t row_end, int64_t width, T* out,
                         int64_t out_ld) {
  // Blocks of nearly equal numbers of rows: a last one of one or two would wait for the panel's lines.
  constexpr int kRows = kSumRegisters / (kSourceLines<S, T> * Line<S>::kSums);
  for (int64_t row = row_begin, blocks = (row_end - row_begin + kRows - 1) / kRows; blocks > 0; --blocks) {
    const int64_t rows = (row_end - row + blocks - 1) / blocks;
    const Base<T> of_rows = {base.row, base.factors != nullptr ? base.factors + row : nullptr};
    dense_rest<S, T, kRows, HasBase>(rows, source, source_ld, depth, coefficients + row * row_stride, row_stride,
                                     depth_stride, of_rows, width, out + row * out_ld, out_ld);
    row += rows;
  }
}

template <class S, class T>
void dense_product(const S* source, int64_t source_ld, int64_t depth, const T* coefficients, int64_t row_stride,
                   int64_t depth_stride, Base<T> base, int64_t row_begin, int64_t row_end, int64_t width, T* out,
                   int64_t out_ld) {
  const auto multiply = base.row != nullptr ? dense_blocks<S, T, true> : dense_blocks<S, T, false>;
  multiply(source, source_ld, depth, coefficients, row_stride, depth_stride, base, row_begin, row_end, width, out, out_ld);
}

// Adds rows to `sums` [columns], one after the other, each of whose entries counts as value(its row, itself). Several rows
// at a time, which are added in the same order, so that a sum is read and written once for all of them.
template <class T, class Value>
inline void add_rows(const T* source, int64_t source_ld, int64_t rows, int64_t columns, double* sums, Value value) {
  constexpr int64_t kBlock = 512;  // columns whose sums stay in L1
  constexpr int kRows = 4;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    int64_t n = 0;
    for (; n + kRows <= rows; n += kRows)
      for (int64_t c = begin; c < end; ++c) {
        double sum = sums[c];
        for (int i = 0; i < kRows; ++i) sum += value(n + i, static_cast<double>(to_float(source[(n + i) * source_ld + c])));
        sums[c] = sum;
      }
    for (; n < rows; ++n)
      for (int64_t c = begin; c < end; ++c) sums[c] += value(n, static_cast<double>(to_float(source[n * source_ld + c])));
  }
}

template <class T>
void add_columns(const T* grad, int64_t grad_ld, int64_t rows, int64_t columns, double* sums, double* magnitudes) {
  if (sums != nullptr) add_rows(grad, grad_ld, rows, columns, sums, [](int64_t, double entry) { return entry; });
  if (magnitudes != nullptr)
    add_rows(grad, grad_ld, rows, columns, magnitudes, [](int64_t, double entry) { return __builtin_fabs(entry); });
}

template <class T>
void add_scaled_rows(const T* source, int64_t source_ld, const T* factors, int64_t rows, int64_t columns, double* sums) {
  add_rows(source, source_ld, rows, columns, sums,
           [=](int64_t row, double entry) { return static_cast<double>(to_float(factors[row])) * entry; });
}

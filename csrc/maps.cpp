#include <cmath>

#include "drivers.h"
#include "selected.h"
#include "team.h"

namespace meprop {
namespace {

// Padded images that several threads share are made together, so many floats at once.
constexpr int64_t kChunk = 3 << 18;  // within kLargestKept

bool product(std::initializer_list<int64_t> factors, int64_t* result) {
  *result = 1;
  for (const int64_t factor : factors)
    if (factor < 0 || __builtin_mul_overflow(*result, factor, result)) return false;
  return true;
}

// How a convolution looks in memory where images are padded and lie as [*S, I].
struct Layout {
  int64_t positions, pixels, inputs;  // of an output map, of an input map, and input channels
  int64_t pad_row, image;             // floats of a padded row and image
  int64_t runs, width, ld, patch;     // the adjacent rows of a patch, their floats, the same padded, and all of them

  explicit Layout(const Convolution& of)
      : positions(of.output[0] * of.output[1]),
        pixels(of.size[0] * of.size[1]),
        inputs(of.inputs),
        pad_row((of.size[1] + 2 * of.padding[1]) * of.inputs),
        image((of.size[0] + 2 * of.padding[0]) * pad_row),
        runs(of.kernel[0] * (of.dilation[1] == 1 ? 1 : of.kernel[1])),
        width((of.dilation[1] == 1 ? of.kernel[1] : 1) * of.inputs),
        ld((width + kPatchPad - 1) / kPatchPad * kPatchPad),
        patch(runs * ld) {}

  // Where row `run` of a patch begins, behind the patch's place.
  int64_t run_offset(const Convolution& of, int64_t run) const {
    const int64_t across = runs / of.kernel[0];
    return run / across * of.dilation[0] * pad_row + run % across * of.dilation[1] * inputs;
  }
};

bool valid(const Convolution& of) {
  for (int d = 0; d < 2; ++d) {
    if (of.size[d] < 0 || of.output[d] < 0 || of.kernel[d] < 1) return false;
    if (of.stride[d] < 1 || of.padding[d] < 0 || of.dilation[d] < 1) return false;
    if (std::max({of.size[d], of.output[d], of.kernel[d], of.stride[d], of.padding[d], of.dilation[d]}) > INT32_MAX)
      return false;  // so that no product of two overflows
    const int64_t last = (of.output[d] - 1) * of.stride[d] + (of.kernel[d] - 1) * of.dilation[d];
    if (of.output[d] > 0 && last >= of.size[d] + 2 * of.padding[d]) return false;
  }
  const int64_t height = of.size[0] + 2 * of.padding[0], width = of.size[1] + 2 * of.padding[1];
  int64_t image, patches, maps, outputs, inputs;
  return of.outputs <= INT32_MAX && product({of.inputs, height, width}, &image) && image < INT32_MAX &&
         product({of.outputs, of.kernel[0], of.kernel[1], of.inputs + kPatchPad, 4}, &patches) &&
         product({of.images, of.outputs, 8}, &maps) && product({maps, of.output[0], of.output[1]}, &outputs) &&
         product({of.images, image, 8}, &inputs) && of.outputs * of.output[0] * of.output[1] < INT32_MAX;
}

// Whether the starts and channels are what they must be: those of each image ascend, within the outputs.
template <class T>
bool valid_maps(const MapsBackward<T>& call) {
  const int64_t images = call.of.images;
  bool valid = call.starts[0] == 0 && call.starts[images] == call.maps;
  for (int64_t n = 0; n < images; ++n) valid &= call.starts[n] <= call.starts[n + 1];
  if (!valid) return false;
  for (int64_t n = 0; n < images; ++n) {
    const int64_t begin = call.starts[n], end = call.starts[n + 1];
    if (begin == end) continue;
    valid &= call.channels[begin] >= 0 && call.channels[end - 1] < call.of.outputs;
    for (int64_t e = begin + 1; e < end; ++e) valid &= call.channels[e - 1] < call.channels[e];
  }
  return valid;
}

inline float narrowed(float value, float*) { return value; }
inline Bf16 narrowed(float value, Bf16*) { return rounded_to_bf16(value); }

// Images of which some maps are kept.
template <class T>
struct Images {
  const T* grad;  // [N, O, *T]
  const int64_t* starts;
  const int32_t* channels;
  const float* factors;
  const T* x;
  T* grad_input;
};

// What one thread has for itself: the entries of a map or of an image that are not zero, and a padded image.
struct Own {
  float* coefficients;
  int32_t* rows;
  int32_t* places;
  int32_t* starts;
  float* padded;
};

template <class T>
class MapsPass {
 public:
  MapsPass(const Kernels& kernels, const MapsBackward<T>& call, int threads)
      : typed_(typed<T>(kernels)),
        maps_(kernels.maps),
        call_(call),
        of_(call.of),
        at_(call.of),
        most_(std::min(most_maps(call) * at_.positions, at_.positions * of_.outputs)),
        chunk_(threads == 1 ? 1 : std::max<int64_t>(1, std::min(of_.images, kChunk / std::max<int64_t>(1, at_.image)))),
        places_(kOffsets, at_.positions),
        weight_(kPacked, call.grad_input != nullptr ? of_.outputs * at_.patch : 0),
        sums_(kSums, call.grad_weight != nullptr ? of_.outputs * at_.patch : 0),
        inputs_(kPackedInputs, call.grad_weight != nullptr ? chunk_ * at_.image + kPatchPad : 0),
        padded_(kPadded, call.grad_input != nullptr ? threads * at_.image : 0),
        coefficients_(kValues, threads * (most_ + 1)),
        rows_(kIndices, threads * (most_ + 1)),
        own_places_(kPlaces, threads * (at_.positions + 2)),
        own_starts_(kStarts, threads * (at_.positions + 2)),
        shares_(kFactors, call.exact_sum ? of_.images * of_.outputs : 0),
        column_sums_(kSharedSums, call.exact_sum ? of_.inputs * at_.pixels + threads * at_.positions : 0),
        left_out_(kLeftOut, call.exact_sum ? of_.outputs * at_.positions : 0),
        sum_x_(kSourceValues, call.exact_sum ? of_.inputs * at_.pixels : 0),
        base_(kBases, call.exact_sum ? of_.inputs * at_.pixels : 0),
        all_channels_(kAllChannels, call.exact_sum ? of_.outputs : 0),
        ones_(kMagnitudes, call.exact_sum ? of_.outputs : 0) {}

  explicit operator bool() const {
    return places_ && weight_ && sums_ && inputs_ && padded_ && coefficients_ && rows_ && own_places_ && own_starts_ &&
           shares_ && column_sums_ && left_out_ && sum_x_ && base_ && all_channels_ && ones_;
  }

  void run(Team team) {
    const int64_t terms = team.id * (most_ + 1), places = team.id * (at_.positions + 2);
    const Own own = {coefficients_.get() + terms, rows_.get() + terms, own_places_.get() + places,
                     own_starts_.get() + places, padded_.get() + team.id * at_.image};
    prepare(team);
    const Images<T> images = {call_.grad, call_.starts, call_.channels, call_.factors, call_.x, call_.grad_input};
    if (call_.exact_sum) {
      team.wait();
      sum_left_out(team);
      team.wait();
      const int64_t all[2] = {0, of_.outputs};
      const Images<float> shared = {left_out_.get(), all, all_channels_.get(), ones_.get(), sum_x_.get(), base_.get()};
      if (call_.grad_weight != nullptr) add_weights(team, shared, 1, own);
      if (call_.grad_input != nullptr && team.id == 0) write_input(shared, 0, nullptr, own);
    }
    team.wait();
    if (call_.grad_input != nullptr) {
      const float* base = call_.exact_sum ? base_.get() : nullptr;
      const Range part = team.part(of_.images);
      for (int64_t n = part.begin; n < part.end; ++n) write_input(images, n, base, own);
    }
    if (call_.grad_weight == nullptr) return;
    add_weights(team, images, of_.images, own);
    write_weight(team);
  }

 private:
  // The largest number of maps of an image.
  static int64_t most_maps(const MapsBackward<T>& call) {
    if (call.exact_sum) return call.of.outputs;
    int64_t most = 1;
    for (int64_t n = 0; n < call.of.images; ++n) most = std::max(most, call.starts[n + 1] - call.starts[n]);
    return most;
  }

  void prepare(Team team) {
    if (team.id == 0) {
      int32_t* to = places_.get();
      for (int64_t y = 0; y < of_.output[0]; ++y)
        for (int64_t x = 0; x < of_.output[1]; ++x)
          *to++ = static_cast<int32_t>(y * of_.stride[0] * at_.pad_row + x * of_.stride[1] * at_.inputs);
      if (call_.grad_weight != nullptr) std::fill_n(inputs_.get(), chunk_ * at_.image + kPatchPad, 0.0f);
    }
    const Range part = team.part(of_.outputs);
    if (call_.grad_weight != nullptr) std::fill_n(sums_.get() + part.begin * at_.patch, part.size() * at_.patch, 0.0f);
    if (call_.grad_input == nullptr) return;
    std::fill_n(weight_.get() + part.begin * at_.patch, part.size() * at_.patch, 0.0f);
    for_weights(part, [&](int64_t at, int64_t place) { weight_.get()[place] = widened(call_.weight[at]); });
  }

  // Calls apply(place in the weight, place in patches) for each weight of some output channels.
  template <class Apply>
  void for_weights(Range outputs, Apply apply) const {
    const int64_t taps = of_.kernel[0] * of_.kernel[1], across = at_.width / std::max<int64_t>(1, at_.inputs);
    for (int64_t o = outputs.begin; o < outputs.end; ++o)
      for (int64_t i = 0; i < at_.inputs; ++i)
        for (int64_t tap = 0; tap < taps; ++tap)
          apply((o * at_.inputs + i) * taps + tap,
                o * at_.patch + tap / across * at_.ld + tap % across * at_.inputs + i);
  }

  // The mean of what is left out, each thread some channels, and the sum of all inputs, each thread some columns.
  void sum_left_out(Team team) {
    const Range part = team.part(of_.outputs);
    for (int64_t n = 0; n < of_.images; ++n) {
      float* shares = shares_.get() + n * of_.outputs;
      std::fill_n(shares + part.begin, part.size(), 1.0f);
      for (int64_t e = call_.starts[n]; e < call_.starts[n + 1]; ++e)
        if (const int32_t o = call_.channels[e]; o >= part.begin && o < part.end) shares[o] = 1 - call_.factors[e];
    }
    const double images = static_cast<double>(std::max<int64_t>(1, of_.images));
    double* sums = column_sums_.get() + of_.inputs * at_.pixels + team.id * at_.positions;
    for (int64_t o = part.begin; o < part.end; ++o) {
      std::fill_n(sums, at_.positions, 0.0);
      for (int64_t n = 0; n < of_.images; ++n)
        if (const float share = shares_.get()[n * of_.outputs + o]; share != 0)
          typed_.add_scaled(call_.grad + (n * of_.outputs + o) * at_.positions, share, at_.positions, sums);
      for (int64_t t = 0; t < at_.positions; ++t)
        left_out_.get()[o * at_.positions + t] = static_cast<float>(sums[t] / images);
      all_channels_.get()[o] = static_cast<int32_t>(o), ones_.get()[o] = 1;
    }
    if (call_.grad_weight == nullptr) return;
    const int64_t columns = of_.inputs * at_.pixels;
    const Range own = team.part(columns, 64);
    if (own.size() <= 0) return;
    std::fill_n(column_sums_.get() + own.begin, own.size(), 0.0);
    typed_.add_columns(call_.x + own.begin, columns, of_.images, own.size(), column_sums_.get() + own.begin, nullptr);
    for (int64_t c = own.begin; c < own.end; ++c) sum_x_.get()[c] = static_cast<float>(column_sums_.get()[c]);
  }

  template <class S>
  const S* map(const Images<S>& images, int64_t n, int64_t e) const {
    return images.grad + (n * of_.outputs + images.channels[e]) * at_.positions;
  }

  // ---- the input's gradient

  template <class S>
  void write_input(const Images<S>& images, int64_t n, const float* base, const Own& own) const {
    const int64_t size = at_.inputs * at_.pixels;
    S* to = images.grad_input + n * size;
    if (images.starts[n] == images.starts[n + 1]) {
      for (int64_t c = 0; c < size; ++c) to[c] = narrowed(base != nullptr ? base[c] : 0.0f, to);
      return;
    }
    const Patches patches = list_terms(images, n, own);
    std::fill_n(own.padded, at_.image, 0.0f);
    for (int64_t run = 0; run < at_.runs; ++run)
      maps_.add_patches(weight_.get() + run * at_.ld, at_.patch, patches, at_.width,
                        own.padded + at_.run_offset(of_, run));
    if (base == nullptr)
      for_pixels([&](int64_t place, int64_t at) { to[at] = narrowed(own.padded[place], to); });
    else
      for_pixels([&](int64_t place, int64_t at) { to[at] = narrowed(base[at] + own.padded[place], to); });
  }

  // The entries of an image's maps that are not zero, place by place.
  template <class S>
  Patches list_terms(const Images<S>& images, int64_t n, const Own& own) const {
    int32_t count = 0;
    int64_t places = 0;
    own.starts[0] = 0;
    for (int64_t t = 0; t < at_.positions; ++t) {
      for (int64_t e = images.starts[n]; e < images.starts[n + 1]; ++e) {
        const float value = widened(map(images, n, e)[t]);
        own.coefficients[count] = images.factors[e] * value;
        own.rows[count] = images.channels[e];
        count += !(value == 0);
      }
      own.places[places] = places_.get()[t];
      places += count > own.starts[places];
      own.starts[places] = count;
    }
    return {places, own.places, own.starts, own.rows, own.coefficients};
  }

  // Calls apply(place in a padded image, place in an image) for each input.
  template <class Apply>
  void for_pixels(Apply apply) const {
    constexpr int64_t kBlock = 16;  // channels, so that as many lines are open at once
    const int64_t step = call_.channels_last ? 1 : at_.pixels, next = call_.channels_last ? at_.inputs : 1;
    for (int64_t first = 0; first < at_.inputs; first += kBlock) {
      const int64_t end = std::min(at_.inputs, first + kBlock);
      for (int64_t y = 0; y < of_.size[0]; ++y)
        for (int64_t x = 0; x < of_.size[1]; ++x) {
          const int64_t place = (y + of_.padding[0]) * at_.pad_row + (x + of_.padding[1]) * at_.inputs;
          const int64_t at = (y * of_.size[1] + x) * next;
          for (int64_t i = first; i < end; ++i) apply(place + i, at + i * step);
        }
    }
  }

  // ---- the weight's gradient

  // Adds the patches of the maps of `count` images. Each thread has some output channels.
  template <class S>
  void add_weights(Team team, const Images<S>& images, int64_t count, const Own& own) const {
    const Range outputs = team.part(of_.outputs);
    for (int64_t begin = 0; begin < count; begin += chunk_) {
      const int64_t end = std::min(count, begin + chunk_);
      for (int64_t n = begin + team.id; n < end; n += team.size)
        if (images.starts[n] < images.starts[n + 1]) {
          const S* from = images.x + n * at_.inputs * at_.pixels;
          float* to = inputs_.get() + (n - begin) * at_.image;
          for_pixels([&](int64_t place, int64_t at) { to[place] = widened(from[at]); });
        }
      team.wait();
      for (int64_t n = begin; n < end; ++n)
        for (int64_t e = images.starts[n]; e < images.starts[n + 1]; ++e) {
          const int64_t o = images.channels[e];
          if (o < outputs.begin || o >= outputs.end) continue;
          add_weight(images, n, e, inputs_.get() + (n - begin) * at_.image, own);
        }
      if (end < count) team.wait();  // whoever comes next waits otherwise
    }
  }

  template <class S>
  void add_weight(const Images<S>& images, int64_t n, int64_t e, const float* padded, const Own& own) const {
    const S* from = map(images, n, e);
    const float factor = images.factors[e];
    float* sums = sums_.get() + images.channels[e] * at_.patch;
    int64_t count = 0;
    for (int64_t t = 0; t < at_.positions; ++t) {
      const float value = widened(from[t]);
      own.coefficients[count] = factor * value;
      own.rows[count] = places_.get()[t];
      count += !(value == 0);
    }
    for (int64_t run = 0; run < at_.runs; ++run)
      maps_.gather_patches(padded + at_.run_offset(of_, run), own.rows, own.coefficients, count, at_.width,
                           sums + run * at_.ld);
  }

  void write_weight(Team team) const {
    T* to = call_.grad_weight;
    for_weights(team.part(of_.outputs), [&](int64_t at, int64_t place) { to[at] = narrowed(sums_.get()[place], to); });
  }

  const TypedKernels<T>& typed_;
  const MapKernels& maps_;
  const MapsBackward<T>& call_;
  const Convolution& of_;
  const Layout at_;
  const int64_t most_, chunk_;  // terms of an image, padded inputs at once
  Scratch<int32_t> places_;     // [positions], of patches in a padded image
  Scratch<float> weight_, sums_;  // [outputs, runs, ld]
  Scratch<float> inputs_, padded_, coefficients_;
  Scratch<int32_t> rows_, own_places_, own_starts_;
  Scratch<float> shares_;        // [images, outputs], how much of each map is left out
  Scratch<double> column_sums_;  // of the inputs, then of each thread's map
  Scratch<float> left_out_, sum_x_, base_;
  Scratch<int32_t> all_channels_;
  Scratch<float> ones_;
};

}  // namespace

template <class T>
Status map_norms(const Kernels& kernels, const T* grad, int64_t maps, int64_t positions, float* norms, int threads) {
  if (threads < 1 || !fits<T>(maps, positions, 0)) return Status::kBadSize;
  run_team(team_size(threads, maps * positions, 0), [&](Team team) {
    const Range part = team.part(maps, 16);
    for (int64_t m = part.begin; m < part.end; ++m)
      norms[m] = static_cast<float>(std::sqrt(typed<T>(kernels).sum_squares(grad + m * positions, positions)));
  });
  return Status::kOk;
}

template <class T>
Status maps_backward(const Kernels& kernels, const MapsBackward<T>& call) {
  const TrimAtEnd trim;
  if (call.threads < 1 || call.maps < 0 || !valid(call.of)) return Status::kBadSize;
  if (!valid_maps(call)) return Status::kBadIndex;
  if (call.of.images == 0 && call.grad_weight == nullptr) return Status::kOk;
  const Layout layout(call.of);
  const int64_t entries = call.of.images * call.of.outputs * layout.positions;
  int64_t work = 0;
  if (__builtin_mul_overflow(call.maps * layout.positions, layout.patch, &work)) return Status::kBadSize;
  const int threads = team_size(call.threads, entries, work);
  MapsPass<T> pass(kernels, call, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.run(team); });
  return Status::kOk;
}

#define MEPROP_INSTANTIATE(T)                                                              \
  template Status map_norms(const Kernels&, const T*, int64_t, int64_t, float*, int);      \
  template Status maps_backward(const Kernels&, const MapsBackward<T>&);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)

}  // namespace meprop

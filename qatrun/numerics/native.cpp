// The quantizers' arithmetic for CPUs, one pass over memory each.
//
// It is the arithmetic of the Python modules beside this file, value for value; they teach the maths. Integer operations
// and exactly rounded float32 ones only, never contracted into fused multiply-adds, so results are bitwise equal to theirs.
// OpenMP's symbols are left open: they resolve to the runtime that torch has loaded, so both share one thread pool.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define QATRUN_AVX512
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
  uint16_t bits;
};

constexpr int32_t MAGNITUDE = 0x7FFFFFFF;
constexpr int32_t INFINITE = 0x7F800000;
constexpr int64_t SERIAL_BELOW = 16384;  // values for which a thread's start costs more than it saves

constexpr int32_t power_of_two(int exponent) { return (exponent + 127) << 23; }

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float load(const float* p) { return *p; }
inline float load(const bfloat16* p) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(p->bits) << 16)); }

inline void store(float* p, float x) { *p = x; }
inline void store(bfloat16* p, float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

// Rounding without an upper end, and codes of values that are on the grid (never Inf: they saturate), as in hif8.py, fp8.py
// and int8.py.

struct HiF8 {
  static inline float round(float x) {
    const int32_t magnitude = bits_of(x) & MAGNITUDE;
    int32_t half = 1 << 22;
    half = magnitude >= power_of_two(-15) && magnitude < power_of_two(16) ? 1 << 21 : half;
    half = magnitude >= power_of_two(-7) && magnitude < power_of_two(8) ? 1 << 20 : half;
    half = magnitude >= power_of_two(-3) && magnitude < power_of_two(4) ? 1 << 19 : half;
    int32_t rounded = (magnitude + half) & (half * -2);
    rounded = rounded < power_of_two(-22) ? power_of_two(-22) : rounded;
    rounded |= bits_of(x) & ~MAGNITUDE;
    rounded = magnitude >= power_of_two(-23) ? rounded : 0;
    return float_of(magnitude > INFINITE ? bits_of(x) : rounded);
  }

  static inline uint8_t encode(float grid) {
    const int32_t bits = bits_of(grid), magnitude = bits & MAGNITUDE;
    const int32_t exponent = (magnitude >> 23) - 127, negative = exponent >> 31;
    const int32_t tail = ((exponent ^ negative) - negative) << 3 | (bits >> 20 & 7);
    int32_t code = tail < 64 ? 0x30 + (tail >> 1) : 0x50 + (tail >> 2);
    code = (tail < 32 ? 0x10 + tail : code) + (negative & 0x10);
    code = tail < 16 ? 0x08 + tail + (negative & 0x08) : code;
    code = exponent < -15 ? (exponent < -23 ? 0 : exponent + 23) : code;
    code += bits >> 31 & 0x80;
    return static_cast<uint8_t>(magnitude > INFINITE ? 0x80 : code);
  }
};

template <int MANTISSA_BITS, int MIN_EXPONENT>
struct Minifloat {
  static inline float round(float x) {
    int32_t exponent = bits_of(x) & INFINITE;
    exponent = exponent < power_of_two(MIN_EXPONENT) ? power_of_two(MIN_EXPONENT) : exponent;
    const int32_t ulp = exponent - (MANTISSA_BITS << 23);
    return std::nearbyint(x * float_of((254 << 23) - ulp)) * float_of(ulp);
  }

  static inline uint8_t encode(float grid) {
    const int32_t bits = bits_of(grid), magnitude = bits & MAGNITUDE;
    const bool is_normal = magnitude >= power_of_two(MIN_EXPONENT);
    const int32_t normal = (magnitude >> (23 - MANTISSA_BITS)) - ((MIN_EXPONENT + 126) << MANTISSA_BITS);
    const float subnormal = float_of(is_normal ? 0 : magnitude) * float_of(power_of_two(MANTISSA_BITS - MIN_EXPONENT));
    const int32_t code = (is_normal ? normal : static_cast<int32_t>(subnormal)) + (bits >> 31 & 0x80);
    return static_cast<uint8_t>(magnitude > INFINITE ? 0x7F : code);
  }
};

struct Int8 {
  static inline float round(float x) { return std::nearbyint(x) + 0.0f; }  // + 0: there is no -0

  static inline uint8_t encode(float grid) {
    const bool is_nan = (bits_of(grid) & MAGNITUDE) > INFINITE;
    return static_cast<uint8_t>(static_cast<int32_t>(is_nan ? -128.0f : grid));
  }
};

// Masks are kept as bits, value i in bit i % 8 of byte i / 8, and are bytes only within a piece, which the cache holds.

constexpr int64_t PIECE = 8192;  // values; a multiple of 8

void pack(const uint8_t* bytes, int64_t n, uint8_t* bits) {  // bytes are 0 or 1, those after the n-th too, up to a multiple of 8
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    bits[i / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);  // brings bit 8k to bit 56 + k
  }
}

void unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {  // to 0 or not 0; writes up to a multiple of 8
  for (int64_t i = 0; i < n; i += 8) {
    const uint64_t eight = bits[i / 8] * 0x0101010101010101u & 0x8040201008040201u;
    std::memcpy(bytes + i, &eight, 8);
  }
}

// What all of it is about.

struct Seen {
  int32_t largest = 0;      // magnitude, as bits
  int64_t saturated = 0;    // values at or beyond the edge
  int64_t underflowed = 0;  // values that are not zero and become zero
};

#ifdef QATRUN_AVX512
#include "native_avx512.hpp"
#else
namespace wide {  // nothing is: all values are left to the loop below
template <class Format, class In, class Out>
int64_t quantize_row(const In*, int64_t, float, float, float, Out*, uint8_t*, Seen&) {
  return 0;
}
}  // namespace wide
#endif

template <class Format, class In, class Out>
Seen quantize_row(const In* x, int64_t n, float inv_scale, float edge, float saturated, Out* q, uint8_t* blocked) {
  Seen seen;
  const int64_t done = wide::quantize_row<Format>(x, n, inv_scale, edge, saturated, q, blocked, seen);
  int32_t largest = seen.largest, num_saturated = 0, num_underflowed = 0;  // a row is no longer than a piece
#pragma omp simd reduction(max : largest) reduction(+ : num_saturated, num_underflowed)
  for (int64_t i = done; i < n; i++) {
    const float value = load(x + i);
    const int32_t magnitude = bits_of(value) & MAGNITUDE;  // as integers, NaN > Inf > every number
    largest = magnitude > largest ? magnitude : largest;
    const float scaled = value * inv_scale;
    float clipped = scaled > edge ? edge : scaled;
    clipped = clipped < -edge ? -edge : clipped;
    const int32_t beyond = std::fabs(scaled) >= saturated ? 1 : 0;
    num_saturated += beyond;
    blocked[i] = static_cast<uint8_t>(beyond);
    const float rounded = Format::round(clipped);
    num_underflowed += (bits_of(rounded) & MAGNITUDE) == 0 && magnitude != 0 ? 1 : 0;
    store(q + i, rounded);
  }
  return {largest, seen.saturated + num_saturated, seen.underflowed + num_underflowed};
}

// A row of `columns` values has one scale; a stride of 0 gives all rows the same. q, codes and blocked: null if not wanted.
template <class Format, class In, class Out>
Seen quantize(const In* x, int64_t n, int64_t columns, const float* inv_scale, int64_t stride, float edge,
              float saturated, Out* q, uint8_t* codes, uint8_t* blocked) {
  int32_t largest = 0;
  int64_t num_saturated = 0, num_underflowed = 0;
#pragma omp parallel for reduction(max : largest) reduction(+ : num_saturated, num_underflowed) schedule(static) \
    if (n > SERIAL_BELOW)
  for (int64_t start = 0; start < n; start += PIECE) {
    const int64_t end = start + PIECE < n ? start + PIECE : n;
    Out scratch[PIECE];
    uint8_t mask[PIECE];
    Out* grid = q ? q + start : scratch;
    for (int64_t from = start, to; from < end; from = to) {
      const int64_t row = from / columns, row_end = (row + 1) * columns;
      to = row_end < end ? row_end : end;
      const Seen seen = quantize_row<Format>(x + from, to - from, inv_scale[row * stride], edge, saturated,
                                             grid + (from - start), mask + (from - start));
      largest = seen.largest > largest ? seen.largest : largest;
      num_saturated += seen.saturated;
      num_underflowed += seen.underflowed;
    }
    if (codes) {
#pragma omp simd
      for (int64_t i = 0; i < end - start; i++) codes[start + i] = Format::encode(load(grid + i));
    }
    if (blocked) {
      for (int64_t i = end; i % 8 != 0; i++) mask[i - start] = 0;
      pack(mask, end - start, blocked + start / 8);
    }
  }
  return {largest, num_saturated, num_underflowed};
}

template <class In, class Out>
Seen quantize_to(int format, const In* x, int64_t n, int64_t columns, const float* inv_scale, int64_t stride, float edge,
                 float saturated, Out* q, uint8_t* codes, uint8_t* blocked) {
  switch (format) {
    case 0: return quantize<HiF8>(x, n, columns, inv_scale, stride, edge, saturated, q, codes, blocked);
    case 1: return quantize<Minifloat<3, -6>>(x, n, columns, inv_scale, stride, edge, saturated, q, codes, blocked);
    case 2: return quantize<Minifloat<2, -14>>(x, n, columns, inv_scale, stride, edge, saturated, q, codes, blocked);
    default: return quantize<Int8>(x, n, columns, inv_scale, stride, edge, saturated, q, codes, blocked);
  }
}

template <class Out>
void decode(const uint8_t* codes, int64_t n, const float* values, Out* out) {
#pragma omp parallel for simd schedule(static) if (n > SERIAL_BELOW)
  for (int64_t i = 0; i < n; i++) store(out + i, values[codes[i]]);
}

template <class T>
void rescale(T* y, int64_t rows, int64_t columns, const float* row_scale, int64_t row_stride, const float* column_scale,
             int64_t column_stride, const T* bias) {
#pragma omp parallel for schedule(static) if (rows * columns > SERIAL_BELOW)
  for (int64_t row = 0; row < rows; row++) {
    T* out = y + row * columns;
    const float of_row = row_scale[row * row_stride];
    if (column_stride == 0 && bias == nullptr) {
      const float scale = of_row * *column_scale;
#pragma omp simd
      for (int64_t i = 0; i < columns; i++) store(out + i, load(out + i) * scale);
    } else if (bias == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < columns; i++) store(out + i, load(out + i) * (of_row * column_scale[i * column_stride]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < columns; i++)
        store(out + i, load(out + i) * (of_row * column_scale[i * column_stride]) + load(bias + i));
    }
  }
}

template <class In, class Out>
void scale_gradient(const In* grad, int64_t n, float scale, const uint8_t* blocked, Out* out) {
  if (blocked == nullptr) {
#pragma omp parallel for simd schedule(static) if (n > SERIAL_BELOW)
    for (int64_t i = 0; i < n; i++) store(out + i, load(grad + i) * scale);
    return;
  }
#pragma omp parallel for schedule(static) if (n > SERIAL_BELOW)
  for (int64_t start = 0; start < n; start += PIECE) {
    const int64_t length = start + PIECE < n ? PIECE : n - start;
    uint8_t mask[PIECE];
    unpack(blocked + start / 8, length, mask);
#pragma omp simd
    for (int64_t i = 0; i < length; i++) store(out + start + i, mask[i] ? 0.0f : load(grad + start + i) * scale);
  }
}

}  // namespace

// dtypes: 0 float32, 1 bfloat16; formats as in `quantize_to`.

extern "C" void qatrun_quantize(int format, const void* x, int x_dtype, int64_t n, int64_t columns,
                                const float* inv_scale, int64_t stride, float edge, float saturated, void* q,
                                int q_dtype, uint8_t* codes, uint8_t* blocked, float* amax, int64_t* counts) {
  const auto* x32 = static_cast<const float*>(x);
  const auto* x16 = static_cast<const bfloat16*>(x);
  auto* q32 = static_cast<float*>(q);
  auto* q16 = static_cast<bfloat16*>(q);
  Seen seen;
  if (x_dtype == 0)
    seen = q_dtype == 0 ? quantize_to(format, x32, n, columns, inv_scale, stride, edge, saturated, q32, codes, blocked)
                        : quantize_to(format, x32, n, columns, inv_scale, stride, edge, saturated, q16, codes, blocked);
  else
    seen = q_dtype == 0 ? quantize_to(format, x16, n, columns, inv_scale, stride, edge, saturated, q32, codes, blocked)
                        : quantize_to(format, x16, n, columns, inv_scale, stride, edge, saturated, q16, codes, blocked);
  *amax = float_of(seen.largest);
  counts[0] = seen.saturated;
  counts[1] = seen.underflowed;
}

extern "C" void qatrun_decode(const uint8_t* codes, int64_t n, const float* values, void* out, int out_dtype) {
  if (out_dtype == 0)
    decode(codes, n, values, static_cast<float*>(out));
  else
    decode(codes, n, values, static_cast<bfloat16*>(out));
}

extern "C" void qatrun_rescale(void* y, int dtype, int64_t rows, int64_t columns, const float* row_scale,
                               int64_t row_stride, const float* column_scale, int64_t column_stride, const void* bias) {
  if (dtype == 0)
    rescale(static_cast<float*>(y), rows, columns, row_scale, row_stride, column_scale, column_stride,
            static_cast<const float*>(bias));
  else
    rescale(static_cast<bfloat16*>(y), rows, columns, row_scale, row_stride, column_scale, column_stride,
            static_cast<const bfloat16*>(bias));
}

extern "C" void qatrun_scale_gradient(const void* grad, int grad_dtype, int64_t n, const float* scale,
                                      const uint8_t* blocked, void* out, int out_dtype) {
  const auto* g32 = static_cast<const float*>(grad);
  const auto* g16 = static_cast<const bfloat16*>(grad);
  auto* o32 = static_cast<float*>(out);
  auto* o16 = static_cast<bfloat16*>(out);
  if (grad_dtype == 0)
    out_dtype == 0 ? scale_gradient(g32, n, *scale, blocked, o32) : scale_gradient(g32, n, *scale, blocked, o16);
  else
    out_dtype == 0 ? scale_gradient(g16, n, *scale, blocked, o32) : scale_gradient(g16, n, *scale, blocked, o16);
}

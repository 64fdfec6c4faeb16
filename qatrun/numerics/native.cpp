// The quantizers' arithmetic for CPUs, one pass over memory each.
//
// It is the arithmetic of the Python modules beside this file, value for value; they teach the maths. Integer operations
// and exactly rounded float32 ones only, never contracted into fused multiply-adds, so results are bitwise equal to theirs.
//
// native_build.py compiles this file once for each instruction set of the architecture (QATRUN_VARIANT names it) into one
// library, of which native.py takes the best that the processor runs. Vectors are the compilers' own: GCC and clang turn them
// into the instructions that a translation unit may use. Everything is in an unnamed namespace and nothing of the standard
// library's is called, lest the linker take a function made for one instruction set for all.

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

// torch's OpenMP runtime, whose threads are shared: GOMP_parallel, omp_get_thread_num and omp_get_num_threads, or null.
extern "C" {
typedef void (*Fork)(void (*)(void*), void*, unsigned, unsigned);
extern Fork qatrun_fork;
extern int (*qatrun_thread)();
extern int (*qatrun_num_threads)();
}

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
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
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
    return __builtin_nearbyintf(x * float_of((254 << 23) - ulp)) * float_of(ulp);
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
  static inline float round(float x) { return __builtin_nearbyintf(x) + 0.0f; }  // + 0: there is no -0

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
    memcpy(&eight, bytes + i, 8);
    bits[i / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);  // brings bit 8k to bit 56 + k
  }
}

void unpack(const uint8_t* bits, int64_t n, uint8_t* bytes) {  // to 0 or not 0; writes up to a multiple of 8
  for (int64_t i = 0; i < n; i += 8) {
    const uint64_t eight = bits[i / 8] * 0x0101010101010101u & 0x8040201008040201u;
    memcpy(bytes + i, &eight, 8);
  }
}

// Vectors of LANES values: what most of the time goes into. A magnitude is a float32 pattern without its sign, as an integer.

namespace wide {

typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef int16_t Halves __attribute__((vector_size(4 * LANES)));  // 2 * LANES
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// Rounding of magnitudes up to the edge; `zero` is all ones in lanes that become 0.
struct Rounded {
  I magnitude, zero;
};

inline Rounded round(HiF8, I magnitude) {
  // |E|, as a float32, has floor(log2 |E|) for exponent: 4 .. 7, 8 .. 15 and 16 .. are a binade each, and a mantissa bit less.
  const I exponent = (magnitude & INFINITE) - power_of_two(0);                               // E * 2^23
  const I binade = (I)__builtin_convertvector(exponent, F) & INFINITE;                       // 2^(23 + floor(log2 |E|))
  const I half = __builtin_convertvector((F)larger(binade, I{} + power_of_two(24)), I) >> 5;  // of the last kept bit
  const I banded = (magnitude + half) & -(half + half);
  return {larger(banded, I{} + power_of_two(-22)), magnitude < power_of_two(-23)};
}

template <int MANTISSA_BITS, int MIN_EXPONENT>
inline Rounded round(Minifloat<MANTISSA_BITS, MIN_EXPONENT>, I magnitude) {
  // A number whose own last bit is the grid's: adding it rounds, to nearest and ties to even.
  const I least = larger(magnitude, I{} + power_of_two(MIN_EXPONENT)) & INFINITE;
  const F large = (F)(least + ((23 - MANTISSA_BITS) << 23));
  const I rounded = (I)(((F)magnitude + large) - large);
  return {rounded, rounded == 0};
}

inline Rounded round(Int8, I magnitude) {
  const F large = F{} + 8388608.0f;  // 2^23
  const I rounded = (I)(((F)magnitude + large) - large);
  return {rounded, rounded == 0};
}

// Only FP8 has a -0.
template <class Format>
inline I with_sign(Format, Rounded rounded, I sign) {
  return (rounded.magnitude | sign) & ~rounded.zero;
}
template <int MANTISSA_BITS, int MIN_EXPONENT>
inline I with_sign(Minifloat<MANTISSA_BITS, MIN_EXPONENT>, Rounded rounded, I sign) {
  return rounded.magnitude | sign;
}

// 2 * LANES values, in any order that `put` undoes, and their magnitudes for amax.
struct Pair {
  F first, second;
};

inline Pair get(const float* x, const void*) { return {load<F>(x), load<F>(x + LANES)}; }
inline Pair get(const bfloat16* x, const float*) {
  const U first = __builtin_convertvector(load<Half>(x), U), second = __builtin_convertvector(load<Half>(x + LANES), U);
  return {(F)(first << 16), (F)(second << 16)};
}
inline Pair get(const bfloat16* x, const bfloat16*) {  // every other one
  const U both = load<U>(x);
  return {(F)(both << 16), (F)(both & 0xFFFF0000u)};
}

inline void put(const void*, float* q, I first, I second) {
  store(q, first);
  store(q + LANES, second);
}
inline void put(const float*, bfloat16* q, I first, I second) {  // exact
  store(q, __builtin_convertvector((U)first >> 16, Half));
  store(q + LANES, __builtin_convertvector((U)second >> 16, Half));
}
inline void put(const bfloat16*, bfloat16* q, I first, I second) { store(q, ((U)first >> 16) | (U)second); }

struct Largest32 {
  I seen = {};
  void see(const float* x) { seen = larger(seen, larger(load<I>(x) & MAGNITUDE, load<I>(x + LANES) & MAGNITUDE)); }
  int32_t bits() const {
    int32_t largest = 0;
    for (int lane = 0; lane < LANES; lane++) largest = seen[lane] > largest ? seen[lane] : largest;
    return largest;
  }
};

struct Largest16 {
  Halves seen = {};
  void see(const bfloat16* x) { seen = larger(seen, (Halves)(load<Halves>(x) & (int16_t)0x7FFF)); }
  int32_t bits() const {
    int32_t largest = 0;
    for (int lane = 0; lane < 2 * LANES; lane++) largest = seen[lane] > largest ? seen[lane] : largest;
    return largest << 16;
  }
};

inline Largest32 largest_of(const float*) { return {}; }
inline Largest16 largest_of(const bfloat16*) { return {}; }

struct Seen {
  int32_t largest;
  int64_t zeros;  // values that are or become zero
};

// n: a multiple of 2 * LANES, of values up to the edge once they are scaled; else only `largest` means something.
template <class Format, class In, class Out>
Seen quantize(const In* x, int64_t n, float inv_scale, Out* q) {
  auto largest = largest_of(x);
  I zeros = {};
  for (int64_t i = 0; i < n; i += 2 * LANES) {
    largest.see(x + i);
    const Pair values = get(x + i, q);
    const I first = (I)(values.first * inv_scale), second = (I)(values.second * inv_scale);
    const Rounded one = round(Format{}, first & MAGNITUDE), other = round(Format{}, second & MAGNITUDE);
    zeros -= one.zero + other.zero;
    put(x, q + i, with_sign(Format{}, one, first & ~MAGNITUDE), with_sign(Format{}, other, second & ~MAGNITUDE));
  }
  int64_t num_zeros = 0;
  for (int lane = 0; lane < LANES; lane++) num_zeros += zeros[lane];
  return {largest.bits(), num_zeros};
}

}  // namespace wide

// Work is shared out in equal runs of units: pieces, rows or values. A team of one where it is not worth a thread's start.

template <class Body>
void share_out(int64_t units, int64_t values, Body body) {
  struct Team {
    int64_t units;
    Body& body;
    static void member(void* team) {
      const auto* of = static_cast<Team*>(team);
      const int64_t thread = qatrun_thread(), threads = qatrun_num_threads();
      of->body(of->units * thread / threads, of->units * (thread + 1) / threads);
    }
  } team{units, body};
  if (qatrun_fork != nullptr && values > SERIAL_BELOW)
    qatrun_fork(Team::member, &team, 0, 0);
  else
    body(0, units);
}

// What all of it is about.

struct Seen {
  int32_t largest = 0;      // magnitude, as bits
  int64_t saturated = 0;    // values at or beyond the edge
  int64_t underflowed = 0;  // values that are not zero and become zero

  void add(const Seen& other) {
    largest = other.largest > largest ? other.largest : largest;
    saturated += other.saturated;
    underflowed += other.underflowed;
  }
};

template <class Format, class In, class Out>
Seen quantize_any(const In* x, int64_t n, float inv_scale, float edge, float saturated, Out* q, uint8_t* blocked) {
  int32_t largest = 0, num_saturated = 0, num_underflowed = 0;  // a row is no longer than a piece
#pragma omp simd reduction(max : largest) reduction(+ : num_saturated, num_underflowed)
  for (int64_t i = 0; i < n; i++) {
    const float value = load(x + i);
    const int32_t magnitude = bits_of(value) & MAGNITUDE;  // as integers, NaN > Inf > every number
    largest = magnitude > largest ? magnitude : largest;
    const float scaled = value * inv_scale;
    float clipped = scaled > edge ? edge : scaled;
    clipped = clipped < -edge ? -edge : clipped;
    const int32_t beyond = __builtin_fabsf(scaled) >= saturated ? 1 : 0;
    num_saturated += beyond;
    blocked[i] = static_cast<uint8_t>(beyond);
    const float rounded = Format::round(clipped);
    num_underflowed += (bits_of(rounded) & MAGNITUDE) == 0 && magnitude != 0 ? 1 : 0;
    store(q + i, rounded);
  }
  return {largest, num_saturated, num_underflowed};
}

template <class In>
int64_t zeros_of(const In* x, int64_t n) {
  int32_t zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int64_t i = 0; i < n; i++) zeros += (bits_of(load(x + i)) & MAGNITUDE) == 0 ? 1 : 0;
  return zeros;
}

// Nearly always no value of a row passes the edge, and all are finite. So rows are rounded as if it were so, in vectors, and
// once more with all due care if their amax then says otherwise.
template <class Format, class In, class Out>
Seen quantize_row(const In* x, int64_t n, float inv_scale, float edge, float saturated, Out* q, uint8_t* blocked) {
  const int64_t in_vectors = n - n % (2 * LANES);
  wide::Seen fast = wide::quantize<Format>(x, in_vectors, inv_scale, q);
  int64_t done = 0;
  Seen seen;
  if (float_of(fast.largest) * __builtin_fabsf(inv_scale) <= edge) {  // false for NaN
    done = in_vectors;
    seen = {fast.largest, 0, fast.zeros == 0 ? 0 : fast.zeros - zeros_of(x, done)};
    memset(blocked, 0, static_cast<size_t>(done));
  }
  seen.add(quantize_any<Format>(x + done, n - done, inv_scale, edge, saturated, q + done, blocked + done));
  return seen;
}

template <class Format, class Out>
void encode(const Out* grid, int64_t n, uint8_t* codes) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) codes[i] = Format::encode(load(grid + i));
}

// A row of `columns` values has one scale; a stride of 0 gives all rows the same. q, codes and blocked: null if not wanted.
template <class Format, class In, class Out>
Seen quantize(const In* x, int64_t n, int64_t columns, const float* inv_scale, int64_t stride, float edge,
              float saturated, Out* q, uint8_t* codes, uint8_t* blocked) {
  Seen seen;
  share_out((n + PIECE - 1) / PIECE, n, [&](int64_t first, int64_t last) {
    Seen here;
    Out scratch[PIECE];
    uint8_t mask[PIECE];
    for (int64_t piece = first; piece < last; piece++) {
      const int64_t start = piece * PIECE, end = start + PIECE < n ? start + PIECE : n;
      const int64_t saturated_before = here.saturated;
      Out* grid = q ? q + start : scratch;
      for (int64_t from = start, to; from < end; from = to) {
        const int64_t row = from / columns, row_end = (row + 1) * columns;
        to = row_end < end ? row_end : end;
        here.add(quantize_row<Format>(x + from, to - from, inv_scale[row * stride], edge, saturated,
                                      grid + (from - start), mask + (from - start)));
      }
      if (codes) encode<Format>(grid, end - start, codes + start);
      if (blocked && here.saturated == saturated_before) {
        memset(blocked + start / 8, 0, static_cast<size_t>((end - start + 7) / 8));
      } else if (blocked) {
        for (int64_t i = end; i % 8 != 0; i++) mask[i - start] = 0;
        pack(mask, end - start, blocked + start / 8);
      }
    }
    int32_t largest = __atomic_load_n(&seen.largest, __ATOMIC_RELAXED);
    while (here.largest > largest &&
           !__atomic_compare_exchange_n(&seen.largest, &largest, here.largest, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    __atomic_fetch_add(&seen.saturated, here.saturated, __ATOMIC_RELAXED);
    __atomic_fetch_add(&seen.underflowed, here.underflowed, __ATOMIC_RELAXED);
  });
  return seen;
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

// Loops stand in functions of their own: inside a lambda a store might change what it captured, for all a compiler knows.

template <class Out>
void decode_run(const uint8_t* codes, int64_t n, const float* values, Out* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(out + i, values[codes[i]]);
}

template <class Out>
void decode(const uint8_t* codes, int64_t n, const float* values, Out* out) {
  share_out(n, n, [=](int64_t first, int64_t last) { decode_run(codes + first, last - first, values, out + first); });
}

template <class In, class Out>
void scale_run(const In* x, int64_t n, float scale, Out* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(out + i, load(x + i) * scale);
}

template <class T>
void rescale_row(T* y, int64_t n, float of_row, const float* column_scale, int64_t stride, const T* bias) {
  if (bias == nullptr && stride == 0) {
    scale_run(y, n, of_row * *column_scale, y);
  } else if (bias == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(y + i, load(y + i) * (of_row * column_scale[i]));
  } else if (stride == 0) {
    const float scale = of_row * *column_scale;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(y + i, load(y + i) * scale + load(bias + i));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) store(y + i, load(y + i) * (of_row * column_scale[i]) + load(bias + i));
  }
}

template <class T>
void rescale(T* y, int64_t rows, int64_t columns, const float* row_scale, int64_t row_stride, const float* column_scale,
             int64_t column_stride, const T* bias) {
  share_out(rows, rows * columns, [=](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      rescale_row(y + row * columns, columns, row_scale[row * row_stride], column_scale, column_stride, bias);
  });
}

template <class In, class Out>
void scale_unblocked(const In* grad, int64_t n, float scale, const uint8_t* blocked, Out* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) store(out + i, blocked[i] ? 0.0f : load(grad + i) * scale);
}

template <class In, class Out>
void scale_gradient(const In* grad, int64_t n, float scale, const uint8_t* blocked, Out* out) {
  share_out((n + PIECE - 1) / PIECE, n, [=](int64_t first, int64_t last) {
    uint8_t mask[PIECE];
    for (int64_t start = first * PIECE; start < last * PIECE; start += PIECE) {
      const int64_t length = start + PIECE < n ? PIECE : n - start;
      if (blocked == nullptr) {
        scale_run(grad + start, length, scale, out + start);
      } else {
        unpack(blocked + start / 8, length, mask);
        scale_unblocked(grad + start, length, scale, mask, out + start);
      }
    }
  });
}

}  // namespace

#define JOINED(name, variant) qatrun_##name##_##variant
#define OF_VARIANT(name, variant) JOINED(name, variant)
#define NAMED(name) OF_VARIANT(name, QATRUN_VARIANT)

// dtypes: 0 float32, 1 bfloat16; formats as in `quantize_to`.

extern "C" void NAMED(quantize)(int format, const void* x, int x_dtype, int64_t n, int64_t columns,
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

extern "C" void NAMED(decode)(const uint8_t* codes, int64_t n, const float* values, void* out, int out_dtype) {
  if (out_dtype == 0)
    decode(codes, n, values, static_cast<float*>(out));
  else
    decode(codes, n, values, static_cast<bfloat16*>(out));
}

extern "C" void NAMED(rescale)(void* y, int dtype, int64_t rows, int64_t columns, const float* row_scale,
                               int64_t row_stride, const float* column_scale, int64_t column_stride, const void* bias) {
  if (dtype == 0)
    rescale(static_cast<float*>(y), rows, columns, row_scale, row_stride, column_scale, column_stride,
            static_cast<const float*>(bias));
  else
    rescale(static_cast<bfloat16*>(y), rows, columns, row_scale, row_stride, column_scale, column_stride,
            static_cast<const bfloat16*>(bias));
}

extern "C" void NAMED(scale_gradient)(const void* grad, int grad_dtype, int64_t n, const float* scale,
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

// What there is once, in the variant that every processor of the architecture runs.
#ifdef QATRUN_COMMON
Fork qatrun_fork = nullptr;
int (*qatrun_thread)() = nullptr;
int (*qatrun_num_threads)() = nullptr;

extern "C" void qatrun_share_threads(Fork fork, int (*thread)(), int (*num_threads)()) {
  qatrun_fork = fork;
  qatrun_thread = thread;
  qatrun_num_threads = num_threads;
}

extern "C" int qatrun_runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return 0;
#endif
}

extern "C" int qatrun_runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#else
  return 0;
#endif
}
#endif

// Sixteen values at a time, for CPUs with AVX-512: the arithmetic of native.cpp, and its very results.
// It is here for HiFloat8's bands, which a compiler turns into a compare each and this looks up in one table.
// native.cpp includes it in its own namespace, after <immintrin.h>.

#pragma once

namespace wide {

constexpr int64_t LANES = 16;
constexpr int32_t QUIET_NAN = 0x7FC00000;

inline __m512i all(int32_t value) { return _mm512_set1_epi32(value); }
inline __m512i magnitude_of(__m512i bits) { return _mm512_and_si512(bits, all(MAGNITUDE)); }

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const bfloat16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store16(float* p, __m512 grid) { _mm512_storeu_ps(p, grid); }
inline void store16(bfloat16* p, __m512 grid) {  // exact
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(grid), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}

// A magnitude >= 0, or NaN, on its grid.
struct Rounded {
  __m512i magnitude;
  __mmask16 is_nonzero;
};

inline Rounded round(HiF8, __m512 x) {
  // Half a unit in the last place by exponent, whose low five bits tell -16 .. 15 apart: 31 is exponent 0, 0 is 1, ...
  constexpr int32_t m3 = 1 << 19, m2 = 1 << 20, m1 = 1 << 21, m0 = 1 << 22;  // by mantissa bits
  const __m512i from_1 = _mm512_setr_epi32(m3, m3, m3, m2, m2, m2, m2, m1, m1, m1, m1, m1, m1, m1, m1, m0);
  const __m512i from_minus_15 = _mm512_setr_epi32(m1, m1, m1, m1, m1, m1, m1, m1, m2, m2, m2, m2, m3, m3, m3, m3);
  const __m512i magnitude = _mm512_min_epi32(_mm512_castps_si512(x), all(QUIET_NAN));  // any NaN: one that stays so
  const __m512i exponent = _mm512_max_epi32(_mm512_srli_epi32(magnitude, 23), all(127 - 16));  // denormals as the largest
  const __m512i half = _mm512_permutex2var_epi32(from_1, exponent, from_minus_15);
  const __m512i unit = _mm512_add_epi32(half, half);
  const __m512i banded = _mm512_and_si512(_mm512_add_epi32(magnitude, half), _mm512_sub_epi32(all(0), unit));
  const __mmask16 stays = _mm512_cmpge_epi32_mask(magnitude, all(power_of_two(-23)));
  return {_mm512_maskz_max_epi32(stays, banded, all(power_of_two(-22))), stays};
}

inline Rounded with_mask(__m512 rounded) {
  const __m512i bits = _mm512_castps_si512(rounded);
  return {bits, _mm512_test_epi32_mask(bits, bits)};
}

inline __m512 round_to_integer(__m512 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <int MANTISSA_BITS, int MIN_EXPONENT>
inline Rounded round(Minifloat<MANTISSA_BITS, MIN_EXPONENT>, __m512 x) {
  const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(x), all(INFINITE));
  const __m512i ulp = _mm512_sub_epi32(_mm512_max_epi32(exponent, all(power_of_two(MIN_EXPONENT))), all(MANTISSA_BITS << 23));
  const __m512 per_ulp = _mm512_castsi512_ps(_mm512_sub_epi32(all(254 << 23), ulp));
  return with_mask(_mm512_mul_ps(round_to_integer(_mm512_mul_ps(x, per_ulp)), _mm512_castsi512_ps(ulp)));
}

inline Rounded round(Int8, __m512 x) { return with_mask(round_to_integer(x)); }

// Where a sign goes: only FP8 has a -0.
inline __mmask16 takes_sign(HiF8, Rounded rounded) { return rounded.is_nonzero; }
inline __mmask16 takes_sign(Int8, Rounded rounded) { return rounded.is_nonzero; }
template <int MANTISSA_BITS, int MIN_EXPONENT>
inline __mmask16 takes_sign(Minifloat<MANTISSA_BITS, MIN_EXPONENT>, Rounded) {
  return 0xFFFF;
}

// The first n - n % 16 values of a row; adds to what is seen. blocked: null if not wanted.
template <class Format, class In, class Out>
int64_t quantize_row(const In* x, int64_t n, float inv_scale, float edge, float saturated, Out* q, uint8_t* blocked, Seen& seen) {
  const __m512 scale = _mm512_set1_ps(inv_scale), highest = _mm512_set1_ps(edge), threshold = _mm512_set1_ps(saturated);
  __m512i largest = all(0), num_saturated = all(0), num_underflowed = all(0);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const __m512 value = load16(x + i);
    const __m512i magnitude = magnitude_of(_mm512_castps_si512(value));
    largest = _mm512_max_epi32(largest, magnitude);
    const __m512i scaled = _mm512_castps_si512(_mm512_mul_ps(value, scale));
    const __m512 size = _mm512_castsi512_ps(magnitude_of(scaled));
    const __mmask16 beyond = _mm512_cmp_ps_mask(size, threshold, _CMP_GE_OQ);
    const Rounded rounded = round(Format{}, _mm512_min_ps(highest, size));  // min gives its second, if that is NaN
    const __mmask16 underflowed = _mm512_mask_test_epi32_mask(_knot_mask16(rounded.is_nonzero), magnitude, magnitude);
    num_saturated = _mm512_mask_sub_epi32(num_saturated, beyond, num_saturated, all(-1));
    num_underflowed = _mm512_mask_sub_epi32(num_underflowed, underflowed, num_underflowed, all(-1));
    if (blocked) _mm_storeu_si128(reinterpret_cast<__m128i*>(blocked + i), _mm_maskz_set1_epi8(beyond, 1));
    constexpr int bits_or_sign = 0xF4;  // first | second & ~third
    const __m512i grid = _mm512_mask_ternarylogic_epi32(rounded.magnitude, takes_sign(Format{}, rounded), scaled,
                                                        all(MAGNITUDE), bits_or_sign);
    store16(q + i, _mm512_castsi512_ps(grid));
  }
  const int32_t seen_here = _mm512_reduce_max_epi32(largest);
  seen.largest = seen_here > seen.largest ? seen_here : seen.largest;
  seen.saturated += _mm512_reduce_add_epi32(num_saturated);
  seen.underflowed += _mm512_reduce_add_epi32(num_underflowed);
  return i;
}

}  // namespace wide

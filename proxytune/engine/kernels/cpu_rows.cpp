// What decoding does to every token by itself, on the CPU: an RMS norm and the rotation of queries and keys, each
// in one call where torch's own is a chain of six operations or ten.

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int64_t SERIAL = 1 << 16;  // numbers below which starting the other threads costs more than it gains

// How a number is stored, computed with, and rounded after an operation. bfloat16 is the upper half of a float;
// transformers rounds to it after every operation, so ours do too. Others are rounded by the processor.
template <typename Stored>
struct Number {
  using Wide = Stored;
  static Wide wide(Stored number) { return number; }
  static Stored narrow(Wide number) { return number; }
};

template <>
struct Number<uint16_t> {
  using Wide = float;
  static float wide(uint16_t number) {
    const uint32_t bits = uint32_t(number) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
  static uint16_t narrow(float number) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
  }
};

template <typename Stored>
static inline typename Number<Stored>::Wide rounded(typename Number<Stored>::Wide number) {
  return Number<Stored>::wide(Number<Stored>::narrow(number));
}

template <typename Stored>
static void rms_norm(const Stored *x, const Stored *weight, Stored *out, int64_t rows, int64_t size, float eps,
                     int64_t threads) {
  using N = Number<Stored>;
#pragma omp parallel for num_threads(threads) if (rows * size >= SERIAL)
  for (int64_t row = 0; row < rows; ++row) {
    const Stored *from = x + row * size;
    Stored *to = out + row * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += N::wide(from[i]) * N::wide(from[i]);
    const float scale = 1.0f / std::sqrt(sum / float(size) + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
      to[i] = N::narrow(rounded<Stored>(N::wide(from[i]) * scale) * N::wide(weight[i]));
  }
}

// x [T, heads, size] in place, its first `turned` numbers per head; cos and sin [T, turned].
template <typename Stored>
static void rotate(Stored *x, const Stored *cos, const Stored *sin, int64_t tokens, int64_t heads, int64_t size,
                   int64_t turned, int64_t threads) {
  using N = Number<Stored>;
  const int64_t half = turned / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * size >= SERIAL)
  for (int64_t token = 0; token < tokens; ++token) {
    const Stored *c = cos + token * turned, *s = sin + token * turned;
    for (int64_t head = 0; head < heads; ++head) {
      Stored *low = x + (token * heads + head) * size, *high = low + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const auto a = N::wide(low[i]), b = N::wide(high[i]);
        low[i] = N::narrow(rounded<Stored>(a * N::wide(c[i])) - rounded<Stored>(b * N::wide(s[i])));
        high[i] = N::narrow(rounded<Stored>(b * N::wide(c[half + i])) + rounded<Stored>(a * N::wide(s[half + i])));
      }
    }
  }
}

#define RMS_NORM(name, Stored)                                                                                     \
  extern "C" void rms_norm_##name(const Stored *x, const Stored *weight, Stored *out, int64_t rows, int64_t size,  \
                                  float eps, int64_t threads) {                                                    \
    rms_norm(x, weight, out, rows, size, eps, threads);                                                            \
  }
RMS_NORM(float32, float)
RMS_NORM(bfloat16, uint16_t)

#define ROTATE(name, Stored)                                                                                       \
  extern "C" void rotate_##name(Stored *x, const Stored *cos, const Stored *sin, int64_t tokens, int64_t heads,    \
                                int64_t size, int64_t turned, int64_t threads) {                                   \
    rotate(x, cos, sin, tokens, heads, size, turned, threads);                                                     \
  }
ROTATE(float32, float)
ROTATE(float64, double)
ROTATE(bfloat16, uint16_t)

// What decoding does to every token by itself, on the CPU: an RMS norm and the rotation of queries and keys, each
// in one call where torch's own is a chain of six operations or ten.

#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int64_t SERIAL = 1 << 16;  // numbers below which starting the other threads costs more than it gains

// bfloat16 is the upper half of a float. Every operation of transformers rounds to it, so ours do too.
static inline float wide(uint16_t number) {
  const uint32_t bits = uint32_t(number) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

static inline uint16_t narrow(float number) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

static inline float rounded(float number) { return wide(narrow(number)); }

extern "C" void rms_norm_bfloat16(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t rows, int64_t size,
                                  float eps, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= SERIAL)
  for (int64_t row = 0; row < rows; ++row) {
    const uint16_t *from = x + row * size;
    uint16_t *to = out + row * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += wide(from[i]) * wide(from[i]);
    const float scale = 1.0f / std::sqrt(sum / float(size) + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = narrow(rounded(wide(from[i]) * scale) * wide(weight[i]));
  }
}

extern "C" void rms_norm_float32(const float *x, const float *weight, float *out, int64_t rows, int64_t size, float eps,
                         int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= SERIAL)
  for (int64_t row = 0; row < rows; ++row) {
    const float *from = x + row * size;
    float *to = out + row * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += from[i] * from[i];
    const float scale = 1.0f / std::sqrt(sum / float(size) + eps);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = from[i] * scale * weight[i];
  }
}

// x [T, heads, size] in place, its first `turned` numbers per head; cos and sin [T, turned].
template <typename Number>
static void rotate(Number *x, const Number *cos, const Number *sin, int64_t tokens, int64_t heads, int64_t size,
                   int64_t turned, int64_t threads) {
  const int64_t half = turned / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * size >= SERIAL)
  for (int64_t token = 0; token < tokens; ++token) {
    const Number *c = cos + token * turned, *s = sin + token * turned;
    for (int64_t head = 0; head < heads; ++head) {
      Number *low = x + (token * heads + head) * size, *high = low + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const Number a = low[i], b = high[i];
        low[i] = a * c[i] - b * s[i];
        high[i] = b * c[half + i] + a * s[half + i];
      }
    }
  }
}

extern "C" void rotate_bfloat16(uint16_t *x, const uint16_t *cos, const uint16_t *sin, int64_t tokens, int64_t heads,
                                int64_t size, int64_t turned, int64_t threads) {
  const int64_t half = turned / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * size >= SERIAL)
  for (int64_t token = 0; token < tokens; ++token) {
    const uint16_t *c = cos + token * turned, *s = sin + token * turned;
    for (int64_t head = 0; head < heads; ++head) {
      uint16_t *low = x + (token * heads + head) * size, *high = low + half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float a = wide(low[i]), b = wide(high[i]);
        low[i] = narrow(rounded(a * wide(c[i])) - rounded(b * wide(s[i])));
        high[i] = narrow(rounded(b * wide(c[half + i])) + rounded(a * wide(s[half + i])));
      }
    }
  }
}

extern "C" void rotate_float32(float *x, const float *cos, const float *sin, int64_t tokens, int64_t heads,
                               int64_t size, int64_t turned, int64_t threads) {
  rotate(x, cos, sin, tokens, heads, size, turned, threads);
}

extern "C" void rotate_float64(double *x, const double *cos, const double *sin, int64_t tokens, int64_t heads,
                               int64_t size, int64_t turned, int64_t threads) {
  rotate(x, cos, sin, tokens, heads, size, turned, threads);
}

// Rows of bfloat16 times the weights of an output head, summed and left in float32, on the CPU: torch and
// oneDNN round the sums to bfloat16. A row's sums do not depend on how many rows there are.

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define PRODUCTS_OF_PAIRS
#include <immintrin.h>
#endif

constexpr int64_t OUTPUTS = 4;       // summed at a time: what is read of the weights is used for all rows
constexpr int64_t TOGETHER = 64;     // rows that stay in the cache while the weights go by
constexpr int64_t SERIAL = 1 << 16;  // weights below which starting the other threads costs more than it gains

#ifdef PRODUCTS_OF_PAIRS

constexpr int64_t ROWS = 6;  // with OUTPUTS it fills the registers

static inline __m512bh pairs(const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); }

static inline __m512bh first_pairs(const uint16_t* from, int64_t numbers) {
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32(1) << numbers) - 1, from);
}

static inline __m256 halved(__m512 sums) {
  return _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
}

static inline void store(const __m512 (&sums)[4], float* out) {  // the four totals
  const __m256 one = _mm256_hadd_ps(halved(sums[0]), halved(sums[1]));
  const __m256 other = _mm256_hadd_ps(halved(sums[2]), halved(sums[3]));
  const __m256 all = _mm256_hadd_ps(one, other);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

static inline void store(const __m512 (&sums)[1], float* out) {
  float totals[4];
  store({sums[0], sums[0], sums[0], sums[0]}, totals);  // in the same order
  *out = totals[0];
}

template <int64_t R, int64_t N>
static void tile(const uint16_t* x, const uint16_t* weight, float* out, int64_t inputs, int64_t outputs) {
  __m512 sums[R][N];
  for (int64_t r = 0; r < R; r++)
    for (int64_t n = 0; n < N; n++) sums[r][n] = _mm512_setzero_ps();
  const int64_t whole = inputs / 32 * 32;
  __m512bh w[N];
  for (int64_t k = 0; k < whole; k += 32) {
    for (int64_t n = 0; n < N; n++) w[n] = pairs(weight + n * inputs + k);
    for (int64_t r = 0; r < R; r++) {
      const __m512bh row = pairs(x + r * inputs + k);
      for (int64_t n = 0; n < N; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], row, w[n]);
    }
  }
  if (whole < inputs) {
    for (int64_t n = 0; n < N; n++) w[n] = first_pairs(weight + n * inputs + whole, inputs - whole);
    for (int64_t r = 0; r < R; r++) {
      const __m512bh row = first_pairs(x + r * inputs + whole, inputs - whole);
      for (int64_t n = 0; n < N; n++) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], row, w[n]);
    }
  }
  for (int64_t r = 0; r < R; r++) store(sums[r], out + r * outputs);
}

#else

constexpr int64_t ROWS = 2;
constexpr int64_t LANES = 16;

static inline float wide(uint16_t number) {
  const uint32_t bits = uint32_t(number) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <int64_t R, int64_t N>
static void tile(const uint16_t* x, const uint16_t* weight, float* out, int64_t inputs, int64_t outputs) {
  for (int64_t n = 0; n < N; n++) {
    float sums[R][LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES)
      for (int64_t r = 0; r < R; r++)
        for (int64_t l = 0; l < LANES; l++)
          sums[r][l] += wide(x[r * inputs + k + l]) * wide(weight[n * inputs + k + l]);
    for (int64_t r = 0; r < R; r++) {
      float sum = 0;
      for (int64_t l = 0; l < LANES; l++) sum += sums[r][l];
      for (int64_t at = k; at < inputs; at++) sum += wide(x[r * inputs + at]) * wide(weight[n * inputs + at]);
      out[r * outputs + n] = sum;
    }
  }
}

#endif

template <int64_t R, int64_t N>
static void rest(const uint16_t* x, const uint16_t* weight, float* out, int64_t rows, int64_t inputs,
                 int64_t outputs) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<R, N>(x, weight, out, inputs, outputs);
    else
      rest<R - 1, N>(x, weight, out, rows, inputs, outputs);
  }
}

template <int64_t N>
static void column(const uint16_t* x, const uint16_t* weight, float* out, int64_t rows, int64_t inputs,
                   int64_t outputs) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * inputs, out += ROWS * outputs)
    tile<ROWS, N>(x, weight, out, inputs, outputs);
  rest<ROWS - 1, N>(x, weight, out, rows, inputs, outputs);
}

// x [rows, inputs], weight [outputs, inputs] -> out [rows, outputs]
extern "C" void wide_product(const uint16_t* x, const uint16_t* weight, float* out, int64_t rows,
                             int64_t inputs, int64_t outputs, int64_t threads) {
  const int64_t whole = outputs / OUTPUTS;
  for (int64_t first = 0; first < rows; first += TOGETHER) {
    const int64_t here = rows - first < TOGETHER ? rows - first : TOGETHER;
    const uint16_t* mine = x + first * inputs;
    float* results = out + first * outputs;
#pragma omp parallel for num_threads(threads) if (threads > 1 && outputs * inputs >= SERIAL)
    for (int64_t block = 0; block < whole; block++) {
      const int64_t n = block * OUTPUTS;
      column<OUTPUTS>(mine, weight + n * inputs, results + n, here, inputs, outputs);
    }
    for (int64_t n = whole * OUTPUTS; n < outputs; n++)
      column<1>(mine, weight + n * inputs, results + n, here, inputs, outputs);
  }
}

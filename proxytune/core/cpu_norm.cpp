// RMS norm of rows of float32 numbers on the CPU, in one call: torch's own is a chain of six operations.

#include <cmath>
#include <cstdint>

constexpr int64_t SERIAL = 1 << 16;  // numbers below which starting the other threads costs more than it gains

extern "C" void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t size, float eps,
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

// Attention of ragged rows over the compact slots of a KV cache, on the CPU: decode, verification, short prefill.
//
// Compiled on the machine that runs it and called by cpu_attention.py, which says what the fields of Call mean.
// One pass per segment (the new tokens of one row) and KV head writes the new keys and values into the row's slot
// and, block by block, reads every key and value that the tokens see once for all of them and for all query heads
// of the group. Softmax is kept as a running maximum and sum, so nothing of the size of the scores is stored.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

constexpr int BLOCK = 32;  // keys per pass; with their values they stay in the first-level cache
constexpr int WIDE = 64;   // numbers of a head that are summed in registers
constexpr int NARROW = 16;

struct Call {
  int64_t heads, kv_heads, key_size, value_size;
  int64_t segments;
  const int64_t *rows, *starts, *counts, *lengths;  // [segments]
  const void *query, *key, *value;                  // [heads, tokens, size] with these strides, in numbers
  int64_t query_head, query_token, key_head, key_token, value_head, value_token;
  void *keys, *values;  // [slots, kv_heads, slot_length, size]
  int64_t slot_length;
  void *out;  // [tokens, heads, value_size]
  double scaling;
  double softcap;     // 0: none
  int64_t window;     // 0: none
  const void *sinks;  // [heads], null: none
  int64_t most;       // segments with more tokens are written and not attended
  int64_t threads;
};

// bfloat16 is stored and read, never computed with.
struct bfloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &wide, sizeof number);
    return number;
  }
  explicit bfloat16(float number) {
    uint32_t wide;
    std::memcpy(&wide, &number, sizeof wide);
    const uint32_t even = wide + 0x7fff + ((wide >> 16) & 1);  // round to nearest, ties to even
    bits = number == number ? uint16_t(even >> 16) : uint16_t(0x7fc0);
  }
};

// exp(x) for x <= 0, within 1e-7 of it; written out because a call of the library's is not vectorised.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;  // NaN stays NaN
  const float n = std::nearbyint(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f;  // ln 2 in two parts
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}
inline double exp_of(double x) { return std::exp(x); }

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
template <class T>
using Vector __attribute__((vector_size(REGISTER))) = T;
template <class T>
constexpr int LANES = REGISTER / sizeof(T);

template <class T, class S>
inline Vector<T> load(const S *from) {
  Vector<T> found;
  if constexpr (sizeof(T) == sizeof(S))
    std::memcpy(&found, from, sizeof found);
  else
    for (int lane = 0; lane < LANES<T>; ++lane) found[lane] = T(from[lane]);
  return found;
}

// Two vectors, whose groups of `width` lanes each belong to another sum, -> one with groups of both in turn, every
// group the sum of two.
template <int width, class T, int... lane>
inline Vector<T> fold(Vector<T> a, Vector<T> b, std::integer_sequence<int, lane...>) {
  constexpr int all = LANES<T>, half = all / 2;
  return __builtin_shufflevector(a, b, (lane / width % 2 * all + lane / (2 * width) * width + lane % width)...) +
         __builtin_shufflevector(a, b, (lane / width % 2 * all + lane / (2 * width) * width + lane % width + half)...);
}

// LANES vectors -> one vector of their sums.
template <int width, class T>
inline Vector<T> sums(Vector<T> *parts) {
  if constexpr (width == LANES<T>) {
    return parts[0];
  } else {
    for (int i = 0; i < LANES<T> / width / 2; ++i)
      parts[i] = fold<width, T>(parts[2 * i], parts[2 * i + 1], std::make_integer_sequence<int, LANES<T>>());
    return sums<2 * width, T>(parts);
  }
}

// scores [count] += query . keys, over VECTORS * LANES numbers of every key.
template <int VECTORS, class T, class S>
inline void score_of(T *scores, const T *query, const S *keys, int64_t stride, int64_t count) {
  Vector<T> q[VECTORS];
  for (int i = 0; i < VECTORS; ++i) q[i] = load<T>(query + i * LANES<T>);
  const auto product = [&](const S *key) {
    Vector<T> sum = q[0] * load<T>(key);
    for (int i = 1; i < VECTORS; ++i) sum += q[i] * load<T>(key + i * LANES<T>);
    return sum;
  };
  int64_t j = 0;
  for (; j + LANES<T> <= count; j += LANES<T>) {
    Vector<T> parts[LANES<T>];
#pragma GCC unroll 16
    for (int i = 0; i < LANES<T>; ++i) parts[i] = product(keys + (j + i) * stride);
    const Vector<T> found = load<T>(scores + j) + sums<1, T>(parts);
    std::memcpy(scores + j, &found, sizeof found);
  }
  for (; j < count; ++j) {
    const Vector<T> part = product(keys + j * stride);
    for (int lane = 0; lane < LANES<T>; ++lane) scores[j] += part[lane];
  }
}

// scores [count] = query . keys.
template <class T, class S>
inline void score(T *scores, const T *query, const S *keys, int64_t size, int64_t count) {
  constexpr int lanes = LANES<T>;
  std::fill(scores, scores + count, T(0));
  int64_t d = 0;
  for (; d + 4 * lanes <= size; d += 4 * lanes) score_of<4>(scores, query + d, keys + d, size, count);
  for (; d + lanes <= size; d += lanes) score_of<1>(scores, query + d, keys + d, size, count);
  for (; d < size; ++d)
    for (int64_t j = 0; j < count; ++j) scores[j] += query[d] * T(keys[j * size + d]);
}

template <int N, class T, class S>
inline void add_of(T *result, T fade, const T *weights, const S *values, int64_t stride, int64_t count) {
  T sum[N];
#pragma omp simd
  for (int d = 0; d < N; ++d) sum[d] = result[d] * fade;
  for (int64_t j = 0; j < count; ++j) {
    const T weight = weights[j];
    const S *value = values + j * stride;
#pragma omp simd
    for (int d = 0; d < N; ++d) sum[d] += weight * T(value[d]);
  }
#pragma omp simd
  for (int d = 0; d < N; ++d) result[d] = sum[d];
}

// result [size] = result * fade + the weighted sum of `count` values.
template <class T, class S>
inline void add(T *result, T fade, const T *weights, const S *values, int64_t size, int64_t count) {
  int64_t d = 0;
  for (; d + WIDE <= size; d += WIDE) add_of<WIDE>(result + d, fade, weights, values + d, size, count);
  for (; d + NARROW <= size; d += NARROW) add_of<NARROW>(result + d, fade, weights, values + d, size, count);
  for (; d < size; ++d) add_of<1>(result + d, fade, weights, values + d, size, count);
}

// Into the second-level cache; nothing for a negative count. Inlined by force: GCC takes a function that does
// nothing else for one without effect.
template <class S>
[[gnu::always_inline]] inline void prefetch(const S *from, int64_t count) {
  const char *bytes = (const char *)from;
  for (int64_t at = 0; at < count * int64_t(sizeof(S)); at += 64) __builtin_prefetch(bytes + at, 0, 1);
}

// The first key that the token at a position sees.
inline int64_t first_seen(const Call &c, int64_t at) {
  return c.window ? std::max<int64_t>(0, at + 1 - c.window) : 0;
}

// One unit of work: a segment and a KV head.
template <class S>
struct Part {
  int64_t segment, kv_head, count, length, first;  // first: the first key that any of its tokens sees
  S *keys, *values;                                // the row's slot

  Part(const Call &c, int64_t number) : segment(number / c.kv_heads), kv_head(number % c.kv_heads) {
    count = c.counts[segment];
    length = c.lengths[segment];
    first = first_seen(c, length - count);
    const int64_t place = (c.rows[segment] * c.kv_heads + kv_head) * c.slot_length;
    keys = (S *)c.keys + place * c.key_size;
    values = (S *)c.values + place * c.value_size;
  }
  // Bring a block nearer, or as much of it as there is.
  [[gnu::always_inline]] void fetch(const Call &c, int64_t from) const {
    const int64_t block = std::min<int64_t>(BLOCK, length - from);
    prefetch(keys + from * c.key_size, block * c.key_size);
    prefetch(values + from * c.value_size, block * c.value_size);
  }
};

// Queries of one segment and KV head, [query heads of the group * new tokens] of everything.
template <class T>
struct Tile {
  T *query, *result, *best, *total;

  Tile(std::vector<T> &room, int64_t many, int64_t key_size, int64_t value_size) {
    room.resize(many * (key_size + value_size + 2));
    query = room.data();
    result = query + many * key_size;
    best = result + many * value_size;
    total = best + many;
    std::fill(result, best, T(0));
  }
};

// Query m against keys [from, to) of a block, all of which it sees.
template <class T, class S>
inline void look(const Call &c, Tile<T> &tile, int64_t m, const S *keys, const S *values, int64_t from, int64_t to) {
  const int64_t count = to - from;
  T scores[BLOCK];
  score(scores, tile.query + m * c.key_size, keys + from * c.key_size, c.key_size, count);
  if (c.softcap > 0)
    for (int64_t j = 0; j < count; ++j) scores[j] = std::tanh(scores[j] / T(c.softcap)) * T(c.softcap);
  T best = tile.best[m], sum = 0;
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < count; ++j) best = scores[j] > best ? scores[j] : best;
  const T fade = exp_of(tile.best[m] - best);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    scores[j] = exp_of(scores[j] - best);
    sum += scores[j];
  }
  tile.best[m] = best;
  tile.total[m] = tile.total[m] * fade + sum;
  add(tile.result + m * c.value_size, fade, scores, values + from * c.value_size, c.value_size, count);
}

template <class S>
void write(const Call &c, const Part<S> &part) {
  const int64_t start = c.starts[part.segment], old = part.length - part.count;
  for (int64_t t = 0; t < part.count; ++t) {
    const S *key = (const S *)c.key + part.kv_head * c.key_head + (start + t) * c.key_token;
    const S *value = (const S *)c.value + part.kv_head * c.value_head + (start + t) * c.value_token;
    std::memcpy((void *)(part.keys + (old + t) * c.key_size), key, sizeof(S) * c.key_size);
    std::memcpy((void *)(part.values + (old + t) * c.value_size), value, sizeof(S) * c.value_size);
  }
}

// `next`: the part whose keys are brought nearer while the last block is worked on; null: none.
template <class T, class S>
void attend(const Call &c, const Part<S> &part, const Part<S> *next, std::vector<T> &room) {
  const int64_t group = c.heads / c.kv_heads, count = part.count, start = c.starts[part.segment];
  const int64_t old = part.length - count;
  const int64_t many = group * count;
  Tile<T> tile(room, many, c.key_size, c.value_size);
  for (int64_t m = 0; m < many; ++m) {
    const int64_t head = part.kv_head * group + m / count, token = start + m % count;
    const S *query = (const S *)c.query + head * c.query_head + token * c.query_token;
    for (int64_t d = 0; d < c.key_size; ++d) tile.query[m * c.key_size + d] = T(query[d]) * T(c.scaling);
    // a sink is one more score, without a value; the lowest number in its place fades to nothing
    tile.best[m] = c.sinks ? T(((const S *)c.sinks)[head]) : T(-1e30);
    tile.total[m] = c.sinks ? T(1) : T(0);
  }
  for (int64_t from = part.first; from < part.length; from += BLOCK) {
    if (from + BLOCK < part.length)
      part.fetch(c, from + BLOCK);
    else if (next)
      next->fetch(c, next->first);
    for (int64_t m = 0; m < many; ++m) {
      const int64_t at = old + m % count;  // the token's position: it sees keys up to its own
      const int64_t low = std::max(from, first_seen(c, at)), high = std::min(from + BLOCK, at + 1);
      if (low < high) look(c, tile, m, part.keys, part.values, low, high);
    }
  }
  for (int64_t m = 0; m < many; ++m) {
    const int64_t head = part.kv_head * group + m / count, token = start + m % count;
    S *out = (S *)c.out + (token * c.heads + head) * c.value_size;
    const T scale = T(1) / tile.total[m];
    for (int64_t d = 0; d < c.value_size; ++d) out[d] = S(tile.result[m * c.value_size + d] * scale);
  }
}

template <class T, class S>
void run(const Call &c) {
  const int64_t parts = c.segments * c.kv_heads;
  const int chunk = int(std::min<int64_t>(16, 1 + parts / (4 * c.threads)));  // in a row: the next one is known
#pragma omp parallel num_threads(c.threads)
  {
    std::vector<T> room;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t number = 0; number < parts; ++number) {
      const Part<S> part(c, number), next(c, std::min(number + 1, parts - 1));
      write(c, part);
      if (part.count <= c.most) attend(c, part, number + 1 < parts ? &next : nullptr, room);
    }
  }
}

}  // namespace

extern "C" {
void attend_float32(const Call *call) { run<float, float>(*call); }
void attend_float64(const Call *call) { run<double, double>(*call); }
void attend_bfloat16(const Call *call) { run<float, bfloat16>(*call); }
}

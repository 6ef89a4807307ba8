// Causal ALiBi attention in fp32 and its gradient, for CPUs: attention._chunked without a T x T array in memory.
//
// A task is one head of one row of the batch, so its result does not depend on the number of threads. A task computes
// the scores of ROWS queries and KEYS keys at once, and corrects the softmax when larger scores come (FlashAttention-2,
// Dao, arXiv 2307.08691, algorithms 1 and 2). For scores, the lanes of a vector are keys, so the keys are transposed.
// For sums over keys, the lanes are the head's channels.
//
// Shapes: q, k, v, o and their gradients [B, T, H, K], segments [B, T], log-sums of exponentials [B, H, T].

#include "common.h"

namespace {

constexpr int KEYS = 256;        // keys whose scores are in memory at once
constexpr int WIDE = 2 * LANES;  // lanes of two vectors, which are computed side by side

struct Shape {
  int64_t B, T, H, K;

  int64_t stride() const { return H * K; }  // floats from a head's token to its next token
  int64_t first(int64_t task) const { return task / H * T * H * K + task % H * K; }
  int64_t padded() const { return (T + WIDE - 1) / WIDE * WIDE; }
};

// The tokens of one head, [padded T, K], and where needed their transpose, [K, padded T].
struct Head {
  std::vector<float> rows, transposed;
  int64_t K = 0, length = 0;

  void read(const Shape& s, const float* from, bool transpose, float scale = 1.f) {
    K = s.K, length = s.padded();
    rows.resize(length * K);
    for (int64_t t = 0; t < s.T; t++)
      for (int64_t k = 0; k < K; k++) rows[t * K + k] = from[t * s.stride() + k] * scale;
    std::fill(rows.begin() + s.T * K, rows.end(), 0.f);
    if (!transpose) return;
    transposed.resize(K * length);
    for (int64_t t = 0; t < length; t++)
      for (int64_t k = 0; k < K; k++) transposed[k * length + t] = rows[t * K + k];
  }

  void clear(const Shape& s) {
    K = s.K, length = s.padded();
    rows.assign(length * K, 0.f);
  }

  void write(const Shape& s, float* to, float scale = 1.f) const {
    for (int64_t t = 0; t < s.T; t++)
      for (int64_t k = 0; k < K; k++) to[t * s.stride() + k] = rows[t * K + k] * scale;
  }
};

// out[r, j - start] = sum over k of a[r, k] b[j, k], for ROWS rows of `a` and keys from `start` up to `stop`.
inline void scores(const float* a, const Head& b, int64_t start, int64_t stop, float* out) {
  for (int64_t j = start; j < stop; j += WIDE) {
    Floats y[ROWS][2] = {};
    for (int64_t k = 0; k < b.K; k++) {
      const float* column = &b.transposed[k * b.length + j];
      const Floats low = load<Floats>(column), high = load<Floats>(column + LANES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) y[r][0] += a[r * b.K + k] * low, y[r][1] += a[r * b.K + k] * high;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      store(out + r * KEYS + j - start, y[r][0]);
      store(out + r * KEYS + j - start + LANES, y[r][1]);
    }
  }
}

// sum[r, k] += sum over j of p[r, j - start] b[j, k], for N vectors from k on.
template <int N>
inline void add_rows(const float* p, const Head& b, int64_t start, int64_t stop, int64_t k, float* sum) {
  Floats y[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < N; n++) y[r][n] = load<Floats>(sum + r * b.K + k + n * LANES);
  for (int64_t j = start; j < stop; j++) {
    Floats value[N];
    for (int n = 0; n < N; n++) value[n] = load<Floats>(&b.rows[j * b.K + k + n * LANES]);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
      for (int n = 0; n < N; n++) y[r][n] += p[r * KEYS + j - start] * value[n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < N; n++) store(sum + r * b.K + k + n * LANES, y[r][n]);
}

// to[j, k] += sum over r of p[r, j - start] a[r, k], for N vectors from k on.
template <int N>
inline void add_transposed(const float* p, const float* a, int64_t start, int64_t stop, int64_t k, Head& to) {
  Floats x[ROWS][N];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
    for (int n = 0; n < N; n++) x[r][n] = load<Floats>(a + r * to.K + k + n * LANES);
  for (int64_t j = start; j < stop; j++) {
    for (int n = 0; n < N; n++) {
      float* place = &to.rows[j * to.K + k + n * LANES];
      Floats y = load<Floats>(place);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) y += p[r * KEYS + j - start] * x[r][n];
      store(place, y);
    }
  }
}

// Calls each(number of vectors, first channel) for all vectors of a head, two at a time where possible.
template <typename Each>
inline void across(int64_t K, Each each) {
  int64_t k = 0;
  for (; k + WIDE <= K; k += WIDE) each(std::integral_constant<int, 2>(), k);
  for (; k < K; k += LANES) each(std::integral_constant<int, 1>(), k);
}

// exp(x), exactly 0 for masked scores; NaN stays NaN.
inline Floats share(Floats x) { return x < -87.f ? Floats{} : exp(x); }

struct Attention {
  Shape s;
  const float *q, *k, *v, *slopes;
  const int32_t* segments;

  // Adds ALiBi's bias to a block of scores and masks keys that a query must not see. Rows beyond T see as row T - 1.
  void bias(int64_t task, int64_t first, int64_t start, int64_t stop, float* p) const {
    const float slope = slopes[task % s.H];
    const int32_t* segment = segments + task / s.H * s.T;
    Floats lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = float(l);
    for (int r = 0; r < ROWS; r++) {
      const int64_t i = std::min(first + r, s.T - 1);
      for (int64_t j = start; j < stop; j += LANES) {
        float* place = p + r * KEYS + j - start;
        Floats x = load<Floats>(place) + slope * (lanes + float(j - i));
        Ints own;
        if (j + LANES <= s.T) {
          own = load<Ints>(segment + j);
        } else {
          for (int l = 0; l < LANES; l++) own[l] = j + l < s.T ? segment[j + l] : segment[i] + 1;
        }
        const Ints seen = (own == segment[i]) & (lanes <= float(i - j));
        store(place, seen ? x : Floats{} + MASKED);
      }
    }
  }

  // Calls each(start, stop) for the blocks of keys that ROWS queries from `first` on may see.
  template <typename Each>
  void blocks(int64_t task, int64_t first, Each each) const {
    const int32_t* segment = segments + task / s.H * s.T;
    const int64_t end = std::min(first + ROWS, s.T);
    // Documents are packed one after another: no query needs the keys before the first query's document, which are
    // skipped. If numbers come in another order, the search below keeps every key that a query needs.
    int64_t from = first;
    while (from > 0 && segment[from - 1] == segment[first]) from--;
    for (int64_t j = 0; j < from; j++)
      for (int64_t i = first; i < end; i++)
        if (segment[j] == segment[i]) from = j;
    for (int64_t start = from / WIDE * WIDE; start < end; start += KEYS)
      each(start, std::min((end + WIDE - 1) / WIDE * WIDE, start + KEYS));
  }
};

inline float sum_of(Floats x) {
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += x[l];
  return sum;
}

struct Forward : Attention {
  float *o, *log_sums;

  int phases() const { return 1; }
  int chunks(int) const { return int(s.B * s.H); }

  void run(int, int task) {
    thread_local Head queries, keys, values, out;
    thread_local std::vector<float> p;
    p.resize(ROWS * KEYS);
    queries.read(s, q + s.first(task), false, 1.f / std::sqrt(float(s.K)));
    queries.rows.resize((s.padded() + ROWS) * s.K, 0.f);
    keys.read(s, k + s.first(task), true);
    values.read(s, v + s.first(task), false);
    out.clear(s);
    out.rows.resize((s.padded() + ROWS) * s.K, 0.f);
    for (int64_t first = 0; first < s.T; first += ROWS) {
      float top[ROWS], total[ROWS] = {};
      float* sum = &out.rows[first * s.K];
      std::fill(top, top + ROWS, MASKED);
      blocks(task, first, [&](int64_t start, int64_t stop) {
        scores(&queries.rows[first * s.K], keys, start, stop, p.data());
        bias(task, first, start, stop, p.data());
        for (int r = 0; r < ROWS; r++) {
          float* row = &p[r * KEYS];
          Floats highest = Floats{} + top[r], count{};
          for (int64_t j = 0; j < stop - start; j += LANES) {
            const Floats x = load<Floats>(row + j);
            highest = x > highest ? x : highest;
          }
          float higher = highest[0];
          for (int l = 1; l < LANES; l++) higher = std::max(higher, highest[l]);
          const float decay = std::exp(top[r] - higher), seen = higher > MASKED / 2 ? 1.f : 0.f;
          for (int64_t j = 0; j < stop - start; j += LANES) {
            const Floats e = share(load<Floats>(row + j) - higher) * seen;
            store(row + j, e);
            count += e;
          }
          total[r] = total[r] * decay + sum_of(count), top[r] = higher;
          for (int64_t k = 0; k < s.K; k += LANES) store(sum + r * s.K + k, load<Floats>(sum + r * s.K + k) * decay);
        }
        across(s.K, [&](auto n, int64_t k) { add_rows<decltype(n)::value>(p.data(), values, start, stop, k, sum); });
      });
      for (int r = 0; r < ROWS && first + r < s.T; r++) {
        for (int64_t k = 0; k < s.K; k += LANES) store(sum + r * s.K + k, load<Floats>(sum + r * s.K + k) / total[r]);
        log_sums[task * s.T + first + r] = top[r] + std::log(total[r]);
      }
    }
    out.write(s, o + s.first(task));
  }
};

struct Backward : Attention {
  const float *o, *log_sums, *g;  // g: the gradient of the output
  float *dq, *dk, *dv;

  int phases() const { return 1; }
  int chunks(int) const { return int(s.B * s.H); }

  void run(int, int task) {
    thread_local Head queries, keys, values, grads, outs, of_queries, of_keys, of_values;
    thread_local std::vector<float> p, dp;
    p.resize(ROWS * KEYS), dp.resize(ROWS * KEYS);
    const float scale = 1.f / std::sqrt(float(s.K));
    queries.read(s, q + s.first(task), false, scale);
    keys.read(s, k + s.first(task), true);
    values.read(s, v + s.first(task), true);
    grads.read(s, g + s.first(task), false);
    outs.read(s, o + s.first(task), false);
    for (Head* head : {&of_queries, &of_keys, &of_values}) head->clear(s);
    for (Head* head : {&queries, &grads, &of_queries}) head->rows.resize((s.padded() + ROWS) * s.K, 0.f);
    for (int64_t first = 0; first < s.T; first += ROWS) {
      float log_sum[ROWS], own[ROWS];  // own: the mean of the keys' gradients, which the softmax subtracts
      for (int r = 0; r < ROWS; r++) {
        const int64_t i = std::min(first + r, s.T - 1);
        log_sum[r] = first + r < s.T ? log_sums[task * s.T + i] : 1e30f;  // rows beyond T contribute nothing
        Floats y{};
        for (int64_t k = 0; k < s.K; k += LANES)
          y += load<Floats>(&grads.rows[i * s.K + k]) * load<Floats>(&outs.rows[i * s.K + k]);
        own[r] = sum_of(y);
      }
      const float *query = &queries.rows[first * s.K], *grad = &grads.rows[first * s.K];
      blocks(task, first, [&](int64_t start, int64_t stop) {
        scores(query, keys, start, stop, p.data());
        bias(task, first, start, stop, p.data());
        scores(grad, values, start, stop, dp.data());
        for (int r = 0; r < ROWS; r++) {
          for (int64_t j = r * KEYS; j < r * KEYS + stop - start; j += LANES) {
            const Floats e = share(load<Floats>(&p[j]) - log_sum[r]);
            store(&p[j], e);
            store(&dp[j], e * (load<Floats>(&dp[j]) - own[r]));
          }
        }
        across(s.K, [&](auto n, int64_t k) {
          constexpr int N = decltype(n)::value;
          add_transposed<N>(p.data(), grad, start, stop, k, of_values);
          add_transposed<N>(dp.data(), query, start, stop, k, of_keys);
          add_rows<N>(dp.data(), keys, start, stop, k, &of_queries.rows[first * s.K]);
        });
      });
    }
    of_queries.write(s, dq + s.first(task), scale);
    of_keys.write(s, dk + s.first(task));  // the queries were scaled already
    of_values.write(s, dv + s.first(task));
  }
};

using Floats32 = ffi::Buffer<ffi::DataType::F32>;
using Ints32 = ffi::Buffer<ffi::DataType::S32>;

template <typename Job>
std::shared_ptr<Job> job_of(Floats32 q, Floats32 k, Floats32 v, Ints32 segments, Floats32 slopes) {
  auto job = std::make_shared<Job>();
  const auto dims = q.dimensions();
  job->s = {dims[0], dims[1], dims[2], dims[3]};
  job->q = q.typed_data(), job->k = k.typed_data(), job->v = v.typed_data();
  job->segments = segments.typed_data(), job->slopes = slopes.typed_data();
  return job;
}

ffi::Error attend(ffi::ThreadPool pool, Floats32 q, Floats32 k, Floats32 v, Ints32 segments, Floats32 slopes,
                  ffi::Result<Floats32> o, ffi::Result<Floats32> log_sums) {
  auto job = job_of<Forward>(q, k, v, segments, slopes);
  job->o = o->typed_data(), job->log_sums = log_sums->typed_data();
  run_on_pool(pool, job);
  return ffi::Error::Success();
}

ffi::Error attend_gradient(ffi::ThreadPool pool, Floats32 q, Floats32 k, Floats32 v, Ints32 segments, Floats32 slopes,
                           Floats32 o, Floats32 log_sums, Floats32 g, ffi::Result<Floats32> dq,
                           ffi::Result<Floats32> dk, ffi::Result<Floats32> dv) {
  auto job = job_of<Backward>(q, k, v, segments, slopes);
  job->o = o.typed_data(), job->log_sums = log_sums.typed_data(), job->g = g.typed_data();
  job->dq = dq->typed_data(), job->dk = dk->typed_data(), job->dv = dv->typed_data();
  run_on_pool(pool, job);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(lowrank_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Ints32>()
                                  .Arg<Floats32>()
                                  .Ret<Floats32>()
                                  .Ret<Floats32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(lowrank_attend_gradient, attend_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Ints32>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Arg<Floats32>()
                                  .Ret<Floats32>()
                                  .Ret<Floats32>()
                                  .Ret<Floats32>());

// Code that the kernels share: vectors of floats, and work for several of XLA's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {  // a copy for each file

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int ROWS = LANES == 16 ? 8 : 2;  // rows whose sums fit in the vector registers
constexpr int THREADS = 8;                 // more threads wait for each other longer than they help
constexpr float MASKED = -1e30f;           // the score of a key that a query must not see

template <typename T, int N = LANES>
using Vector __attribute__((vector_size(sizeof(T) * N))) = T;
typedef Vector<float> Floats;
typedef Vector<int32_t> Ints;
typedef Vector<uint32_t> Words;

template <typename T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

// exp(x) to 2 units in the last place: 2^n exp(r) with |r| <= ln(2) / 2 and the Taylor series to the seventh power.
inline Floats exp(Floats x) {
  const float MAGIC = 12582912.f;  // 1.5 x 2^23: adding it rounds to a whole number, in the low bits of the sum
  x = x < -87.f ? Floats{} - 87.f : x;
  x = x > 87.f ? Floats{} + 87.f : x;
  Floats shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.f / 5040 + Floats{};
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) p = p * r + c;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Lanes with the bit HALF come from b, the others from a. Each is added to the lane whose bit HALF differs.
template <int HALF, size_t... l>
inline Floats fold(Floats a, Floats b, std::index_sequence<l...>) {
  return __builtin_shufflevector(a, b, (l & HALF ? LANES + l : l)...) +
         __builtin_shufflevector(a, b, (l & HALF ? LANES + (l ^ HALF) : l ^ HALF)...);
}

// Lane j of the result is the sum of the lanes of x[j].
template <int HALF = LANES / 2>
inline Floats sums(Floats* x) {
  for (int i = 0; i < HALF; i++) x[i] = fold<HALF>(x[i], x[i + HALF], std::make_index_sequence<LANES>());
  if constexpr (HALF > 1) return sums<HALF / 2>(x);
  return x[0];
}

// Work in phases. Any thread may take a phase's chunks, and a phase begins when the previous one is done. A thread that
// starts late sees the earlier phases done, so the team never waits for a thread that was not scheduled.
class Team {
 public:
  explicit Team(int phases) : phases_(phases), all_(phases) {}

  // Calls run(phase, chunk) for all chunks(phase) of each phase, in order.
  template <typename Chunks, typename Run>
  void work(const Chunks& chunks, const Run& run) {
    for (int p = 0; p < phases_; p++) {
      Phase& phase = all_[p];
      const int count = chunks(p);
      for (int c; (c = phase.next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        run(p, c);
        phase.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < count;) {
        if (++spins > 20000) std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int> next{0}, done{0};
  };
  const int phases_;
  std::vector<Phase> all_;
};

// Runs `job` (with members phases, chunks and run) on the calling thread and on free threads of XLA.
template <typename Job>
void run_on_pool(ffi::ThreadPool& pool, std::shared_ptr<Job> job) {
  auto team = std::make_shared<Team>(job->phases());
  auto join = [job, team] {
    team->work([&](int p) { return job->chunks(p); }, [&](int p, int c) { job->run(p, c); });
  };
  const int64_t threads = std::min<int64_t>(pool.num_threads(), THREADS);
  for (int64_t i = 1; i < threads; i++) pool.Schedule(std::function<void()>(join));
  join();
}

}  // namespace

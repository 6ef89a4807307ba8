// What the C++ of this package shares: vectors of floats, and work that XLA's threads share out.
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

namespace {  // each file has its own

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int ROWS = LANES == 16 ? 8 : 2;  // whose sums fit in the vector registers
constexpr int THREADS = 8;  // more wait for each other longer than they help

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

// exp(x) to 2 units in the last place, by 2^n exp(r) with |r| <= ln(2) / 2 and the series of exp to the seventh power.
inline Floats exp(Floats x) {
  const float MAGIC = 12582912.f;  // 1.5 x 2^23: adding it rounds to a whole number, which is then in the low bits
  x = x < -87.f ? Floats{} - 87.f : x;
  x = x > 87.f ? Floats{} + 87.f : x;
  Floats shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = 1.f / 5040 + Floats{};
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) p = p * r + c;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Lanes that have the bit HALF are b's, the others a's, each added to the lane with the other value of that bit.
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

// Work in phases, each of chunks that any thread may take; a phase begins when the one before is done. A thread that
// comes late finds the phases before done, so nobody waits for one that was never scheduled.
class Team {
 public:
  explicit Team(int phases) : phases_(phases), all_(phases) {}

  // chunks(phase) and run(phase, chunk), with the phases in order.
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

// Runs `job` (with members phases, chunks and run) on the calling thread and those of XLA's that are free.
template <typename Job>
void together(ffi::ThreadPool& pool, std::shared_ptr<Job> job) {
  auto team = std::make_shared<Team>(job->phases());
  auto join = [job, team] {
    team->work([&](int p) { return job->chunks(p); }, [&](int p, int c) { job->run(p, c); });
  };
  for (int64_t i = 1; i < std::min<int64_t>(pool.num_threads(), THREADS); i++) pool.Schedule(std::function<void()>(join));
  join();
}

}  // namespace

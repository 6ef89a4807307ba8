// All blocks of the network in one call, for new tokens of a few sequences over a cache of latents: decoder.read for
// CPUs without XLA.
//
// With few rows, a product waits for the bytes of the weights. XLA's CPU backend first widens 16 and 8 bit weights in
// memory, splits each of a step's hundred small operations over its threads, and copies every slice. This file widens
// weights in registers, computes everything in fp32, and keeps its threads together through all layers.
//
// Weights lie in panels of COLUMNS outputs, [panels, in, COLUMNS], so that a panel is read once from front to back
// while its sums stay in registers: y[b][column] += x[b][i] * w[i][column].
//
// A row is a token: row b * T + t is new token t of sequence b.

#include "common.h"

namespace {

constexpr int COLUMNS = 32, VECTORS = COLUMNS / LANES;
constexpr int HEADS = 4;     // heads that a thread computes side by side
constexpr int BLOCK = 128;   // keys whose scores are in memory at once; divides the size of the cache
constexpr int AHEAD = 4096;  // bytes of weights that are prefetched
constexpr float EPS = 1e-6f;

// The types of weights; `widen` turns vector v of a panel's row into floats.
struct BFloat16 {
  uint16_t upper;  // half of a float
};
struct Int4 {
  uint8_t pair;  // column j plus 8 in the lower half, column COLUMNS / 2 + j plus 8 in the upper
};
template <typename W>
constexpr int IN_ROW = std::is_same_v<W, Int4> ? COLUMNS / 2 : COLUMNS;  // elements of a panel's row

inline Floats widen(const float* row, int v) { return load<Floats>(row + v * LANES); }

// Word j has column j in its lower half and column COLUMNS / 2 + j in its upper half: a shift or a mask widens LANES.
inline Floats widen(const BFloat16* row, int v) {
  const int halves = VECTORS / 2;
  const Words words = load<Words>(row + v % halves * 2 * LANES);
  return (Floats)(v < halves ? words << 16 : words & 0xffff0000u);
}

inline Floats widen(const int8_t* row, int v) {
#if defined(__AVX512F__)  // GCC 12 would widen bytes one by one
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(row + v * LANES))));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(row + v * LANES))));
#else
  return __builtin_convertvector(load<Vector<int8_t>>(row + v * LANES), Floats);
#endif
}

inline Floats widen(const Int4* row, int v) {
  const int halves = VECTORS / 2;
  const uint8_t* from = (const uint8_t*)row + v % halves * LANES;
#if defined(__AVX512F__)
  const Ints pairs = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  const Ints pairs = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  const Ints pairs = __builtin_convertvector(load<Vector<uint8_t>>(from), Ints);
#endif
  return __builtin_convertvector(v < halves ? pairs & 15 : pairs >> 4, Floats);
}

int64_t padded(int64_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

// `count` matrices [in, out] as [count, panels, in, COLUMNS]. int8 and int4 weights have scales [count, panels, groups,
// COLUMNS], each for in / groups inputs.
struct Matrix {
  const void* weights = nullptr;
  const float* scales = nullptr;
  ffi::DataType type{};
  int64_t count = 1, panels = 0, in = 0, groups = 1;

  int64_t out() const { return panels * COLUMNS; }

  // y = x w for `rows` rows and the columns of one panel: done(row, column, LANES values).
  template <typename Done>
  void times(const float* x, int64_t stride, int64_t rows, int64_t panel, Done done, int64_t which = 0) const {
    const int64_t place = which * panels + panel;
    switch (type) {
      case ffi::DataType::F32:
        return run((const float*)weights, place, x, stride, rows, panel, done);
      case ffi::DataType::BF16:
        return run((const BFloat16*)weights, place, x, stride, rows, panel, done);
      case ffi::DataType::U8:
        return run((const Int4*)weights, place, x, stride, rows, panel, done);
      default:
        return run((const int8_t*)weights, place, x, stride, rows, panel, done);
    }
  }

 private:
  template <typename W, typename Done>
  void run(const W* w, int64_t place, const float* x, int64_t stride, int64_t rows, int64_t panel, Done& done) const {
    w += place * in * IN_ROW<W>;
    const float* scale = scales ? scales + place * groups * COLUMNS : nullptr;
    int64_t row = 0;
    auto tiles = [&](auto count) {
      constexpr int B = decltype(count)::value;
      for (; row + B <= rows; row += B) {
        tile<B>(w, scale, x + row * stride, stride, [&](int b, int v, Floats y) {
          if (std::is_same_v<W, int8_t>) y *= load<Floats>(scale + v * LANES);
          done(row + b, panel * COLUMNS + v * LANES, y);
        });
      }
    };
    tiles(std::integral_constant<int, ROWS>());
    tiles(std::integral_constant<int, ROWS / 2>());
    if constexpr (ROWS > 4) tiles(std::integral_constant<int, 2>());
    if constexpr (ROWS > 2) tiles(std::integral_constant<int, 1>());
  }

  template <int B, typename W, typename Each>
  inline void tile(const W* w, const float* scale, const float* x, int64_t stride, Each each) const {
    constexpr int APART = B * VECTORS < 8 ? 8 / (B * VECTORS) : 1;  // enough sums to hide the latency of additions
    constexpr bool GROUPED = std::is_same_v<W, Int4>;
    Floats y[APART][B][VECTORS] = {}, step[VECTORS] = {};
    auto add = [&](int64_t i, int apart) {
      // Hardware prefetching stops at the end of a page: 8 rows of 76 million bfloat16 weights took 12.5 ms, not 7.5.
      const char* row = (const char*)(w + i * IN_ROW<W>);
      for (size_t line = 0; line < sizeof(W) * IN_ROW<W>; line += 64) __builtin_prefetch(row + AHEAD + line);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) {
        Floats column = widen(w + i * IN_ROW<W>, v);
        if (GROUPED) column = column * step[v] - 8.f * step[v];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) y[apart][b][v] += column * x[b * stride + i];
      }
    };
    int64_t i = 0;
    for (int64_t group = 0; group < (GROUPED ? groups : 1); group++) {
      const int64_t end = GROUPED ? in / groups * (group + 1) : in;
      for (int v = 0; GROUPED && v < VECTORS; v++) step[v] = load<Floats>(scale + group * COLUMNS + v * LANES);
      for (; i + APART <= end; i += APART) {
#pragma GCC unroll 4
        for (int apart = 0; apart < APART; apart++) add(i + apart, apart);
      }
      for (; i < end; i++) add(i, 0);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) {
        for (int apart = 1; apart < APART; apart++) y[0][b][v] += y[apart][b][v];
        each(b, v, y[0][b][v]);
      }
    }
  }
};

struct Layer {
  Matrix latents, query, k_heads, v_heads, o_down, o_up, mlp_in, gate, up, mlp_out, mlp_last;
};

// The memory of one layer's latents.
struct Latents {
  const float *k, *v;          // cached: [rows, size, R]
  float *window_k, *window_v;  // of tokens that are not cached yet: [B, window, R]
};

struct Settings {
  int64_t heads, rank_q, rank_k, rank_v, head_dim;
  bool absorbed_query, latent_norm, shared;
};

struct Read {
  Settings s;
  Matrix table, table_up;  // table_up.weights is null where the embedding is not factored
  std::vector<Layer> layers;
  std::vector<Latents> latents;
  const float* slopes;
  const int32_t *tokens, *starts;
  int64_t at, row, B, T, D, size, window;
  float* out;

  enum { LATENTS, QUERY, ATTEND, O_DOWN, O_UP, MLP_IN, GATE_UP, MLP_OUT, MLP_LAST, COUNT };
  int64_t rows, x_stride, latent_stride, query_stride, o_stride, od_stride, mid_stride, act_stride, low_stride;
  std::vector<float> x, latent, query, o, od, mid, act, low;

  void prepare() {
    const Layer& l = layers[0];
    rows = B * T;
    auto room = [&](std::vector<float>& buffer, int64_t& stride, int64_t width) {
      stride = padded(width) + LANES;  // no power of two, which would put the rows of a tile into the same cache sets
      buffer.assign(rows * stride, 0.f);
    };
    room(x, x_stride, D);
    room(latent, latent_stride, l.latents.out());
    room(query, query_stride, l.query.out());
    room(o, o_stride, s.heads * s.head_dim + COLUMNS);
    room(od, od_stride, l.o_down.out());
    room(mid, mid_stride, 2 * l.mlp_in.out());
    room(act, act_stride, l.gate.weights ? l.gate.out() : l.mlp_in.out());
    room(low, low_stride, l.mlp_out.out());
  }

  int phases() const { return 1 + COUNT * (int)layers.size(); }

  static int pieces(int64_t panels) { return (int)std::min<int64_t>(panels, 16); }

  int chunks(int phase) const {
    if (!phase) return 1;
    const Layer& l = layers[(phase - 1) / COUNT];
    switch ((phase - 1) % COUNT) {
      case LATENTS: return pieces(l.latents.panels);
      case QUERY: return pieces(l.query.panels);
      case ATTEND: return (int)(rows * ((s.heads + HEADS - 1) / HEADS));
      case O_DOWN: return pieces(l.o_down.panels);
      case O_UP: return pieces(l.o_up.panels);
      case MLP_IN: return pieces(l.mlp_in.panels);
      case GATE_UP: return l.gate.weights ? pieces(l.gate.panels) : 0;
      case MLP_OUT: return pieces(l.mlp_out.panels);
      default: return l.mlp_last.weights ? pieces(l.mlp_last.panels) : 0;
    }
  }

  // Calls each(panel) for the panels of a chunk.
  template <typename Each>
  static void panels(const Matrix& m, int chunk, Each each) {
    const int64_t count = pieces(m.panels);
    for (int64_t p = m.panels * chunk / count; p < m.panels * (chunk + 1) / count; p++) each(p);
  }

  // 1 / sqrt(mean square) of each row.
  void rms(const float* from, int64_t stride, int64_t width, float* scale) const {
    for (int64_t r = 0; r < rows; r++) scale[r] = inverse_rms(from + r * stride, width);
  }

  static float inverse_rms(const float* x, int64_t width) {
    Floats squares{};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += load<Floats>(x + i) * load<Floats>(x + i);
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += squares[l];
    for (; i < width; i++) sum += x[i] * x[i];
    return 1.f / std::sqrt(sum / width + EPS);
  }

  void run(int phase, int chunk) {
    if (!phase) return embed();
    const int n = (phase - 1) / COUNT;
    const Layer& l = layers[n];
    std::vector<float> scale(rows, 1.f);
    // to = scale * from m, or with `add`, to += scale * from m.
    auto product = [&](const Matrix& m, const std::vector<float>& from, int64_t from_stride, std::vector<float>& to,
                       int64_t to_stride, bool add) {
      panels(m, chunk, [&](int64_t p) {
        m.times(from.data(), from_stride, rows, p, [&](int64_t r, int64_t column, Floats y) {
          float* place = &to[r * to_stride + column];
          y *= scale[r];
          store(place, add ? load<Floats>(place) + y : y);
        });
      });
    };
    switch ((phase - 1) % COUNT) {
      case LATENTS:
        rms(x.data(), x_stride, D, scale.data());
        return product(l.latents, x, x_stride, latent, latent_stride, false);
      case QUERY:
        if (!chunk) store_latents(latents[n]);
        if (s.latent_norm) rms(latent.data(), latent_stride, s.rank_q, scale.data());
        return product(l.query, latent, latent_stride, query, query_stride, false);
      case ATTEND:
        return attend(l, latents[n], chunk);
      case O_DOWN:
        return product(l.o_down, o, o_stride, od, od_stride, false);
      case O_UP:
        return product(l.o_up, od, od_stride, x, x_stride, true);
      case MLP_IN:
        rms(x.data(), x_stride, D, scale.data());
        if (!l.gate.weights) return gated(l.mlp_in, l.mlp_in, 1, x.data(), x.data(), x_stride, scale, chunk);
        return panels(l.mlp_in, chunk, [&](int64_t p) {
          for (int half = 0; half < 2; half++) {
            l.mlp_in.times(x.data(), x_stride, rows, p, [&](int64_t r, int64_t column, Floats y) {
              store(&mid[r * mid_stride + half * l.mlp_in.out() + column], y * scale[r]);
            }, half);
          }
        });
      case GATE_UP:
        return gated(l.gate, l.up, 0, mid.data(), mid.data() + l.mlp_in.out(), mid_stride, scale, chunk);
      case MLP_OUT:
        if (l.mlp_last.weights) return product(l.mlp_out, act, act_stride, low, low_stride, false);
        return product(l.mlp_out, act, act_stride, x, x_stride, true);
      default:
        return product(l.mlp_last, low, low_stride, x, x_stride, true);
    }
  }

  void embed() {
    std::vector<float> factor(table.in);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t token = tokens[r];
      float* to = table_up.weights ? factor.data() : &x[r * x_stride];
      for (int64_t i = 0; i < table.in; i++) to[i] = weight_of(token / COLUMNS, i, token % COLUMNS);
      if (table.scales) for (int64_t i = 0; i < table.in; i++) to[i] *= table.scales[token];
      for (int64_t p = 0; p < table_up.panels; p++) {
        table_up.times(factor.data(), 0, 1, p, [&](int64_t, int64_t column, Floats y) {
          store(&x[r * x_stride + column], y);
        });
      }
    }
  }

  float weight_of(int64_t panel, int64_t i, int64_t column) const {
    const int64_t row = (panel * table.in + i) * COLUMNS, half = COLUMNS / 2;
    if (table.type == ffi::DataType::F32) return ((const float*)table.weights)[row + column];
    if (table.type == ffi::DataType::S8) return ((const int8_t*)table.weights)[row + column];
    const uint16_t upper = ((const BFloat16*)table.weights)[row + column % half * 2 + column / half].upper;
    const uint32_t bits = uint32_t(upper) << 16;
    return load<float>(&bits);
  }

  // act = silu(scale * from_gate w_gate) * (scale * from_up w_up), where w_up is matrix `second` of `up`.
  void gated(const Matrix& gate, const Matrix& up, int second, const float* from_gate, const float* from_up,
             int64_t stride, const std::vector<float>& scale, int chunk) {
    panels(gate, chunk, [&](int64_t p) {
      gate.times(from_gate, stride, rows, p, [&](int64_t r, int64_t column, Floats y) {
        y *= scale[r];
        store(&act[r * act_stride + column], y / (1.f + exp(-y)));
      });
      up.times(from_up, stride, rows, p, [&](int64_t r, int64_t column, Floats y) {
        float* place = &act[r * act_stride + column];
        store(place, load<Floats>(place) * y * scale[r]);
      }, second);
    });
  }

  // Writes the new tokens' latents to their window.
  void store_latents(const Latents& l) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t place = r / T * window + at + r % T;
      auto put = [&](const float* from, int64_t width, float* to) {
        const float scale = s.latent_norm ? inverse_rms(from, width) : 1.f;
        for (int64_t i = 0; i < width; i++) to[place * width + i] = from[i] * scale;
      };
      const float* from = &latent[r * latent_stride + s.rank_q];
      put(from, s.rank_k, l.window_k);
      if (!s.shared) put(from + s.rank_k, s.rank_v, l.window_v);
    }
  }

  // The attention of some heads for one row: softmax in one pass over blocks (Milakov & Gimelshein, arXiv 1805.02867).
  struct Average {
    int64_t rank_k, rank_v;
    std::vector<float> query, sum;  // [HEADS, rank]
    float slope[HEADS], top[HEADS], total[HEADS];
    alignas(64) float p[HEADS][BLOCK];

    // Adds n keys, the first of which lies `distance` tokens back.
    void add(const float* k, const float* v, int64_t n, int64_t distance) {
      for (int h = 0; h < HEADS; h++) {
        Floats highest = Floats{} + top[h];
        for (int64_t j = 0; j < n; j += LANES) {
          Floats part[LANES] = {};
          for (int64_t i = 0; i < rank_k; i += LANES) {
            const Floats q = load<Floats>(&query[h * rank_k + i]);
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++) part[l] += q * load<Floats>(k + (j + l) * rank_k + i);
          }
          Floats score = sums(part), far;
          for (int l = 0; l < LANES; l++) far[l] = float(distance - j - l);
          score -= slope[h] * far;
          for (int l = n - j < LANES ? int(n - j) : LANES; l < LANES; l++) score[l] = MASKED;
          store(&p[h][j], score);
          highest = score > highest ? score : highest;
        }
        float higher = highest[0];
        for (int l = 1; l < LANES; l++) higher = std::max(higher, highest[l]);
        const float decay = std::exp(top[h] - higher);
        Floats count{};
        for (int64_t j = 0; j < n; j += LANES) {
          const Floats e = exp(load<Floats>(&p[h][j]) - higher);
          store(&p[h][j], e);
          for (int l = 0; l < LANES && j + l < n; l++) count[l] += e[l];
        }
        total[h] *= decay;
        for (int l = 0; l < LANES; l++) total[h] += count[l];
        top[h] = higher;
        for (int64_t i = 0; i < rank_v; i++) sum[h * rank_v + i] *= decay;
      }
      int64_t i = 0;
      for (; i + 4 * LANES <= rank_v; i += 4 * LANES) mean<4>(v, n, i);
      for (; i + 2 * LANES <= rank_v; i += 2 * LANES) mean<2>(v, n, i);
      for (; i + LANES <= rank_v; i += LANES) mean<1>(v, n, i);
    }

    template <int N>
    void mean(const float* v, int64_t n, int64_t i) {
      Floats y[HEADS][N];
      for (int h = 0; h < HEADS; h++)
        for (int m = 0; m < N; m++) y[h][m] = load<Floats>(&sum[h * rank_v + i + m * LANES]);
      for (int64_t j = 0; j < n; j++) {
#pragma GCC unroll 4
        for (int m = 0; m < N; m++) {
          const Floats value = load<Floats>(v + j * rank_v + i + m * LANES);
#pragma GCC unroll 4
          for (int h = 0; h < HEADS; h++) y[h][m] += p[h][j] * value;
        }
      }
      for (int h = 0; h < HEADS; h++)
        for (int m = 0; m < N; m++) store(&sum[h * rank_v + i + m * LANES], y[h][m]);
    }
  };

  void attend(const Layer& layer, const Latents& l, int chunk) {
    const int64_t groups = (s.heads + HEADS - 1) / HEADS, r = chunk / groups, first = chunk % groups * HEADS;
    const int64_t b = r / T, t = r % T, heads = std::min<int64_t>(HEADS, s.heads - first);
    thread_local Average a;
    a.rank_k = s.rank_k, a.rank_v = s.rank_v;
    a.query.assign(HEADS * padded(s.rank_k), 0.f);
    a.sum.assign(HEADS * padded(s.rank_v), 0.f);
    for (int64_t h = 0; h < HEADS; h++) {
      a.top[h] = MASKED, a.total[h] = 0, a.slope[h] = 0;
      if (h >= heads) continue;
      a.slope[h] = slopes[first + h];
      float* to = &a.query[h * s.rank_k];
      if (s.absorbed_query) {
        std::memcpy(to, &query[r * query_stride + (first + h) * s.rank_k], s.rank_k * sizeof(float));
        continue;
      }
      const float* from = &query[r * query_stride + (first + h) * s.head_dim];
      for (int64_t p = 0; p < layer.k_heads.panels; p++) {
        layer.k_heads.times(from, 0, 1, p, [&](int64_t, int64_t column, Floats y) {
          if (column < s.rank_k) store(to + column, y);
        }, first + h);
      }
    }
    const int64_t in_window = at + t, cached = starts[b], values = s.shared ? s.rank_k : s.rank_v;
    const float* window_v = s.shared ? l.window_k : l.window_v;
    for (int64_t j = 0; j <= in_window; j += BLOCK)
      a.add(l.window_k + (b * window + j) * s.rank_k, window_v + (b * window + j) * values,
            std::min<int64_t>(BLOCK, in_window + 1 - j), in_window - j);
    const float* v = s.shared ? l.k : l.v;
    for (int64_t j = 0; j < cached; j += BLOCK) {
      const int64_t place = (row + b) * size + j;
      a.add(l.k + place * s.rank_k, v + place * values, std::min<int64_t>(BLOCK, cached - j), cached + in_window - j);
    }
    for (int64_t h = 0; h < heads; h++) {
      float* to = &o[r * o_stride + (first + h) * s.head_dim];
      for (int64_t p = 0; p < layer.v_heads.panels; p++) {
        layer.v_heads.times(&a.sum[h * s.rank_v], 0, 1, p, [&](int64_t, int64_t column, Floats y) {
          y /= a.total[h];
          const int64_t n = std::min<int64_t>(LANES, s.head_dim - column);
          if (n > 0) std::memcpy(to + column, &y, n * sizeof(float));
        }, first + h);
      }
    }
  }
};

struct Times {
  Matrix m;
  const float* x;
  float* y;
  int64_t rows, count, outputs;

  int phases() const { return 1; }
  int chunks(int) const { return (int)std::min<int64_t>(count * m.panels, 64); }
  void run(int, int chunk) {
    const int64_t all = count * m.panels, pieces = chunks(0);
    for (int64_t i = all * chunk / pieces; i < all * (chunk + 1) / pieces; i++) {
      const int64_t which = i / m.panels;
      float* to = y + which * outputs;
      m.times(x, m.in, rows, i % m.panels, [&](int64_t r, int64_t column, Floats value) {
        const int64_t n = std::min<int64_t>(LANES, outputs - column);
        if (n > 0) std::memcpy(to + r * count * outputs + column, &value, n * sizeof(float));
      }, which);
    }
  }
};

// The call's arguments, in order.
class Arguments {
 public:
  explicit Arguments(ffi::RemainingArgs args) : args_(args) {}

  ffi::AnyBuffer next() { return args_.get<ffi::AnyBuffer>(i_++).value(); }

  Matrix matrix() {
    const ffi::AnyBuffer w = next();
    const auto dims = w.dimensions();  // count, panels, in
    Matrix m;
    m.weights = w.untyped_data(), m.type = w.element_type();
    m.count = dims[0], m.panels = dims[1], m.in = dims[2];
    if (m.type == ffi::DataType::S8 || m.type == ffi::DataType::U8) {
      const ffi::AnyBuffer scales = next();
      m.scales = (const float*)scales.untyped_data(), m.groups = scales.dimensions()[2];
    }
    return m;
  }

 private:
  ffi::RemainingArgs args_;
  size_t i_ = 0;
};

ffi::Error read(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, int64_t layers,
                int64_t heads, int64_t head_dim, int64_t rank_q, bool absorbed_query, bool latent_norm, bool shared,
                bool embed_factors, bool mlp_factors) {
  auto job = std::make_shared<Read>();
  Arguments args(arguments);
  const ffi::AnyBuffer tokens = args.next();
  job->tokens = (const int32_t*)tokens.untyped_data();
  job->B = tokens.dimensions()[0], job->T = tokens.dimensions()[1];
  job->starts = (const int32_t*)args.next().untyped_data();
  job->at = *(const int32_t*)args.next().untyped_data();
  job->row = *(const int32_t*)args.next().untyped_data();
  job->slopes = (const float*)args.next().untyped_data();
  const ffi::AnyBuffer k = args.next(), v = shared ? k : args.next();
  const int64_t kinds = shared ? 1 : 2;
  auto result = [&](size_t i) { return *results.get<ffi::AnyBuffer>(i).value(); };
  for (int64_t i = 0; i < layers * kinds; i++) args.next();  // the windows, which share their memory with the results
  const ffi::AnyBuffer out = result(0);
  job->out = (float*)out.untyped_data();
  job->D = out.dimensions()[2];
  job->size = k.dimensions()[2];
  job->window = result(1).dimensions()[1];
  const int64_t rank_k = k.dimensions()[3], rank_v = v.dimensions()[3], cached = k.dimensions()[1] * job->size;
  job->s = {heads, rank_q, rank_k, rank_v, head_dim, absorbed_query, latent_norm, shared};
  job->table = args.matrix();
  if (embed_factors) job->table_up = args.matrix();
  for (int64_t n = 0; n < layers; n++) {
    Layer l;
    l.latents = args.matrix(), l.query = args.matrix();
    if (!absorbed_query) l.k_heads = args.matrix();
    l.v_heads = args.matrix(), l.o_down = args.matrix(), l.o_up = args.matrix(), l.mlp_in = args.matrix();
    if (mlp_factors) l.gate = args.matrix(), l.up = args.matrix();
    l.mlp_out = args.matrix();
    if (mlp_factors) l.mlp_last = args.matrix();
    job->layers.push_back(l);
    job->latents.push_back({(const float*)k.untyped_data() + n * cached * rank_k,
                            (const float*)v.untyped_data() + n * cached * rank_v,
                            (float*)result(1 + n * kinds).untyped_data(),
                            (float*)result(n * kinds + kinds).untyped_data()});
  }
  job->prepare();
  run_on_pool(pool, job);
  for (int64_t r = 0; r < job->rows; r++)
    std::memcpy(job->out + r * job->D, &job->x[r * job->x_stride], job->D * sizeof(float));
  return ffi::Error::Success();
}

ffi::Error times(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  auto job = std::make_shared<Times>();
  Arguments args(arguments);
  const ffi::AnyBuffer x = args.next(), y = *results.get<ffi::AnyBuffer>(0).value();
  job->m = args.matrix();
  job->x = (const float*)x.untyped_data(), job->y = (float*)y.untyped_data();
  job->rows = x.dimensions()[0], job->count = job->m.count, job->outputs = y.dimensions()[1] / job->count;
  run_on_pool(pool, job);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    lowrank_read, read,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .RemainingArgs()
        .RemainingRets()
        .Attr<int64_t>("layers")
        .Attr<int64_t>("heads")
        .Attr<int64_t>("head_dim")
        .Attr<int64_t>("rank_q")
        .Attr<bool>("absorbed_query")
        .Attr<bool>("latent_norm")
        .Attr<bool>("shared")
        .Attr<bool>("embed_factors")
        .Attr<bool>("mlp_factors"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(lowrank_times, times,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());

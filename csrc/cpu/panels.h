// Products with a matrix that is read again at each step of a recurrence. It is packed in panels of a few vectors of
// columns, each of which lies in one piece, in the order in which it is read; what is done with the sums is done while
// they are in registers.

// The rows of a tile of N vectors of sums.
template <int N>
constexpr int kTileRows = kSums / N;
// Vectors of columns of a panel, where nothing else sets their number.
constexpr int kPanelVectors = kRegisters > 16 ? 4 : 3;

template <class T>
inline Vec<T> load_part(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  Vec<T> x = {};
  for (int64_t k = 0; k < n; ++k) x[k] = p[k];
  return x;
}
template <class T>
inline void store_part(T* p, Vec<T> x, int64_t n) {
  if (n >= kLanes<T>) return store<T>(p, x);
  for (int64_t k = 0; k < n; ++k) p[k] = x[k];
}

// A line that is read after the next tile of a product: of lines of many rows the processor sees no pattern. (By an
// instruction, as in fetch_ahead.)
template <class T>
inline void fetch(const T* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" ::"m"(*p));
#else
  __builtin_prefetch(p);
#endif
}

// sum[i][n] += sum_k a[i][k] panel[k][n]. Few sums are taken in parts, so that a multiply-add needn't wait for the
// last.
template <class T, int I, int N, bool Fetch>
inline void multiply(const T* a, int64_t a_row, const T* panel, int64_t depth, Vec<T> (&sum)[I][N], const char* ahead) {
  constexpr int W = kLanes<T>, parts = I * N >= 8 ? 1 : I * N >= 6 ? 2 : 4;
  Vec<T> part[parts][I][N];
  UNROLL for (int u = 0; u < parts; ++u) UNROLL for (int i = 0; i < I; ++i) UNROLL for (int n = 0; n < N; ++n)
      part[u][i][n] = u ? Vec<T>{} : sum[i][n];
  int64_t k = 0;
  for (; k + parts <= depth; k += parts, panel += parts * N * W) UNROLL for (int u = 0; u < parts; ++u) {
      Vec<T> line[N];
      UNROLL for (int n = 0; n < N; ++n) line[n] = load(panel + (u * N + n) * W);
      if constexpr (Fetch) __builtin_prefetch(ahead, 0, 2), ahead += 64;
      UNROLL for (int i = 0; i < I; ++i) {
        const T factor = a[i * a_row + k + u];
        UNROLL for (int n = 0; n < N; ++n) part[u][i][n] += factor * line[n];
      }
    }
  for (; k < depth; ++k, panel += N * W)
    UNROLL for (int i = 0; i < I; ++i) UNROLL for (int n = 0; n < N; ++n) part[0][i][n] +=
        a[i * a_row + k] * load(panel + n * W);
  UNROLL for (int i = 0; i < I; ++i) UNROLL for (int n = 0; n < N; ++n) {
    Vec<T> total = part[0][i][n];
    UNROLL for (int u = 1; u < parts; ++u) total += part[u][i][n];
    sum[i][n] = total;
  }
}

// Rows of a times a panel of N vectors.
template <class T>
struct PanelProduct {
  const T* a;
  int64_t a_row;
  const T* panel;
  int64_t depth;
};

constexpr int64_t kGroup = 64;              // rows whose sums wait while the panel is read in parts
constexpr int64_t kPanelBytes = 16 * 1024;  // of a part: it stays in the first-level cache for all rows of a group

// Rows [row, end) over the lines [k0, k1) of the panel, in tiles of I. What comes after these lines is fetched
// meanwhile.
template <class T, int N, int I, class First, class Soon, class Last>
inline void panel_rows(const PanelProduct<T>& p, int64_t row, int64_t end, int64_t k0, int64_t k1, Ahead& ahead,
                       T* sums, const First& first, const Soon& soon, const Last& last) {
  constexpr int W = kLanes<T>;
  for (; row + I <= end; row += I, sums += I * N * W) {
    Vec<T> sum[I][N];
    for (int i = 0; i < I; ++i) {
      if (k0 == 0) {
        first(row + i, sum[i]);
      } else {
        UNROLL for (int n = 0; n < N; ++n) sum[i][n] = load(sums + (i * N + n) * W);
      }
    }
    for (int i = 0; k1 == p.depth && i < I; ++i) soon(row + i);
    const T *a = p.a + row * p.a_row + k0, *panel = p.panel + k0 * N * W;
    if (ahead.more()) {
      multiply<T, I, N, true>(a, p.a_row, panel, k1 - k0, sum, ahead.at);
      ahead.at += (k1 - k0) * 64;
    } else {
      multiply<T, I, N, false>(a, p.a_row, panel, k1 - k0, sum, nullptr);
    }
    for (int i = 0; i < I; ++i) {
      if (k1 == p.depth) {
        last(row + i, sum[i]);
      } else {
        UNROLL for (int n = 0; n < N; ++n) store<T>(sums + (i * N + n) * W, sum[i][n]);
      }
    }
  }
  if constexpr (I > 1) panel_rows<T, N, (I > 4 ? 4 : I / 2)>(p, row, end, k0, k1, ahead, sums, first, soon, last);
}

// first(row, sum) gives what the sums of a row begin with, last(row, sum) takes them; soon(row) is told a tile before.
template <class T, int N, class First, class Soon, class Last>
inline void panel_product(const PanelProduct<T>& p, int64_t row, int64_t end, const First& first, const Soon& soon,
                          const Last& last) {
  constexpr int W = kLanes<T>, I = kTileRows<N>;
  constexpr int64_t part = kPanelBytes / (N * kVectorBytes);
  alignas(kVectorBytes) T sums[kGroup * N * W];
  for (; row < end; row += kGroup) {
    const int64_t to = end - row < kGroup ? end : row + kGroup, step = to - row > I ? part : p.depth;
    for (int64_t k = 0; k < p.depth; k += step) {
      const int64_t next = p.depth - k < step ? p.depth : k + step;
      Ahead ahead;
      if (to - row > I) {
        ahead.at = reinterpret_cast<const char*>(p.panel + next * N * W);
        ahead.end = ahead.at + part * N * kVectorBytes;
      }
      panel_rows<T, N, I>(p, row, to, k, next, ahead, sums, first, soon, last);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- packing

// x[a] and x[b] exchange the quarters of a square of 2 H rows and lanes that do not lie on its diagonal.
template <class T, int H, int... L>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, L...>) {
  constexpr int W = kLanes<T>;
  const Vec<T> x = a, y = b;
  a = __builtin_shufflevector(x, y, (L & H ? W + L - H : L)...);
  b = __builtin_shufflevector(x, y, (L & H ? W + L : L + H)...);
}

// Lane l of x[k] becomes lane k of x[l].
template <class T, int H = kLanes<T> / 2>
[[gnu::always_inline]] inline void transpose(Vec<T>* x) {
  constexpr int W = kLanes<T>;
  UNROLL for (int k = 0; k < W; ++k) if (!(k & H)) exchange<T, H>(x[k], x[k + H], std::make_integer_sequence<int, W>{});
  if constexpr (H > 1) transpose<T, H / 2>(x);
}

// A line of `out` for each of n <= kLanes places of kLanes rows: lane l of line k is row l's place k, and 0 from row
// `rows` on.
template <class T>
inline void pack_lines(const T* from, int64_t row, int64_t rows, int64_t n, T* out, int64_t line) {
  constexpr int W = kLanes<T>;
  if (rows >= W && n == W) {
    Vec<T> x[W];
    UNROLL for (int l = 0; l < W; ++l) x[l] = load(from + l * row);
    transpose<T>(x);
    UNROLL for (int k = 0; k < W; ++k) store<T>(out + k * line, x[k]);
    return;
  }
  for (int l = 0; l < W; ++l)
    for (int64_t k = 0; k < n; ++k) out[k * line + l] = l < rows ? from[l * row + k] : T(0);
}

// ---------------------------------------------------------------------------------------------------- whole matrices

// Panels [begin, end) of a matrix.
template <class T>
void pack_dense(const Dense<T>& m, int64_t begin, int64_t end) {
  constexpr int64_t W = kLanes<T>, width = kPanelVectors * W;
  for (int64_t block = begin; block < end; ++block)
    for (int64_t k = 0; k < m.depth; k += W)
      for (int64_t column = block * width; column < (block + 1) * width; column += W) {
        T* out = m.packed + (block * m.depth + k) * width + column - block * width;
        const T* from = m.data + column * m.column + k * m.row;
        const int64_t n = m.depth - k < W ? m.depth - k : W, columns = m.columns - column;
        if (m.row == 1) {
          pack_lines(from, m.column, columns, n, out, width);
        } else {
          for (int64_t line = 0; line < n; ++line)
            for (int64_t c = 0; c < W; ++c)
              out[line * width + c] = c < columns ? from[line * m.row + c * m.column] : T(0);
        }
      }
}

// Panels [begin, end) of a product with it, every other time from the end.
template <class T>
void dense(const DenseProduct<T>& x, int64_t time, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>, N = kPanelVectors;
  const Dense<T>& m = *x.matrix;
  for (int64_t block_number = 0; block_number < end - begin; ++block_number) {
    const int64_t block = there_and_back(time, block_number, begin, end), column = block * N * W;
    const auto part = [&](int n) { return m.columns - column - n * W; };  // columns that the n-th vector has
    const auto first = [&](int64_t row, Vec<T>(&sum)[N]) {
      const T* from = x.bias ? x.bias : x.adds && !x.factor ? x.out + row * x.out_row : nullptr;
      for (int n = 0; n < N; ++n) sum[n] = from && part(n) > 0 ? load_part(from + column + n * W, part(n)) : Vec<T>{};
    };
    const auto soon = [&](int64_t row) {
      for (int n = 0; n < N && part(n) > 0; ++n) fetch(x.out + row * x.out_row + column + n * W);
    };
    const auto last = [&](int64_t row, const Vec<T>(&sum)[N]) {
      T* out = x.out + row * x.out_row + column;
      for (int n = 0; n < N && part(n) > 0; ++n) {
        Vec<T> y = sum[n];
        if (x.factor) {
          y *= load_part(x.factor + row * x.out_row + column + n * W, part(n));
          if (x.adds) y += load_part(out + n * W, part(n));
        }
        store_part(out + n * W, x.tanh ? tanh<T>(y) : y, part(n));
      }
    };
    panel_product<T, N>({x.a, x.a_row, m.packed + block * m.depth * N * W, m.depth}, 0, x.rows, first, soon, last);
  }
}

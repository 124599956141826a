// The two matrix products of attention, on tiles that lie in the cache.

// Sums in an array stay in registers where its loops are unrolled before the compiler places it.
#define UNROLL _Pragma("GCC unroll 16")

// Memory that is wanted soon, one stretch and then another. While products run it comes into the second-level cache, so
// that reading and multiplying take the time of one of them.
struct Ahead {
  const char *at = nullptr, *end = nullptr, *next = nullptr, *next_end = nullptr;
  bool more() {
    if (at >= end) at = next, end = next_end, next = next_end = nullptr;
    return at < end;
  }
};

// C[i][h] += sum_k A[i][k] B[k][h], rows of C and B padded to whole vectors; A has any strides.
template <class T>
struct Product {
  T* c;
  int64_t c_row;
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row;
  int64_t depth;
  Ahead* ahead = nullptr;  // of a B that lies in the first-level cache
};

enum class Fetch { kNextPanel, kAhead, kNothing };
template <class T, int I, int N, Fetch F>
inline void product_panel(const Product<T>& p, int64_t row, int64_t column) {
  constexpr int W = kLanes<T>;
  // In variables of their own: a store to c could change what p refers to, for all the compiler knows.
  const int64_t c_row = p.c_row, a_row = p.a_row, a_column = p.a_column, b_row = p.b_row, depth = p.depth;
  T* c = p.c + row * c_row + column;
  const T *a = p.a + row * a_row, *b = p.b + column;
  const char* ahead = F == Fetch::kAhead ? p.ahead->at : nullptr;
  Vec<T> sum[I][N];
  UNROLL for (int i = 0; i < I; ++i) UNROLL for (int n = 0; n < N; ++n) sum[i][n] = load(c + i * c_row + n * W);
  for (int64_t k = 0; k < depth; ++k, a += a_column, b += b_row) {
    Vec<T> line[N];
    UNROLL for (int n = 0; n < N; ++n) line[n] = load(b + n * W);
    // The next panel of this row: the processor sees no pattern in steps of whole rows.
    if constexpr (F == Fetch::kNextPanel) __builtin_prefetch(b + N * W, 0, 2);
    if constexpr (F == Fetch::kAhead) {
      constexpr int lines = N > 1 ? 2 : 1;  // about what memory gives in the time
      UNROLL for (int line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
    UNROLL for (int i = 0; i < I; ++i) {
      const T factor = a[i * a_row];
      UNROLL for (int n = 0; n < N; ++n) sum[i][n] += factor * line[n];
    }
  }
  UNROLL for (int i = 0; i < I; ++i) UNROLL for (int n = 0; n < N; ++n) store<T>(c + i * c_row + n * W, sum[i][n]);
  if constexpr (F == Fetch::kAhead) p.ahead->at = ahead;
}

// Columns [column, end) of I rows, in panels of N vectors, then narrower ones.
template <class T, int I, int N>
inline void product_columns(const Product<T>& p, int64_t row, int64_t column, int64_t end) {
  constexpr int step = N * kLanes<T>;
  for (; column + step <= end; column += step) {
    if (p.ahead == nullptr) {
      product_panel<T, I, N, Fetch::kNextPanel>(p, row, column);
    } else if (p.ahead->more()) {
      product_panel<T, I, N, Fetch::kAhead>(p, row, column);
    } else {
      product_panel<T, I, N, Fetch::kNothing>(p, row, column);
    }
  }
  if constexpr (N > 1) product_columns<T, I, N / 2>(p, row, column, end);
}

// Rows from which the next but so many is fetched, where one after another is read.
constexpr int64_t kRowsAhead = 4;

// A single row of C: B, which may be of a half type, goes by row by row, as memory has it, four rows to each pass over
// C.
template <class T, class Stored>
inline void product_row(T* c, const T* a, int64_t a_column, const Stored* b, int64_t step, int64_t depth,
                        int64_t columns) {
  constexpr int W = kLanes<T>;
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4, b += 4 * step, a += 4 * a_column) {
    const T a0 = a[0], a1 = a[a_column], a2 = a[2 * a_column], a3 = a[3 * a_column];
    for (int64_t n = 0; n < columns; n += W) {
      const Stored* x = b + n;
      // Of four rows at a time the processor sees no pattern; these are the next, where rows lie one after another.
      fetch_ahead(b + 4 * (step + n), 4 * W * sizeof(Stored));
      store<T>(c + n, load(c + n) +
                          ((a0 * load(x) + a1 * load(x + step)) + (a2 * load(x + 2 * step) + a3 * load(x + 3 * step))));
    }
  }
  for (; k < depth; ++k, b += step, a += a_column)
    for (int64_t n = 0; n < columns; n += W) add_to<T>(c + n, *a * load(b + n));
}

// Rows [row, end) in tiles of I rows and as many columns as the registers hold: of 32 registers 24 take sums, of
// sixteen twelve.
constexpr int kSums = kRegisters > 16 ? 24 : 12;
template <class T, int I>
inline void product_rows(const Product<T>& p, int64_t row, int64_t end, int64_t columns) {
  constexpr int N = kSums / I >= 8 ? 8 : kSums / I >= 4 ? 4 : kSums / I >= 2 ? 2 : 1;
  if constexpr (I > 1) {
    for (; row + I <= end; row += I) product_columns<T, I, N>(p, row, 0, columns);
    product_rows<T, (I > 8 ? 8 : I > 4 ? 4 : I / 2)>(p, row, end, columns);
  } else if (row < end) {
    product_row(p.c + row * p.c_row, p.a + row * p.a_row, p.a_column, p.b, p.b_row, p.depth, columns);
  }
}
template <class T>
inline void product(const Product<T>& p, int64_t row, int64_t end, int64_t columns) {
  if constexpr (kRegisters > 16) {
    // Four vectors of columns load the least; fewer columns take more rows.
    if (columns < 4 * kLanes<T>) return product_rows<T, 12>(p, row, end, columns);
  }
  product_rows<T, 6>(p, row, end, columns);
}

// Keeps a vector that is used several times in its register: the compiler would rather load it for each use, and loads
// are what is scarce.
template <class V>
inline void keep(V& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
}

// out[i][j] = sum_h a[i][h] b[j][h] for I x J rows of whole vectors. Beyond nj the last row of b is taken again, and
// its sums are not stored.
template <class T, int I, int J>
inline void dots(const T* a, int64_t a_row, const T* b, int64_t b_row, int64_t nj, int64_t size, T* out,
                 int64_t out_row) {
  constexpr int W = kLanes<T>, N = (I * J + W - 1) / W * W;
  const T* column[J];
  for (int j = 0; j < J; ++j) column[j] = b + (j < nj ? j : nj - 1) * b_row;
  Vec<T> sum[N];
  for (int k = 0; k < N; ++k) sum[k] = Vec<T>{};  // in registers; of "= {}" GCC makes a string instruction
  for (int64_t h = 0; h < size; h += W) {
    Vec<T> line[J];
    for (int j = 0; j < J; ++j) line[j] = load(column[j] + h);
    for (int i = 0; i < I; ++i) {
      Vec<T> x = load(a + i * a_row + h);
      keep(x);
      for (int j = 0; j < J; ++j) sum[i * J + j] += x * line[j];
    }
  }
  alignas(kVectorBytes) T lanes[N];
  for (int k = 0; k < N; k += W) store<T>(lanes + k, lane_sums<T>(sum + k));
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J && j < nj; ++j) out[i * out_row + j] = lanes[i * J + j];
}

// The same for one row of a: row by row of b, which may be of a half type, as memory has it. Rows of out have room for
// whole vectors.
template <class T, class Stored>
inline void row_dots(const T* a, const Stored* b, int64_t b_row, int64_t nj, int64_t size, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < nj; j += W) {
    Vec<T> sum[W];
    for (int k = 0; k < W; ++k) sum[k] = Vec<T>{};
    for (int64_t k = 0; k < W && j + k < nj; ++k) {
      const Stored* row = b + (j + k) * b_row;
      fetch_ahead(row + kRowsAhead * b_row, size * int64_t(sizeof(Stored)));
      Vec<T> part0 = {}, part1 = {}, part2 = {}, part3 = {};
      int64_t h = 0;
      for (; h + 4 * W <= size; h += 4 * W) {
        part0 += load(a + h) * load(row + h);
        part1 += load(a + h + W) * load(row + h + W);
        part2 += load(a + h + 2 * W) * load(row + h + 2 * W);
        part3 += load(a + h + 3 * W) * load(row + h + 3 * W);
      }
      for (; h < size; h += W) part0 += load(a + h) * load(row + h);
      sum[k] = (part0 + part1) + (part2 + part3);
    }
    store<T>(out + j, lane_sums<T>(sum));
  }
}

// out = a b^T for ni and nj rows of whole vectors, in tiles as large as the registers hold.
template <class T>
inline void product_transposed(const T* a, int64_t a_row, int64_t ni, const T* b, int64_t b_row, int64_t nj,
                               int64_t size, T* out, int64_t out_row) {
  if (ni == 1) return row_dots(a, b, b_row, nj, size, out);
  constexpr int I = 4, J = kRegisters > 16 ? 4 : 3;
  for (int64_t j = 0; j < nj; j += J) {
    int64_t i = 0;
    for (; i + I <= ni; i += I)
      dots<T, I, J>(a + i * a_row, a_row, b + j * b_row, b_row, nj - j, size, out + i * out_row + j, out_row);
    for (; i < ni; ++i)
      dots<T, 1, J>(a + i * a_row, a_row, b + j * b_row, b_row, nj - j, size, out + i * out_row + j, out_row);
  }
}

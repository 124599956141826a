// The two matrix products of attention, on tiles that lie in the cache.

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
};

template <class T, int I, int N>
inline void product_panel(const Product<T>& p, int64_t row, int64_t column) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[I][N];
  for (int i = 0; i < I; ++i)
    for (int n = 0; n < N; ++n) sum[i][n] = load(p.c + (row + i) * p.c_row + column + n * W);
  const T* a = p.a + row * p.a_row;
  const T* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_column, b += p.b_row) {
    Vec<T> line[N];
    for (int n = 0; n < N; ++n) line[n] = load(b + n * W);
    for (int i = 0; i < I; ++i) {
      const T factor = a[i * p.a_row];
      for (int n = 0; n < N; ++n) sum[i][n] += factor * line[n];
    }
  }
  for (int i = 0; i < I; ++i)
    for (int n = 0; n < N; ++n) store<T>(p.c + (row + i) * p.c_row + column + n * W, sum[i][n]);
}

// Columns [column, end) of I rows, in panels of N vectors, then narrower ones.
template <class T, int I, int N>
inline void product_columns(const Product<T>& p, int64_t row, int64_t column, int64_t end) {
  constexpr int step = N * kLanes<T>;
  for (; column + step <= end; column += step) product_panel<T, I, N>(p, row, column);
  if constexpr (N > 1) product_columns<T, I, N / 2>(p, row, column, end);
}

constexpr int kAccumulators = kRegisters / 2;

// Rows [row, end), eight at a time, then fewer; few rows take wide panels, so that a single one streams B.
template <class T, int I = 8>
inline void product(const Product<T>& p, int64_t row, int64_t end, int64_t columns) {
  for (; row + I <= end; row += I)
    product_columns<T, I, (kAccumulators > I ? kAccumulators / I : 1)>(p, row, 0, columns);
  if constexpr (I > 1) product<T, I / 2>(p, row, end, columns);
}

// out[i][j] = sum_h a[i][h] b[j][h] for I x J rows of whole vectors, I * J lanes in one vector.
template <class T, int I, int J>
inline Vec<T> dots(const T* const* a, const T* const* b, int64_t size) {
  constexpr int W = kLanes<T>;
  static_assert(I * J == W);
  Vec<T> sum[I * J] = {};
  for (int64_t h = 0; h < size; h += W) {
    for (int j = 0; j < J; ++j) {
      const Vec<T> line = load(b[j] + h);
      for (int i = 0; i < I; ++i) sum[i * J + j] += load(a[i] + h) * line;
    }
  }
  return lane_sums<T>(sum);
}

// Calls tile(I, J rows) for every tile of an ni x nj matrix and scatters its lanes to out. Tiles at the edge
// read their last row again instead of a row that isn't there.
template <class T, int I, int J, class Tile>
inline void tiles_of_rows(const T* a, int64_t a_row, int64_t i, int64_t i_end, const T* b, int64_t b_row, int64_t nj,
                          T* out, int64_t out_row, const Tile& tile) {
  for (; i + I <= i_end; i += I) {
    const T* rows[I];
    for (int k = 0; k < I; ++k) rows[k] = a + (i + k) * a_row;
    for (int64_t j = 0; j < nj; j += J) {
      const T* columns[J];
      for (int k = 0; k < J; ++k) columns[k] = b + (j + k < nj ? j + k : nj - 1) * b_row;
      alignas(kVectorBytes) T lanes[I * J];
      store<T>(lanes, tile(rows, columns));
      const int64_t width = nj - j < J ? nj - j : J;
      for (int r = 0; r < I; ++r)
        for (int64_t k = 0; k < width; ++k) out[(i + r) * out_row + j + k] = lanes[r * J + k];
    }
  }
}

template <class T>
constexpr int kTileRows = kLanes<T> >= 4 ? 4 : 1;

// out = a b^T for ni and nj rows of whole vectors.
template <class T>
inline void product_transposed(const T* a, int64_t a_row, int64_t ni, const T* b, int64_t b_row, int64_t nj,
                               int64_t size, T* out, int64_t out_row) {
  constexpr int W = kLanes<T>, I = kTileRows<T>;
  const int64_t whole = ni / I * I;
  tiles_of_rows<T, I, W / I>(a, a_row, 0, whole, b, b_row, nj, out, out_row,
                             [&](const T** x, const T** y) { return dots<T, I, W / I>(x, y, size); });
  tiles_of_rows<T, 1, W>(a, a_row, whole, ni, b, b_row, nj, out, out_row,
                         [&](const T** x, const T** y) { return dots<T, 1, W>(x, y, size); });
}

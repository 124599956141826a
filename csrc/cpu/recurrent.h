// Recurrent units over a packed batch, one direction of a layer: the product of a step's states with the recurrent
// matrix, and on its sums, while they are in registers, the gates. A block is as many units as a vector has lanes; its
// part of the matrix lies in one piece, in the order in which it is read.

// Vectors of a block's sums for each row, a vector a gate, and the rows of a tile.
template <Unit U>
constexpr int kGates = U == Unit::kGru ? 3 : 4;
template <int N>
constexpr int kTileRows = kSums / N;
// Vectors of columns of a block of the backward pass.
constexpr int kGradVectors = kRegisters > 16 ? 4 : 3;

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

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return reciprocal<T>(T(1) + exp<T>(at_least<T>(Vec<T>{} - Limits<T>::steep, at_most<T>(Vec<T>{} + Limits<T>::steep, -x))));
}

// (e - 1) / (e + 1) of e = exp(2 x), where e - 1 is taken without the 1 of the series, so that a small x keeps its places.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  using L = Limits<T>;
  using Bits = typename VecOf<T>::bits;
  const Vec<T> y = at_least<T>(Vec<T>{} - L::flat, at_most<T>(Vec<T>{} + L::flat, 2 * x));
  const Vec<T> shifted = y * L::log2e + L::magic;
  const Vec<T> n = shifted - L::magic;
  const Vec<T> rest = y - n * L::ln2_high - n * L::ln2_low;
  const Vec<T> power = (Vec<T>)((Bits)(Vec<T>{} + 1) + ((Bits)shifted << L::mantissa));
  const Vec<T> less_one = power * (rest * exp_series<T, 1>(rest)) + (power - 1);
  const Vec<T> result = less_one * reciprocal<T>(less_one + 2);
  return x == x ? result : x;
}

// ------------------------------------------------------------------------------------------------ the matrix

// Blocks [begin, end) of the matrix (G S, S): for each a line of biases and a line for each state, a vector a gate.
template <class T, Unit U>
inline void pack_forward(const Recurrence<T>& r, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>, G = kGates<U>;
  const int64_t size = r.size;
  for (int64_t block = begin; block < end; ++block) {
    T* out = r.packed + block * (size + 1) * G * W;
    for (int g = 0; g < G; ++g)
      for (int lane = 0; lane < W; ++lane, ++out) {
        const int64_t unit = block * W + lane;
        const T* row = r.weight + (g * size + unit) * size;
        *out = unit < size && r.bias ? r.bias[g * size + unit] : T(0);
        T* to = out;
        if (unit < size) {
          for (int64_t k = 0; k < size; ++k) *(to += G * W) = row[k];
        } else {
          for (int64_t k = 0; k < size; ++k) *(to += G * W) = 0;
        }
      }
  }
}

// The same for the backward pass: columns of the matrix, a line for each of its rows. The rows of a gated unit come in
// the order candidate, reset, update.
template <class T, Unit U>
inline void pack_backward(const Recurrence<T>& r, int64_t begin, int64_t end) {
  constexpr int width = kGradVectors * kLanes<T>;
  const int64_t size = r.size, rows = kGates<U> * size, first = U == Unit::kGru ? 2 * size : 0;
  for (int64_t block = begin; block < end; ++block) {
    T* out = r.packed + block * rows * width;
    const int64_t column = block * width, n = size - column < width ? size - column : width;
    for (int64_t row = 0; row < rows; ++row, out += width) {
      const T* from = r.weight + (row + first) % rows * size + column;
      for (int64_t k = 0; k < n; ++k) out[k] = from[k];
      for (int64_t k = n; k < width; ++k) out[k] = 0;
    }
  }
}

// sum[i][n] += sum_k a[i][k] panel[k][n]. Few sums are taken in parts, so that a multiply-add needn't wait for the last.
template <class T, int I, int N>
inline void multiply(const T* a, int64_t a_row, const T* panel, int64_t depth, Vec<T> (&sum)[I][N]) {
  constexpr int W = kLanes<T>, parts = I * N >= 8 ? 1 : I * N >= 6 ? 2 : 4;
  Vec<T> part[parts][I][N];
  UNROLL for (int u = 0; u < parts; ++u)
  UNROLL for (int i = 0; i < I; ++i)
  UNROLL for (int n = 0; n < N; ++n) part[u][i][n] = u ? Vec<T>{} : sum[i][n];
  int64_t k = 0;
  for (; k + parts <= depth; k += parts, panel += parts * N * W)
    UNROLL for (int u = 0; u < parts; ++u) {
      Vec<T> line[N];
      UNROLL for (int n = 0; n < N; ++n) line[n] = load(panel + (u * N + n) * W);
      UNROLL for (int i = 0; i < I; ++i) {
        const T factor = a[i * a_row + k + u];
        UNROLL for (int n = 0; n < N; ++n) part[u][i][n] += factor * line[n];
      }
    }
  for (; k < depth; ++k, panel += N * W)
    UNROLL for (int i = 0; i < I; ++i)
    UNROLL for (int n = 0; n < N; ++n) part[0][i][n] += a[i * a_row + k] * load(panel + n * W);
  UNROLL for (int i = 0; i < I; ++i)
  UNROLL for (int n = 0; n < N; ++n) {
    Vec<T> total = part[0][i][n];
    UNROLL for (int u = 1; u < parts; ++u) total += part[u][i][n];
    sum[i][n] = total;
  }
}

// -------------------------------------------------------------------------------------------------- forward

// The units [u, u + n) of row b at a step.
struct Units {
  int64_t step, b, row, u, n;  // row: of the packed tensors
};

template <class T>
inline void put_state(const Recurrence<T>& r, const Units& at, Vec<T> hidden) {
  store<T>(r.states + ((at.step + 1) % 2 * r.batch + at.b) * row_of(r.padded) + at.u, hidden);
  store_part(r.output + at.row * r.output_row + at.u, hidden, at.n);
  if (at.b >= r.rows_at(at.step + 1)) store_part(r.last_hidden + at.b * r.size + at.u, hidden, at.n);
}

template <class T>
inline void gated_unit(const Recurrence<T>& r, const Units& at, const Vec<T> (&sum)[3]) {
  const int64_t size = r.size, n = at.n;
  const T* x = r.gates + at.row * 3 * size + at.u;
  const Vec<T> reset = sigmoid<T>(load_part(x, n) + sum[0]), update = sigmoid<T>(load_part(x + size, n) + sum[1]);
  const Vec<T> candidate = tanh<T>(load_part(x + 2 * size, n) + reset * sum[2]);
  const Vec<T> last = load(r.states + (at.step % 2 * r.batch + at.b) * row_of(r.padded) + at.u);
  put_state<T>(r, at, candidate + update * (last - candidate));
  if (!r.kept) return;
  T* kept = r.kept + at.row * 4 * size + at.u;
  store_part(kept, reset, n), store_part(kept + size, update, n);
  store_part(kept + 2 * size, candidate, n), store_part(kept + 3 * size, sum[2], n);
}

template <class T>
inline void memory_unit(const Recurrence<T>& r, const Units& at, const Vec<T> (&sum)[4]) {
  const int64_t size = r.size, n = at.n;
  const T* x = r.gates + at.row * 4 * size + at.u;
  const Vec<T> take = sigmoid<T>(load_part(x, n) + sum[0]), keep = sigmoid<T>(load_part(x + size, n) + sum[1]);
  const Vec<T> candidate = tanh<T>(load_part(x + 2 * size, n) + sum[2]);
  const Vec<T> show = sigmoid<T>(load_part(x + 3 * size, n) + sum[3]);
  T* cell = r.cells + at.b * row_of(r.padded) + at.u;
  const Vec<T> next = keep * load(cell) + take * candidate;
  store<T>(cell, next);
  put_state<T>(r, at, show * tanh<T>(next));
  if (at.b >= r.rows_at(at.step + 1)) store_part(r.last_cell + at.b * size + at.u, next, n);
  if (!r.kept) return;
  T* kept = r.kept + at.row * 5 * size + at.u;
  store_part(kept, take, n), store_part(kept + size, keep, n), store_part(kept + 2 * size, candidate, n);
  store_part(kept + 3 * size, show, n), store_part(kept + 4 * size, next, n);
}

template <class T, Unit U, int I>
inline int64_t recurrent_rows(const Recurrence<T>& r, int64_t step, int64_t block, int64_t b, int64_t end) {
  constexpr int W = kLanes<T>, G = kGates<U>;
  const T* panel = r.packed + block * (r.size + 1) * G * W;
  const T* states = r.states + step % 2 * r.batch * row_of(r.padded);
  const int64_t u = block * W, n = r.size - u < W ? r.size - u : W;
  for (; b + I <= end; b += I) {
    Vec<T> sum[I][G];
    UNROLL for (int i = 0; i < I; ++i)
    UNROLL for (int g = 0; g < G; ++g) sum[i][g] = load(panel + g * W);
    multiply<T, I, G>(states + b * row_of(r.padded), row_of(r.padded), panel + G * W, r.size, sum);
    for (int i = 0; i < I; ++i) {
      const Units at{step, b + i, r.row_at(step) + b + i, u, n};
      if constexpr (U == Unit::kGru) {
        gated_unit<T>(r, at, sum[i]);
      } else {
        memory_unit<T>(r, at, sum[i]);
      }
    }
  }
  if constexpr (I > 1) return recurrent_rows<T, U, (I > 4 ? 4 : I / 2)>(r, step, block, b, end);
  return b;
}

// Blocks [begin, end) of a step.
template <class T, Unit U>
void recurrent(const Recurrence<T>& r, int64_t step, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    recurrent_rows<T, U, kTileRows<kGates<U>>>(r, step, block, 0, r.rows_at(step));
}

// ------------------------------------------------------------------------------------------------- backward

// The state before a step: the first of its row, or what the step before it put out.
template <class T>
inline const T* state_before(const Recurrence<T>& r, const Units& at) {
  return at.b < r.rows_at(at.step - 1) ? r.output + (r.row_at(at.step - 1) + at.b) * r.output_row + at.u
                                       : r.hidden + at.b * r.size + at.u;
}

template <class T>
inline void add_part(T* sum, Vec<T> x, int64_t n) {
  store_part<T>(sum, load_part(sum, n) + x, n);
}

// The gradients of a unit's gates from that of its state; what of it goes straight on is kept in `carried`.
template <class T>
inline void gated_gradient(const Recurrence<T>& r, const Units& at, Vec<T> grad) {
  const int64_t size = r.size, n = at.n;
  const T* kept = r.kept + at.row * 4 * size + at.u;
  const Vec<T> reset = load_part(kept, n), update = load_part(kept + size, n);
  const Vec<T> candidate = load_part(kept + 2 * size, n), projected = load_part(kept + 3 * size, n);
  const Vec<T> before = load_part(state_before(r, at), n);
  const Vec<T> of_candidate = grad * (T(1) - update) * (T(1) - candidate * candidate);
  const Vec<T> of_update = grad * (before - candidate) * update * (T(1) - update);
  const Vec<T> of_reset = of_candidate * projected * reset * (T(1) - reset);
  const Vec<T> grads[4] = {of_candidate * reset, of_reset, of_update, of_candidate};
  store<T>(r.carried + at.b * row_of(r.padded) + at.u, grad * update);
  store_part(r.previous + at.row * size + at.u, before, n);
  T* out = r.grad_gates + at.row * 4 * size + at.u;
  for (int g = 0; g < 4; ++g) store_part(out + g * size, grads[g], n), add_part(r.grad_bias + g * size + at.u, grads[g], n);
}

template <class T>
inline void memory_gradient(const Recurrence<T>& r, const Units& at, Vec<T> grad) {
  const int64_t size = r.size, n = at.n;
  const T* kept = r.kept + at.row * 5 * size + at.u;
  const Vec<T> take = load_part(kept, n), keep = load_part(kept + size, n), candidate = load_part(kept + 2 * size, n);
  const Vec<T> show = load_part(kept + 3 * size, n), shown = tanh<T>(load_part(kept + 4 * size, n));
  const T* cell = at.b < r.rows_at(at.step - 1)
                      ? r.kept + (r.row_at(at.step - 1) + at.b) * 5 * size + 4 * size + at.u
                      : r.cell + at.b * size + at.u;
  T* carried = r.carried + at.b * row_of(r.padded) + at.u;
  const Vec<T> coming = at.b < r.rows_at(at.step + 1) ? load(carried)
                        : r.grad_last_cell            ? load_part(r.grad_last_cell + at.b * size + at.u, n)
                                                      : Vec<T>{};
  const Vec<T> of_cell = coming + grad * show * (T(1) - shown * shown);
  const Vec<T> grads[4] = {of_cell * candidate * take * (T(1) - take),
                           of_cell * load_part(cell, n) * keep * (T(1) - keep),
                           of_cell * take * (T(1) - candidate * candidate), grad * shown * show * (T(1) - show)};
  store<T>(carried, of_cell * keep);
  store_part(r.previous + at.row * size + at.u, load_part(state_before(r, at), n), n);
  T* out = r.grad_gates + at.row * 4 * size + at.u;
  for (int g = 0; g < 4; ++g) store_part(out + g * size, grads[g], n), add_part(r.grad_bias + g * size + at.u, grads[g], n);
}

// The gradient of the state before the first step of a row is done; that of the state after a step goes into its gates.
template <class T, Unit U>
inline void state_gradient(const Recurrence<T>& r, const Units& at, Vec<T> grad) {
  const T* carried = r.carried + at.b * row_of(r.padded) + at.u;
  if (at.b < r.rows_at(at.step + 1)) {
    if constexpr (U == Unit::kGru) grad += load(carried);
  } else {
    grad = r.grad_last_hidden ? load_part(r.grad_last_hidden + at.b * r.size + at.u, at.n) : Vec<T>{};
  }
  if (at.b >= r.rows_at(at.step)) {
    store_part(r.grad_hidden + at.b * r.size + at.u, grad, at.n);
    if constexpr (U == Unit::kLstm) store_part(r.grad_cell + at.b * r.size + at.u, load(carried), at.n);
    return;
  }
  if (r.grad_output) grad += load_part(r.grad_output + at.row * r.output_row + at.u, at.n);
  if constexpr (U == Unit::kGru) {
    gated_gradient<T>(r, at, grad);
  } else {
    memory_gradient<T>(r, at, grad);
  }
}

template <class T, Unit U, int I>
inline void gradient_rows(const Recurrence<T>& r, int64_t step, int64_t block, int64_t b, int64_t end, bool product) {
  constexpr int W = kLanes<T>, N = kGradVectors, G = kGates<U>;
  const T* panel = r.packed + block * G * r.size * N * W;
  const T* grads = r.grad_gates + r.row_at(step + 1) * 4 * r.size;
  for (; b + I <= end; b += I) {
    Vec<T> sum[I][N];
    UNROLL for (int i = 0; i < I; ++i)
    UNROLL for (int n = 0; n < N; ++n) sum[i][n] = Vec<T>{};
    if (product) multiply<T, I, N>(grads + b * 4 * r.size, 4 * r.size, panel, G * r.size, sum);
    for (int i = 0; i < I; ++i)
      for (int n = 0; n < N; ++n) {
        const int64_t u = (block * N + n) * W;
        if (u >= r.size) break;
        const Units at{step, b + i, r.row_at(step) + b + i, u, r.size - u < W ? r.size - u : W};
        state_gradient<T, U>(r, at, sum[i][n]);
      }
  }
  if constexpr (I > 1) gradient_rows<T, U, (I > 4 ? 4 : I / 2)>(r, step, block, b, end, product);
}

// Blocks [begin, end) of a step of the backward pass, from the last step down to -1, which is what comes before all.
template <class T, Unit U>
void recurrent_backward(const Recurrence<T>& r, int64_t step, int64_t begin, int64_t end) {
  constexpr int I = kTileRows<kGradVectors>;
  const int64_t coming = r.rows_at(step + 1), rows = r.rows_at(step);
  for (int64_t block = begin; block < end; ++block) {
    gradient_rows<T, U, I>(r, step, block, 0, coming, true);
    gradient_rows<T, U, I>(r, step, block, coming, rows, false);
  }
}

template <class T, Unit U>
constexpr RecurrentKernels<T> recurrent_kernels() {
  return {kLanes<T>, kGradVectors * kLanes<T>, pack_forward<T, U>, recurrent<T, U>, pack_backward<T, U>,
          recurrent_backward<T, U>};
}

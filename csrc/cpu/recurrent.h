// Recurrent units over a packed batch, one direction of a layer: the product of a step's states with the recurrent
// matrix, and on its sums, while they are in registers, the gates. A block is as many units as a vector has lanes, or
// in the backward pass some vectors of them; its part of the matrix lies in one piece, in the order in which it is
// read.

// Vectors of a block's sums for each row, a vector a gate.
template <Unit U>
constexpr int kGates = U == Unit::kGru ? 3 : 4;

// ------------------------------------------------------------------------------------------------ the matrix

// Blocks [begin, end) of the matrix (G S, S): for each a line for each state, a vector a gate.
template <class T, Unit U>
inline void pack_forward(const Recurrence<T>& r, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>, G = kGates<U>;
  for (int64_t block = begin; block < end; ++block)
    for (int64_t k = 0; k < r.size; k += W)
      for (int64_t g = 0, unit = block * W; g < G; ++g)
        pack_lines(r.weight + (g * r.size + unit) * r.size + k, r.size, r.size - unit, r.size - k < W ? r.size - k : W,
                   r.packed + ((block * r.size + k) * G + g) * W, G * W);
}

// The same for the backward pass: columns of the matrix, a line for each of its rows. The rows of a gated unit come in
// the order candidate, reset, update.
template <class T, Unit U>
inline void pack_backward(const Recurrence<T>& r, int64_t begin, int64_t end) {
  constexpr int width = kPanelVectors * kLanes<T>;
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

// -------------------------------------------------------------------------------------------------- forward

// The units [u, u + n) of row b at a step.
struct Units {
  int64_t step, b, row, u, n;  // row: of the packed tensors
};

template <class T>
inline void put_state(const Recurrence<T>& r, const Units& at, Vec<T> hidden) {
  store<T>(r.states + ((at.step + 1) % 2 * r.batch + at.b) * row_of(r.padded) + at.u, hidden);
  store_part(r.output + at.row * r.output_row + at.u, hidden, at.n);
  if (r.inner) store_part(r.inner + (at.row * 2 + 1) * r.size + at.u, hidden, at.n);
  if (at.b >= r.rows_at(at.step + 1)) store_part(r.last_hidden + at.b * r.size + at.u, hidden, at.n);
}

template <class T>
inline void gated_unit(const Recurrence<T>& r, const Units& at, const Vec<T> (&sum)[3]) {
  const int64_t size = r.size, n = at.n;
  T* x = r.gates + (at.row - r.gates_base) * 3 * size + at.u;
  const Vec<T> reset = sigmoid<T>(load_part(x, n) + sum[0]), update = sigmoid<T>(load_part(x + size, n) + sum[1]);
  const Vec<T> added = load_part(x + 2 * size, n) + load(r.bias + 3 * r.padded + at.u);
  const Vec<T> candidate = tanh<T>(added + reset * sum[2]);
  const Vec<T> last = load(r.states + (at.step % 2 * r.batch + at.b) * row_of(r.padded) + at.u);
  put_state<T>(r, at, candidate + update * (last - candidate));
  if (!r.inner) return;
  store_part(x, reset, n), store_part(x + size, update, n), store_part(x + 2 * size, candidate, n);
  store_part(r.inner + at.row * 2 * size + at.u, sum[2], n);
}

template <class T>
inline void memory_unit(const Recurrence<T>& r, const Units& at, const Vec<T> (&sum)[4]) {
  const int64_t size = r.size, n = at.n;
  T* x = r.gates + (at.row - r.gates_base) * 4 * size + at.u;
  const Vec<T> take = sigmoid<T>(load_part(x, n) + sum[0]), keep = sigmoid<T>(load_part(x + size, n) + sum[1]);
  const Vec<T> candidate = tanh<T>(load_part(x + 2 * size, n) + sum[2]);
  const Vec<T> show = sigmoid<T>(load_part(x + 3 * size, n) + sum[3]);
  T* cell = r.cells + at.b * row_of(r.padded) + at.u;
  const Vec<T> next = keep * load(cell) + take * candidate;
  store<T>(cell, next);
  put_state<T>(r, at, show * tanh<T>(next));
  if (at.b >= r.rows_at(at.step + 1)) store_part(r.last_cell + at.b * size + at.u, next, n);
  if (!r.inner) return;
  store_part(x, take, n), store_part(x + size, keep, n), store_part(x + 2 * size, candidate, n);
  store_part(x + 3 * size, show, n);
  store_part(r.inner + at.row * 2 * size + at.u, next, n);
}

// Blocks [begin, end) of a step.
template <class T, Unit U>
void recurrent(const Recurrence<T>& r, int64_t step, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>, G = kGates<U>;
  const T* states = r.states + step % 2 * r.batch * row_of(r.padded);
  for (int64_t k = 0; k < end - begin; ++k) {
    const int64_t block = there_and_back(step, k, begin, end);
    const int64_t u = block * W, n = r.size - u < W ? r.size - u : W;
    panel_product<T, G>(
        {states, row_of(r.padded), r.packed + block * r.size * G * W, r.size}, 0, r.rows_at(step),
        [&](int64_t, Vec<T>(&sum)[G]) { UNROLL for (int g = 0; g < G; ++g) sum[g] = load(r.bias + g * r.padded + u); },
        [&](int64_t b) {
          for (int g = 0; g < G; ++g) fetch(r.gates + ((r.row_at(step) - r.gates_base + b) * G + g) * r.size + u);
        },
        [&](int64_t b, const Vec<T>(&sum)[G]) {
          const Units at{step, b, r.row_at(step) + b, u, n};
          if constexpr (U == Unit::kGru) {
            gated_unit<T>(r, at, sum);
          } else {
            memory_unit<T>(r, at, sum);
          }
        });
  }
}

// ------------------------------------------------------------------------------------------------- backward

// What is kept of a row of the step before, or null where a step is the first of its row.
template <class T>
inline const T* inner_before(const Recurrence<T>& r, const Units& at) {
  const bool there = at.b < r.rows_at(at.step - 1);
  return there ? r.inner + (r.row_at(at.step - 1) + at.b) * 2 * r.size + at.u : nullptr;
}
template <class T>
inline const T* state_before(const Recurrence<T>& r, const Units& at) {
  const T* inner = inner_before(r, at);
  return inner ? inner + r.size : r.hidden + at.b * r.size + at.u;
}

template <class T>
inline void add_part(T* sum, Vec<T> x, int64_t n) {
  store_part<T>(sum, load_part(sum, n) + x, n);
}

template <class T>
inline void put_gradients(const Recurrence<T>& r, const Units& at, const Vec<T> (&grads)[4]) {
  T* out = r.grads_at(at.step) + at.b * 4 * r.size + at.u;
  for (int g = 0; g < 4; ++g) {
    store_part(out + g * r.size, grads[g], at.n);
    add_part(r.grad_bias + g * r.size + at.u, grads[g], at.n);
  }
}

// The gradients of a unit's gates from that of its state; what of it goes straight on is kept in `carried`.
template <class T>
inline void gated_gradient(const Recurrence<T>& r, const Units& at, Vec<T> grad) {
  const int64_t size = r.size, n = at.n;
  const T* gates = r.gates + (at.row - r.gates_base) * 3 * size + at.u;
  const Vec<T> reset = load_part(gates, n), update = load_part(gates + size, n);
  const Vec<T> candidate = load_part(gates + 2 * size, n), projected = load_part(r.inner + at.row * 2 * size + at.u, n);
  const Vec<T> before = load_part(state_before(r, at), n);
  const Vec<T> of_candidate = grad * (T(1) - update) * (T(1) - candidate * candidate);
  const Vec<T> of_update = grad * (before - candidate) * update * (T(1) - update);
  const Vec<T> of_reset = of_candidate * projected * reset * (T(1) - reset);
  const Vec<T> grads[4] = {of_candidate * reset, of_reset, of_update, of_candidate};
  store<T>(r.carried + at.b * row_of(r.padded) + at.u, grad * update);
  store_part(r.previous + (at.row - r.grad_base) * size + at.u, before, n);
  put_gradients(r, at, grads);
}

template <class T>
inline void memory_gradient(const Recurrence<T>& r, const Units& at, Vec<T> grad) {
  const int64_t size = r.size, n = at.n;
  const T* gates = r.gates + (at.row - r.gates_base) * 4 * size + at.u;
  const Vec<T> take = load_part(gates, n), keep = load_part(gates + size, n),
               candidate = load_part(gates + 2 * size, n);
  const Vec<T> show = load_part(gates + 3 * size, n), shown = tanh<T>(load_part(r.inner + at.row * 2 * size + at.u, n));
  const T* inner = inner_before(r, at);
  const T* cell = inner ? inner : r.cell + at.b * size + at.u;
  T* carried = r.carried + at.b * row_of(r.padded) + at.u;
  const Vec<T> coming = at.b < r.rows_at(at.step + 1) ? load(carried)
                        : r.grad_last_cell            ? load_part(r.grad_last_cell + at.b * size + at.u, n)
                                                      : Vec<T>{};
  const Vec<T> of_cell = coming + grad * show * (T(1) - shown * shown);
  const Vec<T> grads[4] = {of_cell * candidate * take * (T(1) - take),
                           of_cell * load_part(cell, n) * keep * (T(1) - keep),
                           of_cell * take * (T(1) - candidate * candidate), grad * shown * show * (T(1) - show)};
  store<T>(carried, of_cell * keep);
  store_part(r.previous + (at.row - r.grad_base) * size + at.u, load_part(state_before(r, at), n), n);
  put_gradients(r, at, grads);
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

// Blocks [begin, end) of a step of the backward pass, from the last step down to -1, which is what comes before all.
template <class T, Unit U>
void recurrent_backward(const Recurrence<T>& r, int64_t step, int64_t begin, int64_t end) {
  constexpr int W = kLanes<T>, N = kPanelVectors;
  const int64_t coming = r.rows_at(step + 1), depth = kGates<U> * r.size;
  const T* grads = r.grads_at(step + 1);
  for (int64_t k = 0; k < end - begin; ++k) {
    const int64_t block = there_and_back(step, k, begin, end);
    const auto take = [&](int64_t b, const Vec<T>(&sum)[N]) {
      for (int n = 0; n < N; ++n) {
        const int64_t u = (block * N + n) * W;
        if (u >= r.size) break;
        state_gradient<T, U>(r, {step, b, r.row_at(step) + b, u, r.size - u < W ? r.size - u : W}, sum[n]);
      }
    };
    const auto nothing = [](int64_t, Vec<T>(&sum)[N]) { UNROLL for (int n = 0; n < N; ++n) sum[n] = Vec<T>{}; };
    const auto soon = [&](int64_t b) {
      if (b >= r.rows_at(step)) return;
      const int64_t row = r.row_at(step) + b;
      for (int64_t u = block * N * W; u < (block + 1) * N * W && u < r.size; u += W) {
        for (int g = 0; g < kGates<U>; ++g) fetch(r.gates + (row * kGates<U> + g) * r.size + u);
        fetch(r.inner + row * 2 * r.size + u);
        if (r.grad_output) fetch(r.grad_output + row * r.output_row + u);
        const T* before = inner_before(r, {step, b, row, u, W});
        if (!before) continue;
        fetch(before + r.size);
        if (U == Unit::kLstm) fetch(before);
      }
    };
    panel_product<T, N>({grads, 4 * r.size, r.packed + block * depth * N * W, depth}, 0, coming, nothing, soon, take);
    for (int64_t b = coming; b < r.rows_at(step); ++b) {
      const Vec<T> none[N] = {};
      take(b, none);
    }
  }
}

template <class T, Unit U>
constexpr RecurrentKernels<T> recurrent_kernels() {
  return {kLanes<T>,       kPanelVectors * kLanes<T>, pack_forward<T, U>,
          recurrent<T, U>, pack_backward<T, U>,       recurrent_backward<T, U>};
}

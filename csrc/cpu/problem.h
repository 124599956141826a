// What the launcher hands to the kernels of one instruction set. B batch, Tq queries, Tk keys, D features, H
// value size.
#pragma once

#include <cstdint>

// However such a flag came here: tests for NaN and infinity would be deleted, sums reordered.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "attnext can't be built with -ffast-math, -Ofast or -ffinite-math-only: its results would be wrong"
#endif

namespace attnext::cpu {

enum class Type : int8_t { kFloat, kDouble, kHalf, kBFloat16 };
template <class T>
constexpr Type kTypeOf = sizeof(T) == 4 ? Type::kFloat : Type::kDouble;

// Exponentials are padded with zeros to a multiple of this many features (FEATURE_BLOCK in ops.py): two of
// the widest float vectors, so that features always come in pairs of vectors.
constexpr int64_t kFeatureBlock = 32;
// Value rows are padded to the widest vector, in either type.
constexpr int64_t kValueBlock = 16;
constexpr int64_t kQueryBlock = 16;   // queries of one forward task
constexpr int64_t kKeyTile = 64;      // keys scored at a time
constexpr int64_t kGradQueries = 32;  // queries and keys of one step of a backward task
constexpr int64_t kGradKeyTile = 32;
// Pairs whose r a backward task keeps: two queries, and as many keys as the widest vector has lanes.
constexpr int64_t kKept = 32;
// Filters of up to so many places are laid on the past one by one, in the backward pass of a step.
constexpr int64_t kFewPlaces = 4;
constexpr int64_t kStepKeys = 24;  // keys of a step whose sums are in the cache at a time: whole tiles of the products
constexpr int64_t kAheadBytes = 384 * 1024;  // of values that a second-level cache of half a MiB keeps
// Two ways to a score differ by some roundings of sum |w|, by which p is then off. Up to this sum that is a few ulps.
constexpr int kSmallWeights = 32;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The distance of rows of n numbers in scratch memory: off the powers of two, on which the same column of many rows
// would fall on the same few places of the cache.
constexpr int64_t row_of(int64_t n) { return n + 16; }

// A (B, T, n) tensor of any strides, in elements.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, row = 0, element = 0;
  Type type = Type::kFloat;
};

// A (B, Tq, Tk) bool tensor; the query stride is 0 for a (B, Tk) mask.
struct Mask {
  const bool* data = nullptr;
  int64_t batch = 0, query = 0, key = 0;
};

// A folded feature y = c (1 + E F) is at least unit in size, so that a product of four is normal, and finite while y <=
// 2^31.75 (2^255.75 in double): of a binary logarithm of so many bits the larger of c / unit has a part, E F the rest.
template <class T>
struct Folding {
  static constexpr T unit = sizeof(T) == 4 ? T(0x1p-31) : T(0x1p-255), bits = sizeof(T) == 4 ? T(61.5) : T(509);
};

// What the kernels take of a score weight v (D,), rows of padded numbers; T as below.
template <class T>
struct ScoreWeight {
  const T* weight;  // w = -2 scale v, zero in the padding
  const T* gain;    // 4 scale v, zero in the padding
  const T* fold;    // c = unit max |w| / w, or 0 for a w too small to count
  const T* offset;  // c again, or 1 / unit where fold is 0
  T limit;          // max |w|, NaN if one is
  T size;           // sum |w|
  T constant;       // scale * sum v
  T plain_limit;    // |q| + |k| up to which four folded features share a division
};

// T is the arithmetic: float, or double for double inputs.
template <class T>
struct Problem {
  int64_t batch, queries, keys, features, padded, values, padded_values;
  Rows query, key, value;
  const int64_t* lengths;
  Mask mask;
  T scale;                  // of the scores
  T keep_scale;             // 1 / (1 - dropout)
  uint64_t keep_threshold;  // a weight is kept where its 32 random bits are at least this; 0 is no dropout
  uint64_t seed;
  // Of dot products alone:
  bool shared;  // the keys are the values
  // Of additive scores; dot products have a gain alone, the scale:
  const ScoreWeight<T>* heads;  // those of batch rows 0, 1, ..., and again from the first
  int64_t head_count;
  ScoreWeight<T> v;    // that of the row at work
  Rows exp_key;        // (B, Tk, padded), contiguous: F = exp(2 k)
  const T* key_limit;  // (B, Tk): max |k|, infinity where the exponentials of a row are not all normal
};

template <class T>
struct Forward {
  Problem<T> problem;
  Rows context, weights;  // weights.data may be null
  T* wide;                // (B, Tq, Tk): the weights before dropout; may be null
  T* log_sum_exp;         // (B, Tq), of additive scores less their constant scale * sum v
};

template <class T>
struct Scores {
  Problem<T> problem;
  Rows scores;
};

// A task of the backward pass owns the keys [k0, k1) of one batch row, so that no two tasks add to one
// number.
template <class T>
struct Backward {
  Problem<T> problem;
  int64_t splits, split_keys;  // tasks a batch row, keys a task
  bool from_scores;            // the incoming gradient is that of the scores
  Rows grad_weights;           // or of the scores; data may be null
  const T* query;              // (B, Tq, row_of(padded)): scale q; of additive scores E = exp(2 q), and a row more
  const T* query_limit;        // (B, Tq): max |q|, of additive scores
  const T* grad_context;       // (B, Tq, row_of(padded_values)), zero-padded; null where none comes in
  const T* log_sum_exp;        // (B, Tq); null with from_scores
  const T* delta;              // (B, Tq): sum_j p dp; null with from_scores
  Rows grad_key, grad_value;
  T* grad_query;   // (splits, B, Tq, row_of(padded)) partial sums, not yet times the gain
  T* grad_weight;  // (B, splits, padded) partial sums of ds (1 - 2r), of additive scores
};

// What makes weights of the scores of a step, as RULES in ops.py counts them.
enum class Rule : int64_t { kSoftmax, kSigmoid, kForward };

// Additive attention of one query, or of the hypotheses of a beam, each with past weights that filters see: the sum
// inside the tanh is q + k_j + L f_j. Without filters, or without L, which is then 1.
template <class T>
struct Step {
  Problem<T> problem;
  Rule rule;
  int64_t channels, width;               // of the filters; no channel is no filter
  int64_t filter_count, padded_filters;  // without L as many as features
  int64_t padded_width;                  // of a channel, in filters_by_count
  const T* filters;                      // (channels, width, padded_filters)
  const T* filters_by_count;             // (channels, filter_count, padded_width), for the backward pass
  const T* projection;                   // (filter_count, padded): L; null without
  const T* projection_by_feature;        // (padded, padded_filters), for the backward pass
  Rows past[2], previous, transition;    // (B, Tq, Tk), and (B, Tq, 1); of T
  const int64_t* window;                 // (B, Tq, 2): the first key and the one after the last; may be null
};

template <class T>
struct StepForward {
  Step<T> step;
  Rows context;
  T* weights;  // (B, Tq, Tk)
};

// A task of the backward pass is a few batch rows.
template <class T>
struct StepBackward {
  Step<T> step;
  int64_t tasks;
  const T* weights;                       // (B, Tq, Tk)
  Rows grad_context, grad_weights;        // data may be null
  Rows grad_query, grad_key, grad_value;  // data of the value's may be null
  bool adds;                              // to grad_key, a sum of T, instead of writing it
  bool drops_weights;                     // what comes in for weights is for those after dropout
  T* kept;                                // (B, Tq, Tk): what the value's gradient takes of each context's; may be null
  T* ds;                                  // (B, Tq, Tk): the scores' gradients, for the query's alone
  T *grad_weight, *grad_filters, *grad_projection;  // (tasks, ...) sums: (padded), as filters, as projection
  Rows grad_past[2], grad_previous, grad_transition;
};

// The rows [begin, end) of a (B, T, n) tensor, counted over B and T, made into exponentials; hidden rows
// become 0.
template <class T>
struct Exponentials {
  Rows input;
  int64_t batch, rows, features, padded;
  const int64_t* lengths;  // may be null
  Mask mask;               // (B, 1, T); data may be null
  T* output;               // (B, T, output_row), the first padded of each row
  int64_t output_row;
  T* limit;  // (B, T)
};

// The k-th of [begin, end), every other time from the end: what was read last is read first, and is still in the cache.
inline int64_t there_and_back(int64_t time, int64_t k, int64_t begin, int64_t end) {
  return time & 1 ? end - 1 - k : begin + k;
}

enum class Unit : int8_t { kGru, kLstm };

// One direction of a recurrent layer over a packed batch of B sequences of S units, longest first, of G gates each.
// Steps are counted in the order in which they are taken; those before the first and after the last have no rows. What
// has a base holds the rows of a stretch of steps alone, from that one on.
template <class T>
struct Recurrence {
  int64_t rows_at(int64_t step) const { return step >= 0 && step < steps ? sizes[time(step)] : 0; }
  int64_t row_at(int64_t step) const { return step >= 0 && step < steps ? offsets[time(step)] : 0; }
  int64_t time(int64_t step) const { return reverse ? steps - 1 - step : step; }
  // The gradients of a step's gates.
  T* grads_at(int64_t step) const {
    return step < after ? grad_gates + (row_at(step) - grad_base) * 4 * size
                        : grad_gates_after + (row_at(step) - grad_base_after) * 4 * size;
  }

  int64_t batch, size, padded, steps;  // padded: S in whole blocks of either pass
  bool reverse;
  const int64_t *sizes, *offsets;  // of each time: how many sequences reach it, and the row of the first
  const T *weight, *bias;          // (G S, S); (4, padded): sums of both biases, a gated unit's candidate apart: the
                                   // state's and the input's
  T* packed;                       // the matrix as a pass reads it
  const T *hidden, *cell;          // (B, S): before the first step
  int64_t output_row;              // of output and its gradient
  T* output;                       // (rows, S), of the forward pass
  T* gates;  // (rows, G S): what the inputs add; once a step is done, where there is an inner, the gates themselves
  int64_t gates_base;
  T* inner;  // (rows, 2 S): the projected state of the candidate, or the cell; the state. Null where nothing is kept

  T *states, *cells;           // (2, B, row_of(padded)), even and odd steps; (B, row_of(padded))
  T *last_hidden, *last_cell;  // (B, S)

  const T *grad_output, *grad_last_hidden, *grad_last_cell;  // may be null
  T* carried;           // (B, row_of(padded)): to the step before, beside the product; of an LSTM the cell's
  T* grad_gates;        // (rows, 4 S): projected candidate, reset, update, candidate; or as the gates
  T* grad_gates_after;  // of the stretch after this one, which begins with step `after`
  int64_t grad_base, grad_base_after, after;
  T* previous;                 // (rows, S), from grad_base: the states before each step
  T* grad_bias;                // (4 S): the sum of grad_gates
  T *grad_hidden, *grad_cell;  // (B, S)
};

// Blocks of units of the forward pass and of the backward pass.
template <class T>
struct RecurrentKernels {
  int64_t block, grad_block;
  void (*pack)(const Recurrence<T>&, int64_t begin, int64_t end);
  void (*step)(const Recurrence<T>&, int64_t step, int64_t begin, int64_t end);
  void (*pack_backward)(const Recurrence<T>&, int64_t begin, int64_t end);
  void (*step_backward)(const Recurrence<T>&, int64_t step, int64_t begin, int64_t end);
};

// A matrix of `columns` columns that rows of `depth` numbers are multiplied with at each step; its numbers any distance
// apart.
template <class T>
struct Dense {
  const T* data;
  int64_t depth, columns, row, column;
  T* packed;
};

// out = a M, of so many rows.
template <class T>
struct DenseProduct {
  const Dense<T>* matrix;
  const T* a;
  int64_t a_row, rows;
  T* out;
  int64_t out_row;
  bool adds;        // to what is there, and then without a bias
  const T* bias;    // (columns), may be null
  bool tanh;        // of the sums
  const T* factor;  // of each sum before it is added, in rows as those of out; may be null
};

template <class T>
struct Kernels {
  void (*exponentials)(const Exponentials<T>&, int64_t begin, int64_t end);
  void (*forward)(const Forward<T>&, int64_t task, T* scratch);
  void (*scores)(const Scores<T>&, int64_t task, T* scratch);
  void (*backward)(const Backward<T>&, int64_t task, T* scratch);
  // delta, and grad_context in T and zero-padded, from the rows of the outputs and their gradients.
  void (*delta)(const Backward<T>&, const Rows& context, const Rows& grad_context, const Rows& weights, T* padded_grad,
                T* delta, int64_t begin, int64_t end);
  void (*finish_query)(const Backward<T>&, const Rows& grad_query, T* scratch, int64_t begin, int64_t end);
  void (*dot_forward)(const Forward<T>&, int64_t task, T* scratch);
  void (*dot_backward)(const Backward<T>&, int64_t task, T* scratch);
  // The queries [begin, end), counted over B and Tq, times the scale: (B, Tq, row_of(padded)), zero-padded.
  void (*dot_queries)(const Problem<T>&, int64_t begin, int64_t end, T* scaled);
  void (*step)(const StepForward<T>&, int64_t task, T* scratch);  // a task is a query
  void (*step_backward)(const StepBackward<T>&, int64_t task, T* scratch);
  void (*query_scores)(const Scores<T>&, int64_t task, T* scratch);  // a task is a query
  // Of attention's step the gradients of a query and of its scores; a task is a query.
  void (*query_backward)(const StepBackward<T>&, int64_t task, T* scratch);
  void (*dot_query_backward)(const StepBackward<T>&, int64_t task, T* scratch);
  RecurrentKernels<T> gru, lstm;
  int64_t dense_block;  // columns of a panel
  void (*pack_dense)(const Dense<T>&, int64_t begin, int64_t end);
  void (*dense)(const DenseProduct<T>&, int64_t time, int64_t begin, int64_t end);
};

// Whether a tile of keys, or of F, is copied for its scores: of dot products where the values don't have them anyway,
// of F where it is held in a half type.
template <class T>
bool copies_keys(const Problem<T>& p) {
  return p.exp_key.data ? p.exp_key.type != kTypeOf<T> : !p.shared;
}

// Elements of T that one task needs as scratch.
template <class T>
int64_t forward_scratch(const Problem<T>& p, bool weights) {
  const int64_t rows = kQueryBlock * (2 * row_of(p.padded) + row_of(p.padded_values) + kKeyTile +
                                      (weights ? round_up(p.keys, kKeyTile) : 0));
  return rows + (copies_keys(p) ? kKeyTile * row_of(p.padded) : 0) + kKeyTile * row_of(p.padded_values) +
         3 * kQueryBlock + 2 * p.padded;
}
template <class T>
int64_t backward_scratch(const Problem<T>& p) {
  return kGradQueries * (row_of(p.padded) + 4 * kGradKeyTile) +
         kGradKeyTile * (row_of(p.padded) + 2 * row_of(p.padded_values)) + 4 * p.padded + kKept * p.padded +
         (copies_keys(p) ? kGradKeyTile * row_of(p.padded) : 0);
}

// A row of past weights with zeros on both sides: filters look beyond the ends, and a tile takes whole vectors.
template <class T>
int64_t past_row(const Step<T>& s) {
  return round_up(s.problem.keys + s.padded_width + kStepKeys, kValueBlock);
}
// A row of scores or weights, with room for whole tiles and vectors.
template <class T>
int64_t slots_row(const Problem<T>& p) {
  return round_up(p.keys, kKeyTile) + kKeyTile;
}
// A row of the product of features' gradients and filters, or a tile of those with one place.
template <class T>
int64_t spread_row(const Step<T>& s) {
  return s.padded_width > kValueBlock ? s.padded_width : kValueBlock;
}
// Of a tile of keys: its sums, its features, its values.
template <class T>
int64_t step_tile_scratch(const Step<T>& s) {
  const Problem<T>& p = s.problem;
  return kStepKeys * (row_of(p.padded) + s.padded_filters) + kKeyTile * row_of(p.padded_values);
}
template <class T>
int64_t step_scratch(const Step<T>& s) {
  const Problem<T>& p = s.problem;
  return step_tile_scratch(s) + p.padded + s.channels * past_row(s) + 2 * slots_row(p) + row_of(p.padded_values);
}
// Of a query in the backward pass.
template <class T>
int64_t step_query_scratch(const Step<T>& s) {
  const Problem<T>& p = s.problem;
  return 2 * p.padded + 2 * s.channels * past_row(s) + 3 * slots_row(p) + row_of(p.padded_values);
}
template <class T>
int64_t query_backward_scratch(const Step<T>& s) {
  const Problem<T>& p = s.problem;
  return step_tile_scratch(s) + kKeyTile * row_of(p.padded) + 2 * p.padded + step_query_scratch(s) + 2 * slots_row(p);
}
template <class T>
int64_t step_backward_scratch(const Step<T>& s) {
  const Problem<T>& p = s.problem;
  const int64_t by_tile = kStepKeys * (row_of(p.padded) + s.padded_filters + spread_row(s));
  return step_tile_scratch(s) + by_tile + kKeyTile * row_of(p.padded_values) + p.queries * step_query_scratch(s) +
         2 * slots_row(p);
}

struct InstructionSet {
  const char* name;
  bool (*supported)();
  int64_t (*multiply_adds)(int64_t rounds);
  Kernels<float> of_float;
  Kernels<double> of_double;
};
extern const InstructionSet kV4, kV3, kPortable;

}  // namespace attnext::cpu

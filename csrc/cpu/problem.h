// What the launcher hands to the kernels of one instruction set. B batch, Tq queries, Tk keys, D features, H
// value size.
#pragma once

#include <cstdint>

namespace attnext::cpu {

enum class Type : int8_t { kFloat, kDouble, kHalf, kBFloat16 };

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
  const T* exp_key;    // (B, Tk, padded): F = exp(2 k)
  const T* key_limit;  // (B, Tk): max |k|, infinity where a row is not finite
};

template <class T>
struct Forward {
  Problem<T> problem;
  Rows context, weights;  // weights.data may be null
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
  const T* grad_context;       // (B, Tq, row_of(padded_values)), zero-padded; null with from_scores
  const T* log_sum_exp;        // (B, Tq); null with from_scores
  const T* delta;              // (B, Tq): sum_j p dp; null with from_scores
  Rows grad_key, grad_value;
  bool adds;       // to grad_key and grad_value, sums of T, instead of writing them
  T* grad_query;   // (splits, B, Tq, row_of(padded)) partial sums, not yet times the gain
  T* grad_weight;  // (B, splits, padded) partial sums of ds (1 - 2r), of additive scores
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
};

// Elements of T that one task needs as scratch.
template <class T>
int64_t forward_scratch(const Problem<T>& p, bool weights) {
  const int64_t rows = kQueryBlock * (2 * row_of(p.padded) + row_of(p.padded_values) + kKeyTile +
                                      (weights ? round_up(p.keys, kKeyTile) : 0));
  const int64_t keys = p.exp_key || p.shared ? 0 : kKeyTile * row_of(p.padded);  // of dot products
  return rows + keys + kKeyTile * row_of(p.padded_values) + 4 * kQueryBlock + 2 * p.padded;
}
template <class T>
int64_t backward_scratch(const Problem<T>& p) {
  return kGradQueries * (row_of(p.padded) + 4 * kGradKeyTile) +
         kGradKeyTile * (row_of(p.padded) + 2 * row_of(p.padded_values)) + 4 * p.padded + kKept * p.padded;
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

// What a launch is about: sizes and addresses, without a word of torch.
#pragma once

#include <cstdint>

namespace attnext::cuda {

// Queries of a block; keys are padded to a multiple of kKeyBlock.
constexpr int kQueryBlock = 16;
constexpr int kKeyBlock = 128;
// Queries that backward takes at a time, at least, whatever D and H: fewer would be many launches.
constexpr int kLeastSlab = 128;
// Pairs of features that a block holds in shared memory at a time; their number is padded to a multiple.
constexpr int kPairChunk = 8;
constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = 32 * kWarpsPerBlock;
// At least so many fit a multiprocessor by their registers: 128 registers a thread, or 168. Left alone, the compiler
// spills a few to fit one more block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerMultiprocessor = 3;
#else
constexpr int kBlocksPerMultiprocessor = 4;
#endif

// A folded y is at least kUnit in size and at most 2^63 where a tile is near: the product of two stays a normal number.
constexpr float kUnit = 0x1p-62f;
constexpr float kFoldBits = 124.5f;
// |q| + |k| up to which the product of two x = 1 + E F is finite.
constexpr float kPlain = 21.5f;
constexpr float kMaxWeight = 0x1p30f;

// Rows of a tensor (B, T, n) by strides in elements.
template <class T>
struct Rows {
  const T* data;
  int64_t batch, row, column;

  __device__ const T* at(int64_t b, int64_t t) const { return data + b * batch + t * row; }
};

// Who may be attended: lengths (B,) or null, mask (B, Tq or 1, Tk) by strides or null.
struct Slots {
  const int64_t* lengths;
  const bool* mask;
  int64_t mask_batch, mask_query, mask_key;

  // Whatever stands on the device, no key beyond the last is read.
  __device__ int length(int64_t b, int keys) const {
    return lengths ? int(max(int64_t(0), min(lengths[b], int64_t(keys)))) : keys;
  }
  __device__ bool shows(int64_t b, int i, int j) const {
    return !mask || mask[b * mask_batch + i * mask_query + j * mask_key];
  }
};

// Of dropout: a weight is kept where its hash is at least the threshold; nothing is dropped where there is no seed.
struct Dropout {
  const int64_t* seed;
  uint64_t threshold;
  float gain;
};

// Score weights as fold_weight leaves them, a head behind the other: the first is at `data`.
struct Weights {
  const float* data;
  int pairs, heads;

  // Of one.
  __host__ __device__ static constexpr int64_t numbers(int64_t pairs) { return 4 + 6 * pairs; }
  // That of row b of the batch.
  __device__ Weights of_row(int64_t b) const { return {data + int(b) % heads * numbers(pairs), pairs, heads}; }

  // max|w|; |q| + |k| up to which folding is safe; scale * sum v.
  __device__ const float* limits() const { return data; }
  // w = -2 scale v by feature (2 pairs, 0 in the padding).
  __device__ const float* times() const { return data + 4; }
  // (pairs, 2): c = unit max|w| / w, or 0 where w is too small to count.
  __device__ const float* fold() const { return data + 4 + 2 * pairs; }
  // (pairs, 2): c, or 1 / unit there.
  __device__ const float* offset() const { return data + 4 + 4 * pairs; }
};

// Features d and d + pairs stand together, as two floats.
template <class T>
struct Problem {
  Rows<T> query, key;
  Weights weights;
  const float* exp_query;    // (B, pairs, query_rows, 2): c E
  const float* exp_key;      // (B, pairs, key_rows, 2): F, 0 in hidden rows
  const float* query_limit;  // (B, query_rows): max|q|, infinity where a row is not finite
  const float* key_limit;    // (B, key_rows): the same, -1 in hidden rows
  Slots slots;
  Dropout dropout;
  int batch, queries, keys, features, values;
  int pairs, query_rows, key_rows;
  float scale;  // of dot products, which have nothing of v, the exponentials and the limits
};

}  // namespace attnext::cuda

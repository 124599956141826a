// Vectors of one instruction set, as GCC's and Clang's vector extension. Included once an instruction set,
// inside its namespace; kVectorBytes and kRegisters are defined there.

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = x;
}
template <class T>
inline void add_to(T* p, Vec<T> x) {
  store<T>(p, load(p) + x);
}

// Has bytes come into the second-level cache. (By an instruction: GCC takes a function that does no more than the
// built-in for one without effect, and leaves its calls out.)
inline void fetch_ahead(const void* at, int64_t bytes) {
  const char* x = static_cast<const char*>(at);
  for (int64_t line = 0; line < bytes; line += 64) {
#if defined(__x86_64__)
    asm volatile("prefetcht1 %0" ::"m"(x[line]));
#else
    __builtin_prefetch(x + line, 0, 2);
#endif
  }
}

// min(limit, x) and max(limit, x), NaN for a NaN of x: one instruction each, of which the compiler makes two.
template <class T>
inline Vec<T> at_most(Vec<T> limit, Vec<T> x) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes > 16 && sizeof(T) == 4) {
    asm("vminps %1, %2, %0" : "=v"(x) : "vm"(x), "v"(limit));
    return x;
  } else if constexpr (kVectorBytes > 16) {
    asm("vminpd %1, %2, %0" : "=v"(x) : "vm"(x), "v"(limit));
    return x;
  }
#endif
  return limit < x ? limit : x;
}
template <class T>
inline Vec<T> at_least(Vec<T> limit, Vec<T> x) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes > 16 && sizeof(T) == 4) {
    asm("vmaxps %1, %2, %0" : "=v"(x) : "vm"(x), "v"(limit));
    return x;
  } else if constexpr (kVectorBytes > 16) {
    asm("vmaxpd %1, %2, %0" : "=v"(x) : "vm"(x), "v"(limit));
    return x;
  }
#endif
  return limit > x ? limit : x;
}

// 1 / x of a normal x whose reciprocal is normal, to about an ulp. The division of 16 floats takes as long as a dozen
// multiply-adds; an estimate of 14 bits and a Newton step take the time of three.
template <class T>
inline Vec<T> reciprocal(Vec<T> x) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && sizeof(T) == 4) {
    Vec<T> r;
    asm("vrcp14ps %1, %0" : "=v"(r) : "vm"(x));
    return r + r * (T(1) - x * r);
  }
#endif
  return T(1) / x;
}

// n / x of such an x.
template <class T>
inline Vec<T> quotient(Vec<T> n, Vec<T> x) {
  if constexpr (kVectorBytes == 64 && sizeof(T) == 4) return n * reciprocal<T>(x);
  return n / x;
}

// Constants of the arithmetic. A product of two x = 1 + E F is finite while x <= cap, also times a weight up to
// max_weight. Exponentials are normal within max_argument.
template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float max_argument = 43.f, cap = 0x1p60f, max_weight = 0x1p30f;
  static constexpr float exp_low = -86.f, exp_high = 88.f, magic = 0x1.8p23f;
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f, log2e = 0x1.715476p0f;
  static constexpr float largest = 0x1.fffffep127f;
  static constexpr float steep = 86.f, flat = 20.f;  // beyond, a sigmoid is 0 or 1 and tanh of the half is -1 or 1
  static constexpr int mantissa = 23, degree = 7;
};
template <>
struct Limits<double> {
  static constexpr double max_argument = 350., cap = 0x1p500, max_weight = 0x1p200;
  static constexpr double exp_low = -707., exp_high = 709., magic = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33, log2e = 0x1.71547652b82fep0;
  static constexpr double largest = 0x1.fffffffffffffp1023;
  static constexpr double steep = 700., flat = 40.;
  static constexpr int mantissa = 52, degree = 13;
};

// 1/k!: the Taylor series of exp on [-ln2/2, ln2/2] is below an ulp at degree 7 in float and 13 in double.
constexpr double inverse_factorial(int k) { return k < 2 ? 1. : inverse_factorial(k - 1) / k; }
template <class T, int K>
inline Vec<T> exp_series(Vec<T> x) {
  constexpr T coefficient = T(inverse_factorial(K));
  if constexpr (K == Limits<T>::degree) {
    return Vec<T>{} + coefficient;
  } else {
    return exp_series<T, K + 1>(x) * x + coefficient;
  }
}

// exp(x) to about an ulp; 0 below exp_low, saturated above exp_high, NaN for NaN.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using L = Limits<T>;
  using Bits = typename VecOf<T>::bits;
  const Vec<T> low = Vec<T>{} + L::exp_low, high = Vec<T>{} + L::exp_high;
  const auto vanishes = x < low;
  x = vanishes ? low : x;
  x = x > high ? high : x;
  const Vec<T> shifted = x * L::log2e + L::magic;  // the integer part of x / ln2 stands in the low bits
  const Vec<T> n = shifted - L::magic;
  const Vec<T> rest = x - n * L::ln2_high - n * L::ln2_low;
  const Vec<T> series = exp_series<T, 0>(rest);
  const Vec<T> result = (Vec<T>)((Bits)series + ((Bits)shifted << L::mantissa));
  return vanishes ? Vec<T>{} : x == x ? result : x;
}

// From vectors of sums, in groups of G lanes, the vector whose groups are half as wide: those of x, then
// those of y.
template <class T, int G, int... L>
inline Vec<T> halve(Vec<T> x, Vec<T> y, std::integer_sequence<int, L...>) {
  constexpr int W = kLanes<T>, H = W / 2;
#define LANE(l) ((l) < H ? 0 : W) + ((l) % H) / (G / 2) * G + ((l) % H) % (G / 2)
  return __builtin_shufflevector(x, y, (LANE(L))...) + __builtin_shufflevector(x, y, (LANE(L) + G / 2)...);
#undef LANE
}

// Lane k of the result is the sum of all lanes of x[k]: N - 1 additions for N sums. x is used up.
template <class T, int G = kLanes<T>>
[[gnu::always_inline]] inline Vec<T> lane_sums(Vec<T>* x) {
  if constexpr (G == 1) {
    return x[0];
  } else {
    for (int k = 0; k < G / 2; ++k)
      x[k] = halve<T, G>(x[2 * k], x[2 * k + 1], std::make_integer_sequence<int, kLanes<T>>{});
    return lane_sums<T, G / 2>(x);
  }
}

// Rows of tensors of any dtype and stride, as contiguous T and back.

// The bits of a half as a float: the exponent is rebased by a multiplication, which also makes subnormals
// right.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = (uint32_t(half) & 0x7fffu) << 13, sign = (uint32_t(half) & 0x8000u) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, 4);
  scaled *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, 4);
  bits |= sign | ((half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest even, in integers; NaN stays NaN.
inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
  if (bits < 0x38800000u) {  // below 2^-14: added to a number whose last place is that of a subnormal half
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    __builtin_memcpy(&rounded, &magnitude, 4);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

template <class T, class Stored, class Convert>
inline void load_as(const void* data, int64_t stride, int64_t n, T* out, const Convert& convert) {
  const Stored* x = static_cast<const Stored*>(data);
  if (stride == 1) {
    for (int64_t k = 0; k < n; ++k) out[k] = T(convert(x[k]));
  } else {
    for (int64_t k = 0; k < n; ++k) out[k] = T(convert(x[k * stride]));
  }
}

// Numbers of the half types as they lie in memory, of which vectors are loaded as float, by one instruction or two.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
typedef uint16_t HalfLine __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
inline Vec<float> load(const BFloat16* x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
#if defined(__x86_64__)
  if constexpr (kVectorBytes > 16) {  // of the builtin below GCC makes this number by number
    Bits line;
    asm("vpmovzxwd %1, %0" : "=v"(line) : "m"(*reinterpret_cast<const HalfLine*>(x)));
    return (Vec<float>)(line << 16);
  }
#endif
  return (Vec<float>)(__builtin_convertvector(*reinterpret_cast<const HalfLine*>(x), Bits) << 16);
}
inline Vec<float> load(const Half* x) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes > 16) {
    Vec<float> line;
    asm("vcvtph2ps %1, %0" : "=v"(line) : "m"(*reinterpret_cast<const HalfLine*>(x)));
    return line;
  }
#endif
  Vec<float> line;
  for (int k = 0; k < kLanes<float>; ++k) line[k] = half_to_float(x[k].bits);
  return line;
}

inline bool is_half_type(Type type) { return type == Type::kHalf || type == Type::kBFloat16; }

// Calls f with numbers of a half type by their own type.
template <class F>
inline void with_half_type(Type type, const void* data, const F& f) {
  if (type == Type::kHalf) return f(static_cast<const Half*>(data));
  f(static_cast<const BFloat16*>(data));
}

// n numbers of a half type, whole vectors of them at a time where they lie together.
template <class T, class Stored, class Convert>
inline void load_half_type(const void* data, int64_t stride, int64_t n, T* out, const Convert& convert) {
  const Stored* x = static_cast<const Stored*>(data);
  int64_t k = 0;
  if constexpr (sizeof(T) == 4)
    for (; stride == 1 && k + kLanes<T> <= n; k += kLanes<T>) store<T>(out + k, load(x + k));
  load_as<T, uint16_t>(x + k * stride, stride, n - k, out + k, convert);
}

inline int64_t bytes(Type type) { return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2; }

inline char* row_address(const Rows& rows, int64_t b, int64_t t) {
  return static_cast<char*>(rows.data) + (b * rows.batch + t * rows.row) * bytes(rows.type);
}

// Row (b, t) as n numbers of T, zeros up to padded.
template <class T>
inline void load_row(const Rows& rows, int64_t b, int64_t t, int64_t n, int64_t padded, T* out) {
  const void* data = row_address(rows, b, t);
  switch (rows.type) {
    case Type::kFloat:
      load_as<T, float>(data, rows.element, n, out, [](float x) { return x; });
      break;
    case Type::kDouble:
      load_as<T, double>(data, rows.element, n, out, [](double x) { return x; });
      break;
    case Type::kHalf:
      load_half_type<T, Half>(data, rows.element, n, out, half_to_float);
      break;
    case Type::kBFloat16:
      load_half_type<T, BFloat16>(data, rows.element, n, out, bfloat16_to_float);
      break;
  }
  for (int64_t k = n; k < padded; ++k) out[k] = 0;
}

// n numbers to row (b, t), whose elements are contiguous: outputs are always made so.
template <class T>
inline void store_row(const Rows& rows, int64_t b, int64_t t, int64_t n, const T* x) {
  void* data = row_address(rows, b, t);
  switch (rows.type) {
    case Type::kFloat:
      for (int64_t k = 0; k < n; ++k) static_cast<float*>(data)[k] = float(x[k]);
      break;
    case Type::kDouble:
      for (int64_t k = 0; k < n; ++k) static_cast<double*>(data)[k] = double(x[k]);
      break;
    case Type::kHalf:
      for (int64_t k = 0; k < n; ++k) static_cast<uint16_t*>(data)[k] = float_to_half(float(x[k]));
      break;
    case Type::kBFloat16:
      for (int64_t k = 0; k < n; ++k) static_cast<uint16_t*>(data)[k] = float_to_bfloat16(float(x[k]));
      break;
  }
}

// The same, or added to a row of T.
template <class T>
inline void put_row(bool adds, const Rows& rows, int64_t b, int64_t t, int64_t n, const T* x) {
  if (!adds) return store_row(rows, b, t, n, x);
  T* sum = reinterpret_cast<T*>(row_address(rows, b, t));
  for (int64_t k = 0; k < n; ++k) sum[k] += x[k];
}

// max |x| over vectors of numbers; infinity if one is not finite.
template <class T>
struct Magnitude {
  using Bits = typename VecOf<T>::bits;
  Vec<T> high = {};
  Bits bad = {};

  void add(Vec<T> x) {
    const Vec<T> size = x < 0 ? -x : x;
    bad |= !(size <= Limits<T>::largest);
    high = size > high ? size : high;
  }

  T value() const {
    T result = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      if (bad[lane]) return T(__builtin_inff());
      result = high[lane] > result ? high[lane] : result;
    }
    return result;
  }
};

template <class T>
inline T magnitude(const T* x, int64_t n) {
  Magnitude<T> limit;
  for (int64_t k = 0; k < n; k += kLanes<T>) limit.add(load(x + k));
  return limit.value();
}

// The gates of recurrent units.

// 2^n and exp(rest) - 1 without the 1 of the series, of x = n ln 2 + rest within the range of normal numbers; a NaN of
// x comes out as one of the latter.
template <class T>
struct Exponential {
  explicit Exponential(Vec<T> x) {
    using L = Limits<T>;
    using Bits = typename VecOf<T>::bits;
    const Vec<T> shifted = x * L::log2e + L::magic, n = shifted - L::magic;
    const Vec<T> rest = x - n * L::ln2_high - n * L::ln2_low;
    power = (Vec<T>)((Bits)(Vec<T>{} + 1) + ((Bits)shifted << L::mantissa));
    less_one = rest * exp_series<T, 1>(rest);
  }
  Vec<T> power, less_one;
};

template <class T>
inline Vec<T> within(Vec<T> x, T limit) {
  return at_least<T>(Vec<T>{} - limit, at_most<T>(Vec<T>{} + limit, x));
}

// 0 far out: what is infinite is NaN behind a gate that is closed, as torch has it.
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  const Exponential<T> e(within<T>(-x, Limits<T>::steep));
  const Vec<T> result = reciprocal<T>((e.power + T(1)) + e.power * e.less_one);
  return x < -Limits<T>::steep ? Vec<T>{} : result;
}

// (e - 1) / (e + 1) of e = exp(2 x); e - 1 without the 1 of the series, so that a small x keeps its places.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const Exponential<T> e(within<T>(2 * x, Limits<T>::flat));
  const Vec<T> less_one = e.power * e.less_one + (e.power - 1);
  return quotient<T>(less_one, less_one + 2);
}

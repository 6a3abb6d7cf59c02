#pragma once
// Sixteen numbers at a time: one of the compiler's vectors where a register holds it, else two halves
//
// GCC keeps a vector that no register holds in memory, and cuts it into pieces at every operation. Halves that registers
// hold stay in them.

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// For functions of vectors, and lambdas: called, they would hand them over in memory.
#define ALWAYS __attribute__((always_inline))
#define INLINED inline ALWAYS

namespace {

#if defined(__AVX512F__)

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

INLINED v16 same(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINED v16 floats(i32x16 x) { return __builtin_convertvector(x, v16); }

#else

#if defined(__AVX__)
constexpr int REGISTER = 32; // bytes
#else
constexpr int REGISTER = 16;
#endif

template <class T, int COUNT> struct Native {
  typedef T vector __attribute__((vector_size(COUNT * sizeof(T))));
};
template <class V, class T> INLINED V spread_over(T x) {
  if constexpr (std::is_class_v<V>) return V(x);
  else return x - V{}; // -0 stays -0
}

// COUNT numbers as two halves, with the operators of the compiler's vectors.
template <class T, int COUNT> struct Halves {
  static constexpr bool held = COUNT / 2 * sizeof(T) <= REGISTER;
  typedef std::conditional_t<held, Native<T, COUNT / 2>, Halves<T, COUNT / 2>> Kind;
  typedef typename Kind::vector Half;
  typedef Halves vector;
  Half low, high;

  Halves() = default;
  INLINED Halves(const Half &low, const Half &high) : low(low), high(high) {}
  INLINED Halves(T x) : low(spread_over<Half>(x)), high(spread_over<Half>(x)) {}
  template <class U> INLINED explicit operator Halves<U, COUNT>() const { // the same bits
    typedef typename Halves<U, COUNT>::Half Other;
    return {(Other)low, (Other)high};
  }
  INLINED T operator[](int i) const { return i < COUNT / 2 ? low[i] : high[i - COUNT / 2]; }
  INLINED T &operator[](int i) { return ((T *)this)[i]; }

#define OPERATOR(type, sign)                                                           \
  friend INLINED Halves<type, COUNT> operator sign(const Halves &a, const Halves &b) { \
    return {a.low sign b.low, a.high sign b.high};                                     \
  }
  OPERATOR(T, +)
  OPERATOR(T, -)
  OPERATOR(T, *)
  OPERATOR(T, /)
  OPERATOR(T, &)
  OPERATOR(T, |)
  OPERATOR(T, ^)
  OPERATOR(int32_t, <)
  OPERATOR(int32_t, >)
  OPERATOR(int32_t, !=)
#undef OPERATOR
  INLINED Halves operator-() const { return {-low, -high}; }
  INLINED Halves operator~() const { return {~low, ~high}; }
  INLINED Halves operator<<(int bits) const { return {low << bits, high << bits}; }
  INLINED Halves operator>>(int bits) const { return {low >> bits, high >> bits}; }
  INLINED Halves &operator+=(const Halves &b) { return *this = *this + b; }
  INLINED Halves &operator-=(const Halves &b) { return *this = *this - b; }
  INLINED Halves &operator*=(const Halves &b) { return *this = *this * b; }
};
typedef Halves<float, 16> v16;
typedef Halves<uint32_t, 16> u32x16;
typedef Halves<int32_t, 16> i32x16;

INLINED v16 same(float x) { return x; }
template <int COUNT> INLINED Halves<float, COUNT> floats(const Halves<int32_t, COUNT> &x) {
  typedef Halves<float, COUNT> Said;
  if constexpr (Said::held)
    return {__builtin_convertvector(x.low, typename Said::Half), __builtin_convertvector(x.high, typename Said::Half)};
  else return {floats(x.low), floats(x.high)};
}

#endif

// Half by half: copied as one block, they would go through memory in pieces smaller than a register.
template <class V, class T> INLINED V loaded(const T *p) {
  if constexpr (std::is_class_v<V>) {
    typedef typename V::Half Half;
    return {loaded<Half>(p), loaded<Half>(p + sizeof(Half) / sizeof(T))};
  } else {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
}
template <class V, class T> INLINED void stored(const V &v, T *p) {
  if constexpr (std::is_class_v<V>) stored(v.low, p), stored(v.high, p + sizeof v.low / sizeof(T));
  else memcpy(p, &v, sizeof v);
}

// a where the mask has ones, else b
template <class V> INLINED V chosen(u32x16 mask, V a, V b) { return (V)(((u32x16)a & mask) | ((u32x16)b & ~mask)); }

} // namespace

// csrc/cpu/simd.h for one instruction set: exponentials against long double, conversions of half types exhaustively.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/simd.h"
#include "suites.h"

namespace ltk::LTK_ISA {
namespace {

template <class T>
T bits_to(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A vector at a time, as the kernels call it.
template <class T>
class Exponentials {
 public:
  void add(T x) {
    x_[count_++] = x;
    if (count_ == lanes<T>) flush();
  }
  double worst() {
    while (count_ != 0) add(T(-1));
    return worst_;
  }

 private:
  void flush() {
    T y[lanes<T>];
    store(y, exponential(load(x_)));
    for (int64_t k = 0; k < lanes<T>; ++k) check(x_[k], y[k]);
    count_ = 0;
  }
  void check(T x, T y) {
    constexpr T smallest = std::numeric_limits<T>::min();
    const long double exact = std::exp((long double)x);
    if (exact < (long double)smallest) {  // 0, or before flushing a subnormal number
      if (!(y >= T(0) && y <= smallest))
        test::fail("exp(%a) = %a, expected 0 or a subnormal number", double(x), double(y));
      return;
    }
    int exponent;
    std::frexp(exact, &exponent);
    const long double ulp = std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits);
    const double error = double(std::fabs((long double)y - exact) / ulp);
    if (!(error < 2.0)) test::fail("exp(%a) = %a is %.3f ulp off", double(x), double(y), error);
    if (error > worst_) worst_ = error;
  }
  T x_[lanes<T>];
  int64_t count_ = 0;
  double worst_ = 0;
};

template <class T>
T exponential_of(T x) {
  T out[lanes<T>];
  store(out, exponential(splat(x)));
  for (T y : out)
    if (std::memcmp(&y, out, sizeof y) != 0) test::fail("exp(%a) differs between lanes", double(x));
  return out[0];
}

template <class T>
void check_exponential(const char* name) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  // ln of the smallest normal number, below which results may be 0 and soon have to be; and of the largest.
  const T edge = std::log(std::numeric_limits<T>::min()), top = std::log(std::numeric_limits<T>::max());
  Exponentials<T> sweep;
  // Every float pattern with a step that is prime, so that all mantissas come; doubles densely and by magnitude.
  if constexpr (sizeof(T) == 4) {
    for (uint64_t bits = 0x80000000u; bits < 0xff800000u; bits += 1999) sweep.add(bits_to<float>(bits));
    for (uint64_t bits = 0xc2aeac00u; bits < 0xc2aeb200u; ++bits)
      sweep.add(bits_to<float>(bits));  // each around the edge
  } else {
    test::Random random(1);
    for (int k = 0; k < 400000; ++k) sweep.add(T(-745) * random.uniform());
    for (int k = 0; k < 100000; ++k) sweep.add(-std::exp(T(-45) + T(52) * random.uniform()));
    for (int k = 0; k < 20000; ++k)
      sweep.add(edge + T(k - 10000) * std::fabs(edge) * std::numeric_limits<T>::epsilon());
  }
  for (int k = 0; k < 50000; ++k) sweep.add(top * T(0.99) * T(k) / T(50000));  // above 0 too
  // Where the nearest multiple of ln 2 changes, the reduced argument is largest.
  for (int n = int(edge / 0.6931471805599453) - 1; n <= 0; ++n)
    for (int k = -20; k <= 20; ++k) {
      T x = T((n + 0.5) * 0.6931471805599453094);
      for (int step = std::abs(k); step > 0; --step) x = std::nextafter(x, k < 0 ? -infinity : infinity);
      if (x <= T(0)) sweep.add(x);
    }
  std::printf("exp %s: %.3f ulp\n", name, sweep.worst());

  for (const T x : {-infinity, std::numeric_limits<T>::lowest(), edge * T(1.02), T(-1e6)})
    if (exponential_of(x) != T(0)) test::fail("exp(%a) = %a, expected 0", double(x), double(exponential_of(x)));
  if (exponential_of(T(0)) != T(1) || exponential_of(-T(0)) != T(1)) test::fail("exp(0) is not 1");
  if (!std::isnan(exponential_of(std::numeric_limits<T>::quiet_NaN()))) test::fail("exp(NaN) is not NaN");
  if (!(exponential_of(edge + T(0.01)) >= std::numeric_limits<T>::min())) test::fail("normal results are flushed");
}

// The processor's mode in which the kernels run: subnormal numbers are read and written as 0.
class Flushing {
 public:
#if defined(__SSE2__)
  explicit Flushing(bool on) : before_(_mm_getcsr()) {
    if (on) _mm_setcsr(before_ | 0x8040);
  }
  ~Flushing() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  explicit Flushing(bool) {}
#endif
};

template <class Half>
void check_conversions(const char* name, const test::Format& format, bool flushing) {
  std::vector<Half> all(65536);
  for (int bits = 0; bits < 65536; ++bits) all[bits].bits = uint16_t(bits);
  const auto same = [](double a, double b) {
    return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
  };

  // Alone, and in rows of every length up to two vectors and a tail at every offset.
  std::vector<float> floats(65536), alone(65536);
  std::vector<double> doubles(65536);
  {
    const Flushing mode(flushing);
    widen(all.data(), 65536, floats.data());
    for (int bits = 0; bits < 65536; ++bits) alone[bits] = to_float(all[bits]);
  }
  widen(all.data(), 65536, doubles.data());
  for (int bits = 0; bits < 65536; ++bits) {
    const double exact = format.decode(uint16_t(bits));
    if (!same(alone[bits], exact) || !same(floats[bits], exact) || !same(doubles[bits], exact))
      test::fail("%s %04x: %a alone, %a and %a in rows, expected %a", name, bits, double(alone[bits]),
                 double(floats[bits]), doubles[bits], exact);
  }
  for (int64_t count = 0; count < 40; ++count)
    for (int64_t offset = 0; offset < 3; ++offset) {
      test::Guarded in((count + offset) * sizeof(Half), true), out((count + offset) * sizeof(float), true);
      for (int64_t k = 0; k < count; ++k) in.as<Half>()[offset + k] = all[(k * 2749 + count) & 0x7fff];
      widen(in.as<Half>() + offset, count, out.as<float>() + offset);
      for (int64_t k = 0; k < count; ++k)
        if (!same(out.as<float>()[offset + k], format.decode(in.as<Half>()[offset + k].bits)))
          test::fail("%s: widen(%ld)", name, long(count));
      for (int64_t k = 0; k < offset; ++k)
        if (out.as<uint32_t>()[k] != 0xffffffffu) test::fail("%s: widen(%ld) writes before its row", name, long(count));
      test::Guarded back((count + offset) * sizeof(Half), true);
      narrow(out.as<float>() + offset, count, back.as<Half>() + offset);
      if (std::memcmp(back.data() + offset * 2, in.data() + offset * 2, count * 2) != 0)
        for (int64_t k = offset; k < count + offset; ++k)  // only a NaN may come back as another
          if (back.as<Half>()[k].bits != in.as<Half>()[k].bits && !std::isnan(to_float(back.as<Half>()[k])))
            test::fail("%s: narrow(widen(%04x)) = %04x", name, in.as<Half>()[k].bits, back.as<Half>()[k].bits);
    }

  // Rounding: each value, what is between it and the next, the middle, and the floats beside these; then random bits.
  std::vector<float> wanted;
  const float infinity = std::numeric_limits<float>::infinity();
  for (int bits = 0; bits < 65536; ++bits) {
    const double low = format.decode(uint16_t(bits)), high = format.decode(uint16_t(bits + 1));
    for (const double x : {low, (low + high) / 2, low + (high - low) / 4}) {
      const float f = float(x);
      for (const float g : {f, std::nextafter(f, infinity), std::nextafter(f, -infinity)}) wanted.push_back(g);
    }
  }
  test::Random random(2);
  for (int k = 0; k < 1 << 19; ++k) wanted.push_back(bits_to<float>(random.next() & 0xffffffffu));
  for (const float special :
       {infinity, -infinity, 65504.0f, 65519.996f, 65520.0f, 3.4028235e38f, -3.3961776e38f, 0.0f, -0.0f})
    wanted.push_back(special);
  std::vector<Half> rounded(wanted.size()), one(wanted.size());
  {
    const Flushing mode(flushing);
    narrow(wanted.data(), int64_t(wanted.size()), rounded.data());
    for (size_t k = 0; k < wanted.size(); ++k) round_to(&one[k], wanted[k]);
  }
  for (size_t k = 0; k < wanted.size(); ++k) {
    const uint16_t exact = format.encode(wanted[k]);
    const bool nan = std::isnan(wanted[k]);
    if (nan ? !std::isnan(format.decode(one[k].bits)) || !std::isnan(format.decode(rounded[k].bits))
            : one[k].bits != exact || rounded[k].bits != exact)
      test::fail("%a to %s: %04x alone, %04x in a row, expected %04x", double(wanted[k]), name, one[k].bits,
                 rounded[k].bits, exact);
  }
}

}  // namespace

extern const test::SimdSuite simd_suite;
const test::SimdSuite simd_suite = {
    [] {
      check_exponential<float>("float");
      check_exponential<double>("double");
    },
    [] {
      for (const bool flushing : {false, true}) {
        check_conversions<BFloat16>("bfloat16", test::bfloat16, flushing);
        check_conversions<Float16>("float16", test::float16, flushing);
      }
    },
};

}  // namespace ltk::LTK_ISA

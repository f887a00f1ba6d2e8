// csrc/cpu/cross_entropy.h with plain arrays: random calls against the formulas in long double, a logit at a time.
//
// Every array is as long as its contents and lies at the edge of memory that faults (check.h), so logits start at any
// element and an access beyond a row's end is caught. What lies between rows and columns is NaN before and after.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "suites.h"

#if defined(__SSE2__)
  #include <immintrin.h>
#endif

namespace test {
namespace {

using ltk::ElementType;
using Real = long double;

size_t size_of(ElementType type) {
  switch (type) {
    case ElementType::f64:
    case ElementType::i64:
    case ElementType::u64:
      return 8;
    case ElementType::f32:
    case ElementType::i32:
    case ElementType::u32:
      return 4;
    case ElementType::i8:
    case ElementType::u8:
      return 1;
    default:
      return 2;
  }
}

double read(const char* at, ElementType type) {
  uint16_t half;
  float single;
  double real;
  switch (type) {
    case ElementType::f64:
      return std::memcpy(&real, at, 8), real;
    case ElementType::f32:
      return std::memcpy(&single, at, 4), single;
    case ElementType::f16:
      return std::memcpy(&half, at, 2), float16.decode(half);
    default:
      return std::memcpy(&half, at, 2), bfloat16.decode(half);
  }
}

void write(char* at, ElementType type, double value) {
  const float single = float(value);
  const uint16_t half = (type == ElementType::f16 ? float16 : bfloat16).encode(value);
  switch (type) {
    case ElementType::f64:
      std::memcpy(at, &value, 8);
      break;
    case ElementType::f32:
      std::memcpy(at, &single, 4);
      break;
    default:
      std::memcpy(at, &half, 2);
  }
}

// Half an ulp of 1.
Real rounding(ElementType type) {
  switch (type) {
    case ElementType::f64:
      return 0x1p-53L;
    case ElementType::f32:
      return 0x1p-24L;
    case ElementType::f16:
      return 0x1p-11L;
    default:
      return 0x1p-8L;
  }
}

// A tensor of rows in guarded memory, in one of the ways that a tensor may lie.
struct Matrix {
  ElementType type;
  ltk::Layout layout;
  Guarded memory;

  Matrix(Random& random, int64_t rows, int64_t classes, int64_t inner, ElementType element)
      : type(element), layout(choose(random, rows, classes, inner)), memory(bytes(rows, classes), random.chance(0.7)) {}
  char* at(int64_t row, int64_t column) const {
    return memory.data() + size_t(layout.offset(row) + column * layout.stride_class) * size_of(type);
  }
  double get(int64_t row, int64_t column) const { return read(at(row, column), type); }
  void set(int64_t row, int64_t column, double value) { write(at(row, column), type, value); }

 private:
  static ltk::Layout choose(Random& random, int64_t rows, int64_t classes, int64_t inner) {
    if (inner > 1) return {inner, classes * inner, inner, 1};  // (outer, C, inner)
    switch (random.below(5)) {
      case 0:
        return {1, classes + 3, 1, 0};  // rows apart
      case 1:
        return {1, 2 * classes, 2, 0};  // every second column
      case 2:
        return {1, 1, rows, 0};  // transposed
      default:
        return {1, classes, 1, 0};
    }
  }
  size_t bytes(int64_t rows, int64_t classes) const {
    return size_t(layout.offset(rows - 1) + (classes - 1) * layout.stride_class + 1) * size_of(type);
  }
};

// What is not an element of the matrix must be untouched.
void check_gaps(const Matrix& m, int64_t rows, int64_t classes) {
  std::vector<bool> element(m.memory.bytes(), false);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < classes; ++j)
      std::fill_n(element.begin() + (m.at(r, j) - m.memory.data()), size_of(m.type), true);
  for (size_t k = 0; k < element.size(); ++k)
    if (!element[k] && m.memory.data()[k] != char(0xff)) fail("byte %zu between the elements was written", k);
}

template <class T>
Guarded vector_of(Random& random, int64_t count, double low, double high, double zeros = 0) {
  Guarded memory(size_t(count) * sizeof(T), random.chance(0.7));
  for (int64_t j = 0; j < count; ++j)
    memory.as<T>()[j] = random.chance(zeros) ? T(0) : T(low + (high - low) * random.uniform());
  return memory;
}

// A row's loss and dl/du in long double, with the sizes of what was added up to get them, which tolerances are relative
// to.
struct Row {
  Real loss = 0, loss_size = 0, spread = 0;
  std::vector<Real> slope, size;
};

template <class T>
Row exact_row(const ltk::CrossEntropyCall<T>& call, int64_t row, int64_t label, const std::vector<double>& x,
              const std::vector<double>& t) {
  const int64_t classes = call.classes;
  const auto& o = call.options;
  Row result;
  result.slope.assign(classes, 0);
  result.size.assign(classes, 0);
  if (label == call.ignore_index && t.empty()) return result;
  std::vector<Real> u(classes), q(classes), target(classes, 0);
  for (int64_t j = 0; j < classes; ++j) {
    u[j] = (call.scale ? Real(call.scale[j]) : Real(call.uniform_scale)) * x[j] + (call.bias ? Real(call.bias[j]) : 0);
    if (!t.empty())
      target[j] = t[j];
    else if (j == label) {
      target[j] = 1;
      if (call.margin) u[j] -= Real(call.uniform_scale) * call.margin[j * call.margin_stride];
    }
    q[j] = (1 - Real(o.label_smoothing)) * (call.weight ? Real(call.weight[j]) : 1) * target[j] +
           (call.smooth ? Real(o.smoothing_per_class) * call.smooth[j] : 0);
    if (std::isfinite(u[j])) result.spread = std::max(result.spread, std::fabs(u[j]));
  }
  const auto top = std::max_element(u.begin(), u.end());
  Real others = 0;  // beside the largest: a certain row's loss is the logarithm of 1 + this
  for (auto v = u.begin(); v != u.end(); ++v)
    if (v != top) others += std::exp(*v - *top);
  const Real m = *top, log_sum = std::log1p(others), lse = m + log_sum;
  for (Real& v : u) v = v - m - log_sum;  // log softmax from here on
  Real ce = 0, nll = 0, mass = 0, total = 0;
  for (int64_t j = 0; j < classes; ++j) {
    if (target[j] != 0) nll -= target[j] * u[j];
    if (q[j] != 0) ce -= q[j] * u[j];
    mass += q[j];
    total += target[j];
  }
  const Real r = call.row_weight ? Real(call.row_weight[row]) : 1, gamma = o.focal_gamma;
  const Real base = o.focal_weighted ? ce : nll, rest = -std::expm1(-base);
  Real factor = 1, slope = 0;  // the focal factor and its derivative by `base`
  if (gamma > 0) {
    factor = rest > 0 ? std::pow(rest, gamma) : 0;
    slope = rest > 0 && !o.focal_detached ? gamma * std::pow(rest, gamma - 1) * std::exp(-base) : 0;
  }
  const Real uncertain = gamma > 0 ? (1 + gamma) * (1 + ce) : 0;  // a factor of nearly 0 comes from a rounded `base`
  if (r == 0) return result;
  result.loss = r * (factor * ce + (o.z_loss > 0 ? o.z_loss * lse * lse : 0));
  result.loss_size = r * (ce + mass + (o.z_loss > 0 ? o.z_loss * (lse * lse + std::fabs(lse)) : 0) + uncertain);
  for (int64_t j = 0; j < classes; ++j) {
    const Real p = std::exp(u[j]);
    const Real d_ce = mass * p - q[j], d_nll = total * p - target[j], d_base = o.focal_weighted ? d_ce : d_nll;
    result.slope[j] = r * (factor * d_ce + ce * slope * d_base + 2 * o.z_loss * lse * p);
    result.size[j] = r * ((1 + ce * slope + uncertain) * (mass * p + q[j] + total * p + target[j]) +
                          2 * o.z_loss * (1 + std::fabs(lse)) * p);
  }
  return result;
}

template <class T>
class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed), seed_(seed) {}

  void run() {
    make();
    const auto& kernels = ltk::kernels().cross_entropy<T>();
    call.gradient = gradient_->memory.data();
    call.gradient_type = gradient_->type;
    call.gradient_layout = gradient_->layout;
    check_return(kernels.forward(call, 0, rows));
    check_losses("with gradient");
    const T kept_upstream[1] = {1};
    upstream_ = Guarded(sizeof(T), true);
    upstream_.as<T>()[0] = kept_upstream[0];
    check_gradient("of the forward");
    check_gaps(*gradient_, rows, classes);
    const std::vector<char> kept(gradient_->memory.data(), gradient_->memory.data() + gradient_->memory.bytes());
    const std::vector<T> losses(loss_.as<T>(), loss_.as<T>() + rows), states(state_.as<T>(), state_.as<T>() + 4 * rows);

    // Without a gradient, and cut into ranges: the same bits.
    call.gradient = nullptr;
    const int64_t cut = random_.below(rows + 1);
    std::memset(loss_.data(), 0xff, loss_.bytes());
    std::memset(state_.data(), 0xff, state_.bytes());
    check_return(kernels.forward(call, 0, cut));
    check_return(kernels.forward(call, cut, rows));
    expect_same(losses.data(), loss_.data(), loss_.bytes(), "losses of a forward in two ranges");
    expect_same(states.data(), state_.data(), state_.bytes(), "states of a forward in two ranges");

    // A backward at upstream 1 has the bits of the forward's gradient; then any upstream, with sums over the rows.
    call.gradient = gradient_->memory.data();
    call.upstream = upstream_.as<T>();
    call.upstream_stride = 0;
    clear(*gradient_);
    kernels.backward(call, cut, rows);
    kernels.backward(call, 0, cut);
    expect_same(kept.data(), gradient_->memory.data(), kept.size(), "gradient of a backward");

    call.upstream_stride = random_.below(2);
    upstream_ = vector_of<T>(random_, call.upstream_stride == 0 ? 1 : rows, -2, 2, 0.2);
    call.upstream = upstream_.as<T>();
    clear(*gradient_);
    kernels.backward(call, 0, rows);
    check_gradient("of a backward");

    scale_sums_ = vector_of<T>(random_, classes, 0, 0);
    bias_sums_ = vector_of<T>(random_, classes, 0, 0);
    const int64_t which = random_.below(3);
    if (which != 0) call.scale_sums = scale_sums_.template as<T>();
    if (which != 1) call.bias_sums = bias_sums_.template as<T>();
    clear(*gradient_);
    kernels.backward(call, 0, rows);
    check_gradient("of a backward with sums");
    check_gaps(*gradient_, rows, classes);
    check_sums();

    // Sums alone, for frozen logits: the same sums.
    const std::vector<T> sums(bias_sums_.template as<T>(), bias_sums_.template as<T>() + classes);
    std::memset(bias_sums_.data(), 0, bias_sums_.bytes());
    call.gradient = nullptr;
    kernels.backward(call, 0, rows);
    if (call.bias_sums != nullptr)
      expect_same(sums.data(), bias_sums_.data(), bias_sums_.bytes(), "sums without a gradient");
    if (!t_) return;
    spoil(kernels);
  }

 private:
  void make() {
    static const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 131, 259};
    classes = sizes[random_.below(std::size(sizes))];
    int64_t inner = random_.chance(0.2) ? 1 + random_.below(4) : 1;
    rows = inner * (1 + random_.below(random_.chance(0.3) ? 40 : 6));
    const ElementType floats[] = {ElementType::f64, ElementType::f32, ElementType::f16, ElementType::bf16};
    const ElementType type = sizeof(T) == 8 ? ElementType::f64 : floats[1 + random_.below(3)];
    x_.reset(new Matrix(random_, rows, classes, inner, type));
    gradient_.reset(new Matrix(random_, rows, classes, inner, type));
    call.rows = rows;
    call.classes = classes;
    call.input = x_->memory.data();
    call.input_type = type;
    call.input_layout = x_->layout;
    const double magnitudes[] = {0.1, 2, 20};
    const double magnitude = magnitudes[random_.below(3)];
    call.ignore_index = random_.chance(0.5) ? -100 : random_.below(classes);

    if (random_.chance(0.4)) call.uniform_scale = T(0.25 + 2 * random_.uniform());
    // No training samples for the last class.
    const bool absent = classes > 2 && random_.chance(0.2);
    if (random_.chance(0.4)) {
      scale_ = vector_of<T>(random_, classes, 0.2, 2.5);
      call.scale = scale_.template as<T>();
    }
    if (absent || call.scale != nullptr || random_.chance(0.4)) {  // the binding gives a bias wherever there is a scale
      bias_ = vector_of<T>(random_, classes, -3, 3);
      if (absent) bias_.template as<T>()[classes - 1] = -std::numeric_limits<T>::infinity();
      call.bias = bias_.template as<T>();
    }
    if (random_.chance(0.5)) {
      weight_ = vector_of<T>(random_, classes, 0.1, 3, random_.chance(0.3) ? 0.4 : 0);
      call.weight = weight_.template as<T>();
    }
    if (random_.chance(0.3)) {
      row_weight_ = vector_of<T>(random_, rows, 0.1, 2, 0.2);
      call.row_weight = row_weight_.template as<T>();
    }
    auto& o = call.options;
    o = {};
    if (random_.chance(0.4)) {
      o.label_smoothing = random_.chance(0.2) ? T(1) : T(random_.uniform());
      smooth_ = vector_of<T>(random_, classes, 1, 1);
      double total = 0;
      for (int64_t j = 0; j < classes; ++j) {
        T& ws = smooth_.template as<T>()[j];
        ws = absent && j == classes - 1 ? T(0) : call.weight ? call.weight[j] : T(1);
        total += ws;
      }
      o.smoothing_per_class = o.label_smoothing / T(classes - absent);
      o.smoothing_total = T(total);
      call.smooth = smooth_.template as<T>();
    }
    if (random_.chance(0.3)) o.z_loss = T(0.3 * random_.uniform());
    const bool probabilities = random_.chance(0.3);
    if (random_.chance(0.4)) {
      const double gammas[] = {0.5, 1, 2, 3.3};
      o.focal_gamma = T(gammas[random_.below(4)]);
      o.focal_weighted = random_.chance(0.5);
      o.focal_detached = random_.chance(0.3);
      // 1 - p of probabilities and of weighted losses is a difference: near 0, its power below 1 has no digits in any
      // type.
      if ((probabilities || o.focal_weighted) && o.focal_gamma < 1) o.focal_gamma = T(1);
    }
    call.inverse_denominator = T(0.1 + random_.uniform());

    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < classes; ++j) {
        const double normal = random_.uniform() + random_.uniform() + random_.uniform() - 1.5;
        x_->set(r, j, magnitude * 2 * normal);
      }
    const int64_t possible = classes - absent;
    if (probabilities) {
      t_.reset(new Matrix(random_, rows, classes, inner, floats[random_.below(4)]));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < classes; ++j)
          t_->set(r, j, j >= possible || random_.chance(0.3) ? 0.0 : random_.uniform() / double(classes));
      call.target = t_->memory.data();
      call.target_type = t_->type;
      call.target_layout = t_->layout;
    } else {
      if (random_.chance(0.4)) {
        const bool each = random_.chance(0.5);
        margin_ = vector_of<T>(random_, each ? classes : 1, -1, random_.chance(0.2) ? 90 : 2);
        call.margin = margin_.template as<T>();
        call.margin_stride = each;
      }
      make_labels(possible);
    }
    // Masked logits, as of classes that a row may not take; never what the target wants.
    if (call.smooth == nullptr && random_.chance(0.2))
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < classes; ++j)
          if (random_.chance(0.3) && (t_ ? t_->get(r, j) == 0 && j != 0 : j != labels_[r]))
            x_->set(r, j, -std::numeric_limits<double>::infinity());
    loss_ = Guarded(size_t(rows) * sizeof(T), true);
    state_ = Guarded(size_t(rows) * 4 * sizeof(T), true);
    call.loss = loss_.template as<T>();
    call.state = state_.template as<T>();
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> x(classes), t(t_ ? classes : 0);
      for (int64_t j = 0; j < classes; ++j) {
        x[j] = x_->get(r, j);
        if (t_) t[j] = t_->get(r, j);
      }
      exact_.push_back(exact_row(call, r, t_ ? -1 : labels_[r], x, t));
    }
  }

  void make_labels(int64_t possible) {
    const ElementType integers[] = {ElementType::i64, ElementType::i32, ElementType::i16, ElementType::i8,
                                    ElementType::u64, ElementType::u32, ElementType::u16, ElementType::u8};
    const ElementType type = integers[random_.below(8)];
    const bool is_signed = type <= ElementType::i8;
    const int64_t most = type == ElementType::i8 ? 127 : type == ElementType::u8 ? 255 : possible - 1;
    label_memory_ = Guarded(size_t(rows) * size_of(type), true);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t y = random_.below(std::min(most, possible - 1) + 1);
      if (random_.chance(0.2) && (is_signed || call.ignore_index >= 0) && call.ignore_index <= most)
        y = call.ignore_index;
      labels_.push_back(y);
      std::memcpy(label_memory_.data() + size_t(r) * size_of(type), &y, size_of(type));  // little endian
      if (y == call.ignore_index && random_.chance(0.5))
        for (int64_t j = 0; j < classes; ++j) x_->set(r, j, random_.chance(0.5) ? NAN : INFINITY);
    }
    call.target = label_memory_.data();
    call.target_type = type;
  }

  // Probabilities that are none are refused.
  void spoil(const ltk::CrossEntropyKernels<T>& kernels) {
    const int64_t row = random_.below(rows), column = random_.below(classes);
    const double bad[] = {NAN, -0.5, INFINITY};
    t_->set(row, column, bad[random_.below(3)]);
    if (kernels.forward(call, 0, rows)) fail("seed %lu: bad probabilities in row %ld were taken", seed_, long(row));
    if (!kernels.forward(call, 0, row)) fail("seed %lu: the rows before row %ld were refused", seed_, long(row));
  }

  void check_return(bool good) {
    if (!good) fail("seed %lu: right arguments were refused\n%s", seed_, describe());
  }

  // Rounding a logit to T moves e^u by as much as |u| is, relatively; the factors are what a row of these sizes needs,
  // doubled.
  Real relative(const Row& row) const { return (sizeof(T) == 8 ? 0x1p-53L : 0x1p-24L) * (32 + 8 * row.spread); }

  void check_losses(const char* what) {
    for (int64_t r = 0; r < rows; ++r) {
      const Real error = std::fabs(loss_.template as<T>()[r] - exact_[r].loss);
      if (!(error <= relative(exact_[r]) * exact_[r].loss_size + std::numeric_limits<T>::min()))
        fail("seed %lu: loss of row %ld %s is %.9Lg, expected %.9Lg\n%s", seed_, long(r), what,
             Real(loss_.template as<T>()[r]), exact_[r].loss, describe());
    }
  }

  Real factor(int64_t r) const {
    return Real(call.inverse_denominator) * upstream_.as<T>()[upstream_.bytes() == sizeof(T) ? 0 : r];
  }
  Real slope(int64_t j) const { return call.scale ? Real(call.scale[j]) : Real(call.uniform_scale); }

  void check_gradient(const char* what) {
    // Exponentials below the smallest normal number are flushed. They are relative to a bound on the logits, which a
    // margin of up to 40 lets lie above the largest: e^40 < 2^58.
    const Real unit = rounding(gradient_->type), flushed = std::numeric_limits<T>::min() * 0x1p66L;
    const Real tiny = gradient_->type == ElementType::f16 ? 0x1p-24L : flushed;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < classes; ++j) {
        const Real f = factor(r) * slope(j), expected = f * exact_[r].slope[j], actual = gradient_->get(r, j);
        const Real allowed =
            relative(exact_[r]) * std::fabs(f) * exact_[r].size[j] + unit * std::fabs(expected) * 1.01L + tiny;
        if (!(std::fabs(actual - expected) <= allowed))
          fail("seed %lu: gradient %s at (%ld, %ld) is %.9Lg, expected %.9Lg\n%s", seed_, what, long(r), long(j),
               actual, expected, describe());
      }
  }

  void check_sums() {
    for (int64_t j = 0; j < classes; ++j) {
      Real scale = 0, scale_allowed = 0x1p-100L, bias = 0, bias_allowed = 0x1p-100L;
      for (int64_t r = 0; r < rows; ++r) {
        const Real d = Real(call.uniform_scale) * factor(r) * exact_[r].slope[j], x = x_->get(r, j);
        const Real size = (relative(exact_[r]) + rows * 0x1p-24L * (sizeof(T) == 4)) * Real(call.uniform_scale) *
                          std::fabs(factor(r)) * exact_[r].size[j];
        bias += d;
        bias_allowed += size;
        if (!std::isfinite(x)) continue;
        scale += d * x;
        scale_allowed += size * std::fabs(x);
      }
      const Real found_bias = bias_sums_.template as<T>()[j], found_scale = scale_sums_.template as<T>()[j];
      if (call.bias_sums != nullptr && !(std::fabs(found_bias - bias) <= bias_allowed))
        fail("seed %lu: dl/db_%ld is %.9Lg, expected %.9Lg\n%s", seed_, long(j), found_bias, bias, describe());
      if (call.scale_sums != nullptr && !(std::fabs(found_scale - scale) <= scale_allowed))
        fail("seed %lu: dl/da_%ld is %.9Lg, expected %.9Lg\n%s", seed_, long(j), found_scale, scale, describe());
    }
  }

  void expect_same(const void* a, const void* b, size_t bytes, const char* what) {
    if (std::memcmp(a, b, bytes) != 0) fail("seed %lu: other bits in %s\n%s", seed_, what, describe());
  }
  static void clear(const Matrix& m) { std::memset(m.memory.data(), 0xff, m.memory.bytes()); }

  const char* describe() {
    const auto& o = call.options;
    std::snprintf(text_, sizeof text_,
                  "%ld rows, %ld classes, input type %d, strides %ld %ld %ld, target type %d, s %g, scale %d, bias %d, "
                  "margin %d, "
                  "weight %d, row weight %d, smoothing %g, gamma %g (weighted %d, detached %d), z %g",
                  long(rows), long(classes), int(call.input_type), long(call.input_layout.stride_outer),
                  long(call.input_layout.stride_class), long(call.input_layout.stride_inner), int(call.target_type),
                  double(call.uniform_scale), call.scale != nullptr, call.bias != nullptr, call.margin != nullptr,
                  call.weight != nullptr, call.row_weight != nullptr, double(o.label_smoothing), double(o.focal_gamma),
                  o.focal_weighted, o.focal_detached, double(o.z_loss));
    return text_;
  }

  Random random_;
  uint64_t seed_;
  int64_t rows = 0, classes = 0;
  ltk::CrossEntropyCall<T> call;
  std::unique_ptr<Matrix> x_, t_, gradient_;
  Guarded scale_{0, true}, bias_{0, true}, weight_{0, true}, row_weight_{0, true}, smooth_{0, true}, margin_{0, true};
  Guarded label_memory_{0, true}, loss_{0, true}, state_{0, true}, upstream_{0, true}, scale_sums_{0, true},
      bias_sums_{0, true};
  std::vector<int64_t> labels_;
  std::vector<Row> exact_;
  char text_[512];
};

}  // namespace

void kernels(uint64_t seed) {
#if defined(__SSE2__)
  const unsigned mode = _mm_getcsr() & ~0x3fu;  // but for the flags of exceptions that have been
#endif
  for (uint64_t k = 0; k < 1200; ++k) {
    Case<float>(seed * 1000003 + k).run();
    Case<double>(seed * 2000003 + k).run();
  }
#if defined(__SSE2__)
  if ((_mm_getcsr() & ~0x3fu) != mode) fail("the kernels leave the processor's rounding and flushing modes changed");
#endif
}

}  // namespace test

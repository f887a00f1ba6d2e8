// Registers the CPU core of the losses whose adjustments depend on the row.
#include <tuple>

#include "bindings/cpu_prepared.h"
#include "bindings/row_cross_entropy_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

template <class T>
using Gradients = std::tuple<T, T, T, T>;

// Prepares what cross_entropy has too by its own means, and then the rest.
template <class T>
struct RowPrepared {
  ltk::RowCrossEntropyCall<T> call;
  Prepared<T> shared;

  explicit RowPrepared(const RowArguments& a)
      : shared(
            (check_sizes<T>(a), Arguments{a.input, a.target, a.weight, a.class_scale, a.class_bias, a.class_margin,
                                          a.sample_weight, a.ignore_index, a.class_smoothing ? 1.0 : a.label_smoothing,
                                          a.scale, a.focal_gamma, a.focal_weighted, a.focal_detached, a.z_loss})) {
    static_cast<ltk::CrossEntropyCall<T>&>(call) = shared.call;
    constexpr T largest = std::numeric_limits<T>::max();
    if (a.second_target) {
      call.second_target = a.second_target->const_data_ptr();
      call.lam = data<T>(a.lam);
      call.lam_stride = a.lam->numel() == call.rows && a.lam->dim() > 0 && call.rows > 1 ? 1 : 0;
      check_range("lam", call.lam, a.lam->numel(), T(0), T(1));
    }
    call.margin_type = ltk::MarginType(a.margin_type);
    if (call.margin_type != ltk::MarginType::additive) {
      if (!a.class_margin || a.row_gate) fail("expected a class_margin and no row_gate with a margin on the angle");
      check_range("class_margin", call.margin, a.class_margin->numel(), T(0), T(3.14159265358979323846));
    }
    call.class_smoothing = data<T>(a.class_smoothing);
    if (call.class_smoothing != nullptr) check_range("label_smoothing", call.class_smoothing, call.classes, T(0), T(1));
    call.off_target = a.off_target;
    call.reached = T(shared.reached);
    call.gate = data<T>(a.row_gate);
    if (call.gate != nullptr) {
      check_range("row_gate", call.gate, call.rows, -largest, largest);
      if (a.class_bias) check_range("class_bias", data<T>(a.class_bias), call.classes, -largest, largest);
    }
    call.feature_norm = data<T>(a.feature_norm);
    if (call.feature_norm != nullptr) check_range("feature_norm", call.feature_norm, call.rows, T(0), largest);
    call.influence_alpha = T(a.influence_alpha);
    call.influence_eps = T(a.influence_eps);
    call.pair_term = ltk::PairTerm(a.pair_term);
    call.pair = data<T>(a.pair);
    call.pair_p = T(a.pair_p);
    call.pair_q = T(a.pair_q);
    if (call.pair_term == ltk::PairTerm::table) check_table(call.pair, call.classes);
    if (call.pair_term == ltk::PairTerm::seesaw) call.log_pair_eps = T(std::log(a.pair_eps));
    if (call.pair_term == ltk::PairTerm::drop) {
      call.drop_threshold = uint64_t(a.pair_p * 4294967296.0);
      call.seed = uint64_t(a.seed);
      call.step = uint32_t(*static_cast<const int64_t*>(a.pair_step->const_data_ptr()));
    }
  }

  static void check_range(const char* name, const T* values, int64_t count, T low, T high) {
    bool good = true;
    for (int64_t i = 0; i < count; ++i) good &= values[i] >= low && values[i] <= high;
    if (!good) fail(std::string("value: bad value in ") + name);
  }
  static void check_table(const T* table, int64_t classes) {
    bool good = true;
    for (int64_t i = 0; i < classes * classes; ++i) good &= table[i] <= std::numeric_limits<T>::max();
    for (int64_t y = 0; y < classes; ++y) good &= table[y * classes + y] >= std::numeric_limits<T>::lowest();
    if (!good) fail("value: bad value in pair_bias");
  }

  // Refuses labels that are out of range; returns the denominators of the two means, 0 for a label that is not there.
  std::pair<double, double> check_labels(const RowArguments& a, bool by_weight) {
    const double first = shared.check_labels(data<T>(a.class_bias), by_weight);
    if (call.second_target == nullptr) return {first, 0.0};
    shared.call.target = call.second_target;
    const double second = shared.check_labels(data<T>(a.class_bias), by_weight);
    shared.call.target = call.target;
    return {first, second};
  }

  void place_states(T* memory) {
    const ltk::RowStates<T> states(memory, call.rows, call.second_target != nullptr,
                                   call.pair_term == ltk::PairTerm::seesaw, call.gate != nullptr);
    for (int k = 0; k < 2; ++k) {
      call.states[k] = states.of_label[k];
      call.gate_slopes[k] = states.of_gate[k];
    }
    call.log_sum = states.log_sum;
    inverse = states.inverse;
  }
  T* inverse = nullptr;
};

template <class T>
const ltk::RowCrossEntropyKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return ltk::kernels().row_cross_entropy.single;
  else
    return ltk::kernels().row_cross_entropy.real;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const RowArguments& a, int64_t reduction, bool empty_zero,
                                           bool with_gradient) {
  RowPrepared<T> prepared(a);
  auto& call = prepared.call;
  const int64_t rows = call.rows;
  constexpr ScalarType type = type_of<T>();
  const auto [first, second] = prepared.check_labels(a, reduction == mean_weight);
  const auto inverse_of = [&](double denominator) {
    if (reduction != mean_weight && reduction != mean_count) return 1.0;
    return denominator == 0 && empty_zero ? 0.0 : 1.0 / denominator;
  };
  const double inverses[2] = {inverse_of(first), a.two_labels() ? inverse_of(second) : 1.0};

  Tensor state = allocate({a.states(rows)}, {1}, type);
  prepared.place_states(static_cast<T*>(state.mutable_data_ptr()));
  for (int k = 0; k < 2; ++k) prepared.inverse[k] = call.inverse_denominators[k] = T(inverses[k]);
  Tensor gradient = with_gradient ? dense_like(a.input) : Tensor();
  if (with_gradient) {
    call.gradient = gradient.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(gradient);
  }
  Tensor loss = reduction != none    ? allocate({}, {}, type)
                : a.input.dim() == 2 ? allocate({rows}, {1}, type)
                                     : allocate({a.input.size(0), a.input.size(2)}, {a.input.size(2), 1}, type);
  std::vector<T> losses[2];
  for (int k = 0; k <= int(a.two_labels()); ++k) {
    losses[k].resize(rows);
    call.losses[k] = losses[k].data();
  }
  const auto kernel = kernels<T>().forward;
  torch::stable::parallel_for(0, rows, prepared.shared.grain(),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  T* out = static_cast<T*>(loss.mutable_data_ptr());
  if (reduction == none) {
    for (int64_t row = 0; row < rows; ++row) out[row] = losses[0][row] + (a.two_labels() ? losses[1][row] : T(0));
    return {loss, state, gradient};
  }
  double total = 0;
  for (int k = 0; k <= int(a.two_labels()); ++k) {
    double of_label = 0;
    for (const T row_loss : losses[k]) of_label += row_loss;
    total += inverses[k] == 0 ? 0.0 : of_label * inverses[k];  // 0 / 0 is torch's mean over nothing
  }
  *out = T(total);
  return {loss, state, gradient};
}

template <class T>
Gradients<Tensor> backward(const RowArguments& a, const Tensor& grad, const Tensor& state, bool need_input,
                           bool need_scale, bool need_bias, bool need_gate, bool inplace) {
  RowPrepared<T> prepared(a);
  auto& call = prepared.call;
  const int64_t rows = call.rows, classes = call.classes;
  constexpr ScalarType type = type_of<T>();
  const std::vector<T> upstream = upstream_of<T>(a.input, grad);
  if (state.numel() != a.states(rows) || state.scalar_type() != type || !state.is_contiguous())
    fail("grad or state are not those of these logits");
  prepared.check_labels(a, false);
  prepared.place_states(static_cast<T*>(const_cast<void*>(state.const_data_ptr())));
  for (int k = 0; k < 2; ++k) call.inverse_denominators[k] = prepared.inverse[k];
  call.upstream = upstream.data();
  call.upstream_stride = grad.dim() == 0 ? 0 : 1;
  Tensor d_input = !need_input ? allocate({0}, {1}, type) : inplace ? a.input : dense_like(a.input);
  if (need_input) {
    call.gradient = d_input.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(d_input);
  }
  Tensor d_gate = need_gate ? dense_like(*a.row_gate) : allocate({0}, {1}, type);
  if (need_gate) {
    T* out = static_cast<T*>(d_gate.mutable_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
      T slope = call.inverse_denominators[0] * call.gate_slopes[0][row];
      if (a.two_labels()) slope += call.inverse_denominators[1] * call.gate_slopes[1][row];
      out[row] = upstream[row * call.upstream_stride] * slope;
    }
  }
  const auto kernel = kernels<T>().backward;
  const auto run = [&](const ltk::CrossEntropyCall<T>& part, int64_t begin, int64_t end) {
    ltk::RowCrossEntropyCall<T> block = call;
    block.scale_sums = part.scale_sums;
    block.bias_sums = part.bias_sums;
    kernel(block, begin, end);
  };
  if (!need_input && !need_scale && !need_bias)
    return {d_input, allocate({0}, {1}, type), allocate({0}, {1}, type), d_gate};
  auto [d_scale, d_bias] = backward_rows<T>(call, classes, need_scale, need_bias, prepared.shared.grain(), run);
  return {d_input, d_scale, d_bias, d_gate};
}

std::tuple<Tensor, Tensor, Tensor> row_cross_entropy_forward(LTK_ROW_CROSS_ENTROPY_PARAMETERS, bool with_gradient) {
  target = at_unit_stride(target);
  if (second_target) second_target = at_unit_stride(*second_target);
  const RowArguments a LTK_ROW_CROSS_ENTROPY_PASSED;
  return input.scalar_type() == ScalarType::Double ? forward<double>(a, reduction, empty_zero, with_gradient)
                                                   : forward<float>(a, reduction, empty_zero, with_gradient);
}

Gradients<Tensor> row_cross_entropy_backward(Tensor grad, Tensor state, LTK_ROW_CROSS_ENTROPY_PARAMETERS,
                                             bool need_input, bool need_scale, bool need_bias, bool need_gate,
                                             bool inplace) {
  target = at_unit_stride(target);
  if (second_target) second_target = at_unit_stride(*second_target);
  const RowArguments a LTK_ROW_CROSS_ENTROPY_PASSED;
  return input.scalar_type() == ScalarType::Double
             ? backward<double>(a, grad, state, need_input, need_scale, need_bias, need_gate, inplace)
             : backward<float>(a, grad, state, need_input, need_scale, need_bias, need_gate, inplace);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("row_cross_entropy_forward(" LTK_ROW_CROSS_ENTROPY_ARGUMENTS
        ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("row_cross_entropy_backward(Tensor grad, Tensor state, " LTK_ROW_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool need_class_scale, bool need_class_bias, bool need_row_gate, bool inplace)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("row_cross_entropy_forward", TORCH_BOX(&row_cross_entropy_forward));
  m.impl("row_cross_entropy_backward", TORCH_BOX(&row_cross_entropy_backward));
}

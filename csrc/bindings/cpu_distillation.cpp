// Registers the CPU core of distillation.
#include <tuple>

#include "bindings/cpu_prepared.h"
#include "bindings/distillation_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

template <class T>
const ltk::DistillationKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return ltk::kernels().distillation.single;
  else
    return ltk::kernels().distillation.real;
}

template <class T>
struct DistillationPrepared {
  ltk::DistillationCall<T> call;
  std::vector<T> no_bias;

  explicit DistillationPrepared(const DistillationArguments& a) {
    check_sizes<T>(a);
    call.classes = a.classes();
    call.rows = a.rows();
    call.input = a.input.const_data_ptr();
    call.input_type = element_type(a.input);
    call.input_layout = layout(a.input);
    call.teacher = a.teacher.const_data_ptr();
    call.teacher_type = element_type(a.teacher);
    call.teacher_layout = layout(a.teacher);
    call.ignore_index = a.ignore_index;
    if (a.target) {
      call.target = a.target->const_data_ptr();
      call.target_type = element_type(*a.target);
    }
    call.student_scale = T(a.student_scale);
    call.teacher_scale = T(a.teacher_scale);
    if (a.student_bias || a.teacher_bias || a.class_bias) {
      no_bias.resize(call.classes);
      call.student_bias = bias("student_bias", a.student_bias);
      call.teacher_bias = bias("teacher_bias", a.teacher_bias);
      call.class_bias = bias("class_bias", a.class_bias);
    }
    call.row_weight = data<T>(a.sample_weight);
    if (call.row_weight != nullptr) check_finite<T>("sample_weight", call.row_weight, call.rows, T(0));
  }

  const T* bias(const char* name, const OptionalTensor& given) const {
    if (!given) return no_bias.data();
    const T* values = data<T>(given);
    bool good = true;
    for (int64_t j = 0; j < call.classes; ++j) good &= values[j] <= std::numeric_limits<T>::max();  // -inf is allowed
    if (!good) fail(std::string("value: bad value in ") + name);
    return values;
  }

  // Refuses labels that are out of range or of an absent class; returns how many rows have one.
  int64_t count_labels() const {
    int64_t count = 0;
    for (int64_t row = 0; call.target != nullptr && row < call.rows; ++row) {
      const int64_t y = ltk::label_at(call.target, call.target_type, row);
      const bool beyond = call.target_type == ltk::ElementType::u64 && y < 0;  // 2^63 or more
      if (y == call.ignore_index && !beyond) continue;
      if (y < 0 || y >= call.classes) fail("value: label out of range in target");
      if (call.class_bias != nullptr && call.class_bias[y] == -std::numeric_limits<T>::infinity())
        fail("value: label of a class without a bias in target");
      ++count;
    }
    return count;
  }

  // The parts' weights over their denominators; `inverses` are those of the labels and of the rows.
  void set_factors(const DistillationArguments& a, const T* inverses) {
    call.ce_factor = T(a.ce_weight) * inverses[0];
    call.kd_factor = T(a.kd_weight) * inverses[1];
  }
  // Rows a thread takes at least: 16k logits of either side, below which a second thread costs more than it does.
  int64_t grain() const { return std::max<int64_t>(1, 16384 / call.classes); }

  void write_gradient_to(const Tensor& gradient) {
    call.gradient = const_cast<void*>(gradient.const_data_ptr());
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(gradient);
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const DistillationArguments& a, bool with_gradient) {
  DistillationPrepared<T> prepared(a);
  auto& call = prepared.call;
  constexpr ScalarType type = type_of<T>();
  const int64_t labels = prepared.count_labels(), rows = call.rows;
  Tensor state = allocate({a.states()}, {1}, type);
  T* memory = static_cast<T*>(state.mutable_data_ptr());
  const bool mean = a.reduction == mean_count;
  T* inverses = memory + 7 * rows;
  inverses[0] = mean ? T(1.0 / double(labels)) : T(1);
  inverses[1] = mean ? T(1.0 / double(rows)) : T(1);
  call.states = reinterpret_cast<ltk::DistillationRow<T>*>(memory);
  prepared.set_factors(a, inverses);
  Tensor gradient = with_gradient ? dense_like(a.input) : Tensor();
  if (with_gradient) prepared.write_gradient_to(gradient);
  Tensor loss;
  std::vector<T> losses;
  if (a.reduction == none) {
    loss = a.input.dim() == 2 ? allocate({a.input.size(0)}, {1}, type)
                              : allocate({a.input.size(0), a.input.size(2)}, {a.input.size(2), 1}, type);
    call.loss = static_cast<T*>(loss.mutable_data_ptr());
  } else {
    loss = allocate({}, {}, type);
    losses.resize(rows);
    call.loss = losses.data();
  }
  const auto kernel = kernels<T>().forward;
  torch::stable::parallel_for(0, rows, prepared.grain(), [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  if (a.reduction != none) {
    double total = 0;
    for (const T row_loss : losses) total += row_loss;
    const bool nothing = mean && (rows == 0 || (call.target != nullptr && labels == 0));  // 0 / 0
    *static_cast<T*>(loss.mutable_data_ptr()) = T(nothing ? std::numeric_limits<double>::quiet_NaN() : total);
  }
  return {loss, state, gradient};
}

template <class T>
Tensor backward(const DistillationArguments& a, const Tensor& grad, const Tensor& state, bool need_input,
                bool inplace) {
  DistillationPrepared<T> prepared(a);
  auto& call = prepared.call;
  const std::vector<T> upstream = upstream_of<T>(a.input, grad);
  if (state.numel() != a.states() || state.scalar_type() != type_of<T>() || !state.is_contiguous() ||
      (grad.dim() == 0) != (a.reduction != none))
    fail("grad or state are not those of these logits");
  if (!need_input) return allocate({0}, {1}, type_of<T>());
  prepared.count_labels();
  T* memory = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
  call.states = reinterpret_cast<ltk::DistillationRow<T>*>(memory);
  prepared.set_factors(a, memory + 7 * call.rows);
  call.upstream = upstream.data();
  call.upstream_stride = grad.dim() == 0 ? 0 : 1;
  Tensor d_input = inplace ? a.input : dense_like(a.input);
  prepared.write_gradient_to(d_input);
  const auto kernel = kernels<T>().backward;
  torch::stable::parallel_for(0, call.rows, prepared.grain(),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return d_input;
}

void at_unit_stride(OptionalTensor& labels) {
  if (labels && !labels->is_contiguous()) labels = torch::stable::contiguous(*labels);
}

std::tuple<Tensor, Tensor, Tensor> distillation_forward(LTK_DISTILLATION_PARAMETERS, bool with_gradient) {
  at_unit_stride(target);
  const DistillationArguments a LTK_DISTILLATION_PASSED;
  return input.scalar_type() == ScalarType::Double ? forward<double>(a, with_gradient)
                                                   : forward<float>(a, with_gradient);
}

Tensor distillation_backward(Tensor grad, Tensor state, LTK_DISTILLATION_PARAMETERS, bool need_input, bool inplace) {
  at_unit_stride(target);
  const DistillationArguments a LTK_DISTILLATION_PASSED;
  return input.scalar_type() == ScalarType::Double ? backward<double>(a, grad, state, need_input, inplace)
                                                   : backward<float>(a, grad, state, need_input, inplace);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("distillation_forward(" LTK_DISTILLATION_ARGUMENTS ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("distillation_backward(Tensor grad, Tensor state, " LTK_DISTILLATION_ARGUMENTS
        ", bool need_input, bool inplace) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("distillation_forward", TORCH_BOX(&distillation_forward));
  m.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

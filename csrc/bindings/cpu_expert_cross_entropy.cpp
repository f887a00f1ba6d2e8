// Registers the CPU core of several experts' losses.
#include <tuple>

#include "bindings/cpu_prepared.h"
#include "bindings/expert_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

template <class T>
const ltk::ExpertCrossEntropyKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return ltk::kernels().expert_cross_entropy.single;
  else
    return ltk::kernels().expert_cross_entropy.real;
}

// The call and the memory its prepared parameters live in.
template <class T>
struct ExpertPrepared {
  ltk::ExpertCrossEntropyCall<T> call;
  std::vector<T> scale, bias, ones;
  const T* class_bias = nullptr;  // as given

  explicit ExpertPrepared(const ExpertCrossEntropyArguments& a) {
    check_sizes<T>(a);
    constexpr T lowest = std::numeric_limits<T>::lowest();
    call.experts = a.experts();
    call.samples = a.rows();
    call.classes = a.classes();
    const int64_t table = call.experts * call.classes;
    call.input = a.input.const_data_ptr();
    call.input_type = element_type(a.input);
    call.input_layout = sample_layout(a.input);
    call.target = a.target.const_data_ptr();
    call.target_type = element_type(a.target);
    call.ignore_index = a.ignore_index;
    const T s = call.uniform_scale = T(a.scale);
    const auto given = [&](const char* name, const OptionalTensor& tensor, T least) {
      const T* values = data<T>(tensor);
      if (values != nullptr) check_finite<T>(name, values, tensor->numel(), least);
      return values;
    };
    call.weight = given("weight", a.weight, T(0));
    call.margin = given("class_margin", a.class_margin, lowest);
    call.row_weight = given("sample_weight", a.sample_weight, T(0));
    const T* class_scale = given("class_scale", a.class_scale, lowest);
    class_bias = data<T>(a.class_bias);
    for (int64_t j = 0; class_bias != nullptr && j < table; ++j)
      if (!(class_bias[j] <= std::numeric_limits<T>::max())) fail("value: bad value in class_bias");  // -inf is allowed
    if (class_scale != nullptr) {
      scale.resize(table);
      for (int64_t j = 0; j < table; ++j) scale[j] = s * class_scale[j];
      call.scale = scale.data();
    }
    if (class_bias != nullptr && s == T(1)) {
      call.bias = class_bias;
    } else if (class_bias != nullptr || class_scale != nullptr) {
      bias.resize(table);
      for (int64_t j = 0; class_bias != nullptr && j < table; ++j) bias[j] = s * class_bias[j];
      call.bias = bias.data();
    }
    call.diversity = T(a.diversity);
    const T* temperature = given("diversity_temperature", a.temperature, T(0));
    if (temperature != nullptr) {
      call.temperature = temperature;
      call.diversity *= temperature[call.classes];
    } else if (call.bias != nullptr || s != T(1)) {  // softened logits are others than the cross-entropy's
      ones.assign(call.classes, T(1));
      call.temperature = ones.data();
    }
    if (a.teacher) {
      call.teacher = a.teacher->const_data_ptr();
      call.teacher_type = element_type(*a.teacher);
      call.teacher_layout = layout(*a.teacher);
      call.distillation = T(a.distillation);
      call.distillation_scale = T(a.distillation_scale);
    }
  }

  // Samples are rows of their experts: sample i's are rows i E to i E + E - 1.
  static ltk::Layout sample_layout(const Tensor& tensor) {
    return {tensor.size(0), tensor.stride(1), tensor.stride(2), tensor.stride(0)};
  }

  // Refuses labels that are out of range or that an expert with weight does not know. Returns how many samples have
  // one, and in `totals` each expert's weight of them.
  int64_t count_labels(std::vector<double>* totals) const {
    totals->assign(call.experts, 0);
    int64_t count = 0;
    for (int64_t i = 0; i < call.samples; ++i) {
      const int64_t y = ltk::label_at(call.target, call.target_type, i);
      const bool beyond = call.target_type == ltk::ElementType::u64 && y < 0;  // 2^63 or more
      if (y == call.ignore_index && !beyond) continue;
      if (y < 0 || y >= call.classes) fail("value: label out of range in target");
      for (int64_t e = 0; e < call.experts; ++e) {
        const int64_t at = e * call.classes + y;
        const double w = call.weight == nullptr ? 1.0 : double(call.weight[at]);
        if (class_bias != nullptr && class_bias[at] == -std::numeric_limits<T>::infinity() && w != 0)
          fail("value: label of a class without a bias in target");
        (*totals)[e] += w * (call.row_weight == nullptr ? 1.0 : double(call.row_weight[i]));
      }
      ++count;
    }
    return count;
  }

  // Samples a thread takes at least: 16k logits, below which a second thread costs more than it does.
  int64_t grain() const { return std::max<int64_t>(1, 16384 / (call.experts * call.classes)); }

  void set_state(const ExpertCrossEntropyArguments& a, const Tensor& state) {
    T* memory = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
    if (a.aggregate) call.mean = memory;
    call.states = memory + a.means();
    T* tail = memory + a.states() - call.experts - 1;
    call.inverse_denominators = tail;
    call.inverse_count = tail[call.experts];
  }

  void write_gradient_to(const Tensor& gradient) {
    call.gradient = const_cast<void*>(gradient.const_data_ptr());
    call.gradient_layout = sample_layout(gradient);
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const ExpertCrossEntropyArguments& a, bool with_gradient) {
  ExpertPrepared<T> prepared(a);
  auto& call = prepared.call;
  constexpr ScalarType type = type_of<T>();
  std::vector<double> totals;
  const int64_t count = prepared.count_labels(&totals);
  Tensor state = allocate({a.states()}, {1}, type);
  T* tail = static_cast<T*>(state.mutable_data_ptr()) + a.states() - call.experts - 1;
  const bool mean = a.reduction != none && a.reduction != sum;
  bool empty = mean;
  for (int64_t e = 0; e < call.experts; ++e) {
    const double denominator = !mean ? 1.0 : a.reduction == mean_count ? double(count) : totals[e];
    tail[e] = denominator == 0 ? T(0) : T(1.0 / denominator);
    empty &= denominator == 0;
  }
  tail[call.experts] = mean && count > 0 ? T(1.0 / double(count)) : T(1);
  prepared.set_state(a, state);
  Tensor gradient = with_gradient ? torch::stable::empty_like(a.input) : Tensor();
  if (with_gradient) prepared.write_gradient_to(gradient);
  Tensor loss = a.reduction == none ? allocate({call.samples}, {1}, type) : allocate({}, {}, type);
  std::vector<T> losses(a.reduction == none ? 0 : call.samples);
  call.loss = a.reduction == none ? static_cast<T*>(loss.mutable_data_ptr()) : losses.data();
  const auto kernel = kernels<T>().forward;
  torch::stable::parallel_for(0, call.samples, prepared.grain(),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  if (a.reduction != none) {
    double total = empty && !a.empty_zero ? std::numeric_limits<double>::quiet_NaN() : 0;
    for (const T sample_loss : losses) total += sample_loss;
    *static_cast<T*>(loss.mutable_data_ptr()) = T(total);
  }
  return {loss, state, gradient};
}

template <class T>
Tensor backward(const ExpertCrossEntropyArguments& a, const Tensor& grad, const Tensor& state, bool need_input,
                bool inplace) {
  ExpertPrepared<T> prepared(a);
  auto& call = prepared.call;
  const bool by_sample = a.reduction == none;
  if (state.numel() != a.states() || state.scalar_type() != type_of<T>() || !state.is_contiguous() ||
      grad.scalar_type() != type_of<T>() || grad.dim() != int64_t(by_sample) ||
      (by_sample && grad.size(0) != call.samples))
    fail("grad or state are not those of these logits");
  if (!need_input) return allocate({0}, {1}, type_of<T>());
  std::vector<double> totals;
  prepared.count_labels(&totals);
  prepared.set_state(a, state);
  call.mean = nullptr;
  call.upstream = static_cast<const T*>(grad.const_data_ptr());
  call.upstream_stride = by_sample ? grad.stride(0) : 0;
  Tensor d_input = inplace ? a.input : torch::stable::empty_like(a.input);
  prepared.write_gradient_to(d_input);
  const auto kernel = kernels<T>().backward;
  torch::stable::parallel_for(0, call.samples, prepared.grain(),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return d_input;
}

std::tuple<Tensor, Tensor, Tensor> expert_cross_entropy_forward(LTK_EXPERT_CROSS_ENTROPY_PARAMETERS,
                                                                bool with_gradient) {
  target = at_unit_stride(target);
  const ExpertCrossEntropyArguments a LTK_EXPERT_CROSS_ENTROPY_PASSED;
  return input.scalar_type() == ScalarType::Double ? forward<double>(a, with_gradient)
                                                   : forward<float>(a, with_gradient);
}

Tensor expert_cross_entropy_backward(Tensor grad, Tensor state, LTK_EXPERT_CROSS_ENTROPY_PARAMETERS, bool need_input,
                                     bool inplace) {
  target = at_unit_stride(target);
  const ExpertCrossEntropyArguments a LTK_EXPERT_CROSS_ENTROPY_PASSED;
  return input.scalar_type() == ScalarType::Double ? backward<double>(a, grad, state, need_input, inplace)
                                                   : backward<float>(a, grad, state, need_input, inplace);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("expert_cross_entropy_forward(" LTK_EXPERT_CROSS_ENTROPY_ARGUMENTS
        ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("expert_cross_entropy_backward(Tensor grad, Tensor state, " LTK_EXPERT_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool inplace) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("expert_cross_entropy_forward", TORCH_BOX(&expert_cross_entropy_forward));
  m.impl("expert_cross_entropy_backward", TORCH_BOX(&expert_cross_entropy_backward));
}

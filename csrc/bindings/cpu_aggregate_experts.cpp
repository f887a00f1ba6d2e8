// Registers the CPU core of the experts' mean.
#include <tuple>

#include "bindings/cpu_prepared.h"
#include "bindings/expert_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;
using ltk::AggregateMode;
using ltk::ExpertWeights;

template <class T>
const ltk::AggregateKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return ltk::kernels().aggregate_experts.single;
  else
    return ltk::kernels().aggregate_experts.real;
}

// The call, and the memory of the weights over their sums.
template <class T>
struct AggregatePrepared {
  ltk::AggregateCall<T> call;
  std::vector<T> share, totals;  // the sums, one for each that an expert's weights are divided by

  explicit AggregatePrepared(const AggregateExpertsArguments& a) {
    check_sizes<T>(a);
    call.experts = a.experts();
    call.samples = a.rows();
    call.classes = a.classes();
    call.topk = a.topk;
    call.mode = static_cast<AggregateMode>(a.mode);
    call.weights = static_cast<ExpertWeights>(a.weights);
    call.input = a.input.const_data_ptr();
    call.input_type = element_type(a.input);
    call.input_layout = sample_layout(a.input);
    const T* weight = data<T>(a.expert_weight);
    if (weight == nullptr) return;
    check_finite<T>("expert_weight", weight, a.weight_count(), T(0));
    const int64_t count = a.weight_count(), groups = count / call.experts;
    totals.assign(groups, T(0));
    for (int64_t at = 0; at < count; ++at) totals[group(at)] += weight[at];
    for (const T total : totals)
      if (!(total > T(0))) fail("value: no expert has a weight in expert_weight");
    share.resize(count);
    for (int64_t at = 0; at < count; ++at) share[at] = weight[at] / totals[group(at)];
    call.share = share.data();
  }

  // Which sum the weight belongs to: of the one there is, of its sample, of its class.
  int64_t group(int64_t at) const {
    switch (call.weights) {
      case ExpertWeights::sample:
        return at / call.experts;
      case ExpertWeights::classes:
        return at % call.classes;
      default:
        return 0;
    }
  }

  static ltk::Layout sample_layout(const Tensor& tensor) {
    return {tensor.size(0), tensor.stride(1), tensor.stride(2), tensor.stride(0)};
  }

  int64_t grain() const { return std::max<int64_t>(1, 16384 / (call.experts * call.classes)); }

  void set_state(const AggregateExpertsArguments& a, const Tensor& state) {
    T* memory = static_cast<T*>(const_cast<void*>(state.const_data_ptr()));
    call.softmax = memory;
    call.best = memory + a.softmaxes();
    call.confidence = memory + a.softmaxes() + a.topk * a.rows();
  }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const AggregateExpertsArguments& a) {
  AggregatePrepared<T> prepared(a);
  auto& call = prepared.call;
  Tensor state = allocate({a.states()}, {1}, type_of<T>());
  static_cast<T*>(state.mutable_data_ptr())[a.states() - 1] = T(1);
  prepared.set_state(a, state);
  Tensor output = allocate({call.samples, call.classes}, {call.classes, 1}, a.input.scalar_type());
  call.output = output.mutable_data_ptr();
  call.output_layout = layout(output);
  const auto kernel = kernels<T>().forward;
  torch::stable::parallel_for(0, call.samples, prepared.grain(),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {output, state, Tensor()};
}

// The gradient of weights that samples share: over blocks of samples that do not depend on the number of threads, added
// in their order.
template <class T, class Run>
void backward_blocks(ltk::AggregateCall<T> call, int64_t count, T* d_weight, Run run) {
  const int64_t samples = call.samples, blocks = std::clamp<int64_t>(samples / 16, 1, 16);
  std::vector<T> sums(blocks * count);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      ltk::AggregateCall<T> part = call;
      part.share_sums = sums.data() + block * count;
      run(part, samples * block / blocks, samples * (block + 1) / blocks);
    }
  });
  for (int64_t at = 0; at < count; ++at) {
    d_weight[at] = T(0);
    for (int64_t block = 0; block < blocks; ++block) d_weight[at] += sums[block * count + at];
  }
}

template <class T>
std::tuple<Tensor, Tensor> backward(const AggregateExpertsArguments& a, const Tensor& grad, const Tensor& state,
                                    bool need_input, bool need_weight, bool inplace) {
  AggregatePrepared<T> prepared(a);
  auto& call = prepared.call;
  if (state.numel() != a.states() || state.scalar_type() != type_of<T>() || !state.is_contiguous() || grad.dim() != 2 ||
      grad.size(0) != call.samples || grad.size(1) != call.classes || grad.scalar_type() != a.input.scalar_type())
    fail("grad or state are not those of these logits");
  prepared.set_state(a, state);
  call.output = const_cast<void*>(grad.const_data_ptr());
  call.output_layout = layout(grad);
  Tensor d_input = !need_input ? allocate({0}, {1}, type_of<T>())
                   : inplace   ? a.input
                               : torch::stable::empty_like(a.input);
  if (need_input) {
    call.gradient = const_cast<void*>(d_input.const_data_ptr());
    call.gradient_layout = prepared.sample_layout(d_input);
  }
  need_weight = need_weight && a.expert_weight;
  Tensor d_weight = need_weight ? torch::stable::empty_like(*a.expert_weight) : allocate({0}, {1}, type_of<T>());
  const auto kernel = kernels<T>().backward;
  const auto run = [&](const ltk::AggregateCall<T>& part, int64_t begin, int64_t end) { kernel(part, begin, end); };
  if (!need_weight) {
    if (need_input)
      torch::stable::parallel_for(0, call.samples, prepared.grain(),
                                  [&](int64_t begin, int64_t end) { run(call, begin, end); });
    return {d_input, d_weight};
  }
  T* sums = static_cast<T*>(d_weight.mutable_data_ptr());
  const int64_t count = a.weight_count();
  if (call.weights == ExpertWeights::sample) {
    std::fill_n(sums, count, T(0));
    call.share_sums = sums;
    torch::stable::parallel_for(0, call.samples, prepared.grain(),
                                [&](int64_t begin, int64_t end) { run(call, begin, end); });
  } else {
    backward_blocks(call, count, sums, run);
  }
  for (int64_t at = 0; at < count; ++at) sums[at] /= prepared.totals[prepared.group(at)];
  return {d_input, d_weight};
}

std::tuple<Tensor, Tensor, Tensor> aggregate_experts_forward(Tensor input, OptionalTensor expert_weight, int64_t mode,
                                                             int64_t weights, int64_t topk, bool) {
  const AggregateExpertsArguments a{input, expert_weight, mode, weights, topk};
  return input.scalar_type() == ScalarType::Double ? forward<double>(a) : forward<float>(a);
}

std::tuple<Tensor, Tensor> aggregate_experts_backward(Tensor grad, Tensor state, Tensor input,
                                                      OptionalTensor expert_weight, int64_t mode, int64_t weights,
                                                      int64_t topk, bool need_input, bool need_expert_weight,
                                                      bool inplace) {
  const AggregateExpertsArguments a{input, expert_weight, mode, weights, topk};
  return input.scalar_type() == ScalarType::Double
             ? backward<double>(a, grad, state, need_input, need_expert_weight, inplace)
             : backward<float>(a, grad, state, need_input, need_expert_weight, inplace);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("aggregate_experts_forward(" LTK_AGGREGATE_EXPERTS_ARGUMENTS
        ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("aggregate_experts_backward(Tensor grad, Tensor state, " LTK_AGGREGATE_EXPERTS_ARGUMENTS
        ", bool need_input, bool need_expert_weight, bool inplace) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("aggregate_experts_forward", TORCH_BOX(&aggregate_experts_forward));
  m.impl("aggregate_experts_backward", TORCH_BOX(&aggregate_experts_backward));
}

// Registers the CPU core of LADE: the columns' sums of blocks of rows are joined here, in the order of the blocks.
#include <tuple>

#include "bindings/cpu_prepared.h"
#include "bindings/lade_arguments.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

template <class T>
const ltk::LadeKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return ltk::kernels().lade.single;
  else
    return ltk::kernels().lade.real;
}

template <class T>
struct LadePrepared {
  ltk::LadeCall<T> call;
  Prepared<T> shared;

  explicit LadePrepared(const LadeArguments& a) : shared((check_sizes<T>(a), a.shared())) {
    static_cast<ltk::CrossEntropyCall<T>&>(call) = shared.call;
    call.with_ce = a.with_ce;
    call.with_columns = a.weight > 0;
    call.row_offset = data<T>(a.row_offset);
    constexpr T largest = std::numeric_limits<T>::max();
    check_finite<T>("class_prior", static_cast<const T*>(a.prior.const_data_ptr()), call.classes, T(0));
    if (a.class_offset) check_finite<T>("class_offset", data<T>(a.class_offset), call.classes, -largest);
    if (a.row_offset) check_finite<T>("row_offset", call.row_offset, call.classes, -largest);
  }

  void place_state(T* memory) {
    call.row_states = reinterpret_cast<ltk::LadeRow<T>*>(memory);
    columns = memory + 3 * call.rows;
    call.column_factor = columns;
    call.column_log_sum = columns + call.classes;
    call.label_loss = columns + 2 * call.classes;
    inverse = columns + 3 * call.classes;
  }
  T* columns = nullptr;
  T* inverse = nullptr;
};

// What the blocks' columns make together: the regulariser, and the classes' part of the state.
template <class T>
double finish_columns(const LadeArguments& a, const std::vector<T>& blocks, int64_t count, double rows, T* columns) {
  const int64_t classes = a.classes();
  const T* prior = static_cast<const T*>(a.prior.const_data_ptr());
  const T* class_offset = data<T>(a.class_offset);
  double regulariser = 0;
  for (int64_t c = 0; c < classes; ++c) {
    double max = -std::numeric_limits<double>::infinity(), sum = 0, own = 0, number = 0;
    const auto at = [&](int64_t block, int part) { return double(blocks[(block * 4 + part) * classes + c]); };
    for (int64_t block = 0; block < count; ++block) max = std::max(max, at(block, 0));
    const double base = std::isinf(max) ? 0.0 : max;
    for (int64_t block = 0; block < count; ++block) {
      sum += at(block, 1) * std::exp(at(block, 0) - base);
      own += at(block, 2);
      number += at(block, 3);
    }
    const double log_sum = base + std::log(sum), share = prior[c], label_count = number + 1e-8;
    const double bound = log_sum - std::log(rows) + (class_offset == nullptr ? 0.0 : double(class_offset[c]));
    regulariser -= share * (own / label_count - bound - a.remine_lambda * bound * bound);
    columns[c] = T(a.weight * share * (1.0 + 2.0 * a.remine_lambda * bound));
    columns[classes + c] = T(log_sum);
    columns[2 * classes + c] = T(a.weight * share / label_count);
  }
  return a.weight * regulariser;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const LadeArguments& a, bool with_gradient) {
  LadePrepared<T> prepared(a);
  auto& call = prepared.call;
  const int64_t rows = call.rows, classes = call.classes;
  constexpr ScalarType type = type_of<T>();
  const double count = prepared.shared.check_labels(data<T>(a.class_bias), false);
  Tensor state = allocate({a.states()}, {1}, type), loss = allocate({}, {}, type);
  prepared.place_state(static_cast<T*>(state.mutable_data_ptr()));
  *prepared.inverse = call.inverse_denominator = T(1.0 / count);
  std::vector<T> losses(rows);
  call.loss = losses.data();

  // Blocks of rows that do not depend on the number of threads; a column's sums of each take O(C).
  const int64_t blocks = std::clamp<int64_t>(rows / 16, 1, 16);
  std::vector<T> columns(call.with_columns ? 4 * blocks * classes : 0);
  const auto kernel = kernels<T>().forward;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      T* part = columns.data() + 4 * block * classes;
      kernel(call, {part, part + classes, part + 2 * classes, part + 3 * classes}, rows * block / blocks,
             rows * (block + 1) / blocks);
    }
  });
  double total = 0;
  for (const T row_loss : losses) total += row_loss;
  total = call.with_ce ? total / count : 0.0;
  if (call.with_columns)
    total += finish_columns<T>(a, columns, blocks, count, prepared.columns);
  else
    std::fill(prepared.columns, prepared.columns + 3 * classes, T(0));
  *static_cast<T*>(loss.mutable_data_ptr()) = T(count == 0 ? std::numeric_limits<double>::quiet_NaN() : total);

  Tensor gradient = with_gradient ? dense_like(a.input) : Tensor();
  if (with_gradient) {
    call.gradient = gradient.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(gradient);
    const T one = 1;
    call.upstream = &one;
    const auto write = kernels<T>().backward;
    torch::stable::parallel_for(0, rows, prepared.shared.grain(),
                                [&](int64_t begin, int64_t end) { write(call, begin, end); });
  }
  return {loss, state, gradient};
}

template <class T>
Tensor backward(const LadeArguments& a, const Tensor& grad, const Tensor& state, bool need_input, bool inplace) {
  LadePrepared<T> prepared(a);
  auto& call = prepared.call;
  const std::vector<T> upstream = upstream_of<T>(a.input, grad);
  if (grad.dim() != 0 || state.numel() != a.states() || state.scalar_type() != type_of<T>() || !state.is_contiguous())
    fail("grad or state are not those of these logits");
  if (!need_input) return allocate({0}, {1}, type_of<T>());
  prepared.shared.check_labels(data<T>(a.class_bias), false);
  prepared.place_state(static_cast<T*>(const_cast<void*>(state.const_data_ptr())));
  call.inverse_denominator = *prepared.inverse;
  call.upstream = upstream.data();
  Tensor d_input = inplace ? a.input : dense_like(a.input);
  call.gradient = d_input.mutable_data_ptr();
  call.gradient_type = call.input_type;
  call.gradient_layout = layout(d_input);
  const auto kernel = kernels<T>().backward;
  torch::stable::parallel_for(0, call.rows, prepared.shared.grain(),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return d_input;
}

std::tuple<Tensor, Tensor, Tensor> lade_forward(Tensor input, Tensor target, Tensor prior, OptionalTensor class_bias,
                                                OptionalTensor class_offset, OptionalTensor row_offset,
                                                int64_t ignore_index, int64_t, double remine_lambda, double weight,
                                                bool with_ce, bool with_gradient) {
  target = at_unit_stride(target);
  const LadeArguments a{input,      target,       prior,         class_bias, class_offset,
                        row_offset, ignore_index, remine_lambda, weight,     with_ce};
  return input.scalar_type() == ScalarType::Double ? forward<double>(a, with_gradient)
                                                   : forward<float>(a, with_gradient);
}

Tensor lade_backward(Tensor grad, Tensor state, Tensor input, Tensor target, Tensor prior, OptionalTensor class_bias,
                     OptionalTensor class_offset, OptionalTensor row_offset, int64_t ignore_index, int64_t,
                     double remine_lambda, double weight, bool with_ce, bool need_input, bool inplace) {
  target = at_unit_stride(target);
  const LadeArguments a{input,      target,       prior,         class_bias, class_offset,
                        row_offset, ignore_index, remine_lambda, weight,     with_ce};
  return input.scalar_type() == ScalarType::Double ? backward<double>(a, grad, state, need_input, inplace)
                                                   : backward<float>(a, grad, state, need_input, inplace);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("lade_forward(" LTK_LADE_ARGUMENTS ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("lade_backward(Tensor grad, Tensor state, " LTK_LADE_ARGUMENTS ", bool need_input, bool inplace) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("lade_forward", TORCH_BOX(&lade_forward));
  m.impl("lade_backward", TORCH_BOX(&lade_backward));
}

// Registers the CPU core of binary_cross_entropy.
#include <atomic>
#include <tuple>

#include "bindings/binary_cross_entropy_arguments.h"
#include "bindings/cpu_prepared.h"
#include "cpu/kernels.h"

namespace {

using namespace ltk::bindings;

template <class T>
const ltk::BinaryCrossEntropyKernels<T>& kernels() {
  if constexpr (sizeof(T) == 4)
    return ltk::kernels().binary_cross_entropy.single;
  else
    return ltk::kernels().binary_cross_entropy.real;
}

template <class T>
void check_probabilities(const char* name, const T* values, int64_t count) {
  bool good = true;
  for (int64_t j = 0; j < count; ++j) good &= values[j] >= T(0) && values[j] <= T(1);
  if (!good) fail(std::string("value: bad value in ") + name);
}

// The call, and how many rows count.
template <class T>
struct BinaryPrepared {
  ltk::BinaryCrossEntropyCall<T> call;
  int64_t counted = 0;

  explicit BinaryPrepared(const BinaryArguments& a) {
    check_sizes<T>(a);
    const int64_t classes = call.classes = a.input.size(1);
    call.rows = a.input.numel() / classes;
    call.input = a.input.const_data_ptr();
    call.input_type = element_type(a.input);
    call.input_layout = layout(a.input);
    call.target = a.target.const_data_ptr();
    call.target_type = element_type(a.target);
    if (ltk::is_floating(call.target_type)) call.target_layout = layout(a.target);
    call.ignore_index = a.ignore_index;
    call.background_index = a.background_index;
    const auto weights = [](const char* name, const OptionalTensor& tensor) {
      const T* values = data<T>(tensor);
      if (values != nullptr) check_finite<T>(name, values, tensor->numel(), T(0));
      return values;
    };
    call.weight = weights("weight", a.weight);
    call.pos_weight = weights("pos_weight", a.pos_weight);
    call.neg_weight = weights("neg_weight", a.neg_weight);
    call.row_weight = weights("sample_weight", a.sample_weight);
    call.keep[0] = data<T>(a.foreground_keep);
    call.keep[1] = data<T>(a.background_keep);
    for (int kind = 0; kind < 2; ++kind) {
      const T* keep = call.keep[kind];
      if (keep == nullptr) continue;
      check_probabilities(kind == 0 ? "foreground_keep" : "background_keep", keep, classes);
      for (int64_t j = 0; j < classes; ++j) call.drawn[kind] |= keep[j] > T(0) && keep[j] < T(1);
    }
    call.options = a.options<T>();
    if (a.draw_step) call.step = uint32_t(*static_cast<const int64_t*>(a.draw_step->const_data_ptr()));
    call.seed = uint64_t(a.seed);
    count_rows();
  }

  // Rows a thread takes at least: a term costs some 3 ns/16, several times what one of cross_entropy does.
  int64_t grain() const { return std::max<int64_t>(1, 16384 / call.classes); }

 private:
  void count_rows() {
    counted = call.rows;
    if (ltk::is_floating(call.target_type)) return;
    for (int64_t row = 0; row < call.rows; ++row) {
      const int64_t y = ltk::label_at(call.target, call.target_type, row);
      const bool beyond = call.target_type == ltk::ElementType::u64 && y < 0;  // 2^63 or more
      if (y == call.ignore_index && !beyond)
        --counted;
      else if (y < 0 || (y >= call.classes && y != call.background_index))
        fail("value: label out of range in target");
    }
  }
};

// Runs the kernel over all rows. Column sums are taken over blocks of rows that do not depend on the number of threads,
// and added in their order.
template <class T>
void run(const BinaryPrepared<T>& prepared, T* sums) {
  const auto& call = prepared.call;
  const int64_t rows = call.rows, classes = call.classes;
  std::atomic<bool> good{true};
  const auto kernel = kernels<T>().run;
  if (sums == nullptr) {
    torch::stable::parallel_for(0, rows, prepared.grain(), [&](int64_t begin, int64_t end) {
      if (!kernel(call, begin, end)) good = false;
    });
  } else {
    const int64_t blocks = std::clamp<int64_t>(rows / 16, 1, 16);
    std::vector<T> partial(blocks * 2 * classes);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        ltk::BinaryCrossEntropyCall<T> part = call;
        part.sums = partial.data() + block * 2 * classes;
        if (!kernel(part, rows * block / blocks, rows * (block + 1) / blocks)) good = false;
      }
    });
    std::fill(sums, sums + 2 * classes, T(0));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t j = 0; j < 2 * classes; ++j) sums[j] += partial[block * 2 * classes + j];
  }
  if (!good) fail("value: bad value in target");
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const BinaryArguments& a, int64_t reduction, bool empty_zero,
                                           bool with_gradient) {
  BinaryPrepared<T> prepared(a);
  auto& call = prepared.call;
  const int64_t rows = call.rows;
  constexpr ScalarType type = type_of<T>();
  double inverse = 1;
  if (reduction == mean_weight || reduction == mean_count)
    inverse = prepared.counted == 0 && empty_zero ? 0.0 : 1.0 / double(prepared.counted);
  call.inverse_denominator = T(inverse);
  Tensor state = allocate({a.states()}, {1}, type);
  T* memory = static_cast<T*>(state.mutable_data_ptr());
  memory[a.states() - 1] = call.inverse_denominator;
  Tensor gradient = with_gradient ? dense_like(a.input) : Tensor();
  if (with_gradient) {
    call.gradient = gradient.mutable_data_ptr();
    call.gradient_type = call.input_type;
    call.gradient_layout = layout(gradient);
  }
  Tensor loss = reduction != none    ? allocate({}, {}, type)
                : a.input.dim() == 2 ? allocate({rows}, {1}, type)
                                     : allocate({a.input.size(0), a.input.size(2)}, {a.input.size(2), 1}, type);
  std::vector<T> row_losses(reduction == none ? 0 : rows);
  call.loss = reduction == none ? static_cast<T*>(loss.mutable_data_ptr()) : row_losses.data();
  run(prepared, a.column_sums ? memory : nullptr);
  if (reduction != none) {
    double total = 0;
    for (const T row_loss : row_losses) total += row_loss;
    *static_cast<T*>(loss.mutable_data_ptr()) = T(inverse == 0 ? 0.0 : total * inverse);
  }
  return {loss, state, gradient};
}

template <class T>
Tensor backward(const BinaryArguments& a, const Tensor& grad, const Tensor& state, bool need_input, bool inplace) {
  BinaryPrepared<T> prepared(a);
  auto& call = prepared.call;
  constexpr ScalarType type = type_of<T>();
  const std::vector<T> upstream = upstream_of<T>(a.input, grad);
  if (state.numel() != a.states() || state.scalar_type() != type || !state.is_contiguous())
    fail("grad or state are not those of these logits");
  if (!need_input) return allocate({0}, {1}, type);
  call.inverse_denominator = static_cast<const T*>(state.const_data_ptr())[a.states() - 1];
  call.upstream = upstream.data();
  call.upstream_stride = grad.dim() == 0 ? 0 : 1;
  Tensor d_input = inplace ? a.input : dense_like(a.input);
  call.gradient = d_input.mutable_data_ptr();
  call.gradient_type = call.input_type;
  call.gradient_layout = layout(d_input);
  run(prepared, static_cast<T*>(nullptr));
  return d_input;
}

Tensor at_unit_stride(const Tensor& target) {
  return ltk::is_floating(element_type(target)) || target.is_contiguous() ? target : torch::stable::contiguous(target);
}

std::tuple<Tensor, Tensor, Tensor> binary_cross_entropy_forward(LTK_BINARY_CROSS_ENTROPY_PARAMETERS,
                                                                bool with_gradient) {
  target = at_unit_stride(target);
  const BinaryArguments a LTK_BINARY_CROSS_ENTROPY_PASSED;
  return input.scalar_type() == ScalarType::Double ? forward<double>(a, reduction, empty_zero, with_gradient)
                                                   : forward<float>(a, reduction, empty_zero, with_gradient);
}

Tensor binary_cross_entropy_backward(Tensor grad, Tensor state, LTK_BINARY_CROSS_ENTROPY_PARAMETERS, bool need_input,
                                     bool inplace) {
  target = at_unit_stride(target);
  const BinaryArguments a LTK_BINARY_CROSS_ENTROPY_PASSED;
  return input.scalar_type() == ScalarType::Double ? backward<double>(a, grad, state, need_input, inplace)
                                                   : backward<float>(a, grad, state, need_input, inplace);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ltkernels_cpu, m) {
  m.def("binary_cross_entropy_forward(" LTK_BINARY_CROSS_ENTROPY_ARGUMENTS
        ", bool with_gradient) -> (Tensor, Tensor, Tensor)");
  m.def("binary_cross_entropy_backward(Tensor grad, Tensor state, " LTK_BINARY_CROSS_ENTROPY_ARGUMENTS
        ", bool need_input, bool inplace) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ltkernels_cpu, CPU, m) {
  m.impl("binary_cross_entropy_forward", TORCH_BOX(&binary_cross_entropy_forward));
  m.impl("binary_cross_entropy_backward", TORCH_BOX(&binary_cross_entropy_backward));
}

// Distillation, compiled once per instruction set.
//
// A row of the student and its teacher are swept while they are in L1/L2: (1) the maxima; (2) one exponential a softmax
// and logit, summed and kept in scratch rows, with sum_j e^(b_j) (b_j - a_j) for the divergence; (3) where the gradient
// is wanted now, from the kept exponentials. A backward that recomputes is one sweep from the row's state.
#include <algorithm>

#include "common/masked_term.h"
#include "cpu/distillation.h"
#include "cpu/row_memory.h"
#include "cpu/simd.h"
#include "cpu/sweeps.h"

namespace ltk::LTK_ISA {
namespace {

// The rows of a call, read and written a tile at a time.
template <class T>
struct DistillationRows {
  bool long_rows;
  int64_t tile;
  Rows<T> input, teacher, gradient;

  explicit DistillationRows(const DistillationCall<T>& call)
      : long_rows(call.classes >= 256),
        tile(call.input_layout.stride_class != 1 || call.teacher_layout.stride_class != 1 ||
                     (call.gradient != nullptr && call.gradient_layout.stride_class != 1)
                 ? max_tile
                 : std::clamp<int64_t>(short_tile / call.classes, 1, max_tile)),
        input(call.input, call.input_type, call.input_layout, call.classes, tile),
        teacher(call.teacher, call.teacher_type, call.teacher_layout, call.classes, tile),
        gradient(call.gradient, call.gradient_type, call.gradient_layout, call.classes, tile) {}

  // Calls row(index, student, teacher, gradient or scratch) for each row.
  template <class Row>
  void for_rows(int64_t begin, int64_t end, Row row) {
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t last = std::min(first + tile, end);
      input.read(first, last);
      teacher.read(first, last);
      for (int64_t r = first; r < last; ++r) row(r, input.row(first, r), teacher.row(first, r), gradient.row(first, r));
      gradient.write(first, last);
    }
  }
};

// The logits of a row's three softmaxes.
template <class T, Affine form>
struct RowLogits {
  Adjusted<T, form> student, teacher, ce;

  RowLogits(const DistillationCall<T>& call, const T* z, const T* t)
      : student{z, call.student_scale, nullptr, call.student_bias},
        teacher{t, call.teacher_scale, nullptr, call.teacher_bias},
        ce{z, T(1), nullptr, call.class_bias} {}
};

// The factors of a row's gradient: of e^(a_j), e^(b_j) and e^(u_j), and of what the label loses.
template <class T>
struct RowFactors {
  T student, teacher, ce, label;

  RowFactors(const DistillationCall<T>& call, const DistillationRow<T>& state, int64_t row) {
    const T weight = call.row_weight == nullptr ? T(1) : call.row_weight[row];
    const T kl = call.kd_factor * call.student_scale * weight;
    student = kl * state.inverse_sum;
    teacher = kl * state.teacher_inverse_sum;
    ce = call.ce_factor * weight * state.ce_inverse_sum;
    label = call.ce_factor * weight * state.at_label;
  }
  LTK_INLINE Vec<T> divergence(Vec<T> e_student, Vec<T> e_teacher) const {
    return multiply_add<T>(e_student, splat(student), -(e_teacher * teacher));
  }
};

// The divergence's part of the gradient at one column, with the bits of the sweep.
template <class T, Affine form>
T divergence_at(const RowLogits<T, form>& u, const DistillationRow<T>& state, const RowFactors<T>& factors, int64_t j) {
  const auto one = [](const T* p, T fill) { return load_first(p, 1, fill); };
  return factors.divergence(exponential(u.student.minus(j, state.max, one)),
                            exponential(u.teacher.minus(j, state.teacher_max, one)))[0];
}

// Whether a row has a cross-entropy, and its label.
template <class T>
LTK_INLINE bool has_label(const DistillationCall<T>& call, int64_t row, int64_t* y) {
  if (call.target == nullptr) return false;
  *y = label_at(call.target, call.target_type, row);
  return *y != call.ignore_index;
}

template <class T>
struct Exponentials {
  T *student, *teacher, *ce;
};

template <class T>
struct RowTotals {
  DistillationSums<T> pair;
  T ce;
};

// Sweep (2).
template <bool with_ce, class T, Affine form>
RowTotals<T> exponentiate_row(const RowLogits<T, form> u, int64_t classes, const DistillationRow<T> state,
                              const Exponentials<T> e) {
  const Vec<T> zero = splat(T(0));
  Vec<T> student = zero, teacher = zero, excess = zero, distance = zero, ce = zero;
  blocks(classes, [&](int64_t begin, int64_t end) {
    Vec<T> part_student = zero, part_teacher = zero, part_excess = zero, part_distance = zero, part_ce = zero;
    sweep<T>(begin, end, [&](int64_t j, auto load, auto store) {
      const Vec<T> a = u.student.minus(j, state.max, load), b = u.teacher.minus(j, state.teacher_max, load);
      const Vec<T> ea = exponential(a), eb = exponential(b);
      store(e.student + j, ea);
      store(e.teacher + j, eb);
      part_student += ea;
      part_teacher += eb;
      part_excess += ea - eb;
      part_distance += eb != zero ? eb * (b - a) : zero;  // what the teacher rules out adds nothing, even a = -inf
      if constexpr (with_ce) {
        const Vec<T> ec = exponential(u.ce.minus(j, state.ce_max, load));
        store(e.ce + j, ec);
        part_ce += ec;
      }
    });
    student += part_student;
    teacher += part_teacher;
    excess += part_excess;
    distance += part_distance;
    ce += part_ce;
  });
  return {{sum_lanes<T>(student), sum_lanes<T>(teacher), sum_lanes<T>(excess), sum_lanes<T>(distance)},
          sum_lanes<T>(ce)};
}

template <class T, Affine form>
T row_forward(const DistillationCall<T>& call, const RowLogits<T, form>& u, int64_t row, const Exponentials<T>& e,
              DistillationRow<T>* state) {
  *state = {};
  int64_t y = 0;
  const bool with_ce = has_label(call, row, &y);
  state->max = row_maximum(u.student, call.classes);
  state->teacher_max = row_maximum(u.teacher, call.classes);
  if (with_ce) state->ce_max = row_maximum(u.ce, call.classes);
  const RowTotals<T> totals = with_ce ? exponentiate_row<true>(u, call.classes, *state, e)
                                      : exponentiate_row<false>(u, call.classes, *state, e);
  state->inverse_sum = T(1) / totals.pair.student;
  state->teacher_inverse_sum = T(1) / totals.pair.teacher;
  const T weight = call.row_weight == nullptr ? T(1) : call.row_weight[row];
  T loss = masked_term(call.kd_factor * weight, divergence(totals.pair));
  if (with_ce) {
    const T at_label = e.ce[y];
    // By subtraction where that is exact enough, else added up again: p - 1 never cancels.
    const T others = T(2) * at_label <= totals.ce ? totals.ce - at_label : sum_without(e.ce, call.classes, y);
    loss += masked_term(call.ce_factor * weight, finish_label(others, at_label, state->ce_max - u.ce.at(y), state));
  }
  return loss;
}

// Sweep (3), or the one of a backward: e_student(j, load) and the others give the exponentials.
template <bool with_ce, class T, class Student, class Teacher, class Ce>
void gradient_row(int64_t classes, const RowFactors<T> factors, T upstream, Student e_student, Teacher e_teacher,
                  Ce e_ce, T* out) {
  const auto write = [&](auto times_upstream) {
    sweep<T>(0, classes, [&](int64_t j, auto load, auto store) {
      Vec<T> d = factors.divergence(e_student(j, load), e_teacher(j, load));
      if constexpr (with_ce) d = multiply_add<T>(splat(factors.ce), e_ce(j, load), d);
      store(out + j, times_upstream(d));
    });
  };
  if (upstream == T(1))
    write([](Vec<T> v) { return v; });
  else
    write([upstream](Vec<T> v) { return v * upstream; });
}

template <class T, Affine form>
void forward(const DistillationCall<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  DistillationRows<T> rows(call);
  Scratch<T> teacher_scratch(call.classes), ce_scratch(call.target == nullptr ? 0 : call.classes);
  rows.for_rows(begin, end, [&](int64_t row, const T* z, const T* t, T* out) {
    const RowLogits<T, form> u(call, z, t);
    const Exponentials<T> e{out, teacher_scratch.data(), ce_scratch.data()};
    DistillationRow<T>& state = call.states[row];
    call.loss[row] = row_forward(call, u, row, e, &state);
    if (call.gradient == nullptr) return;
    const RowFactors<T> factors(call, state, row);
    const auto kept = [](const T* from) { return [from](int64_t j, auto load) { return load(from + j, T(0)); }; };
    int64_t y = 0;
    if (!has_label(call, row, &y)) {
      gradient_row<false>(call.classes, factors, T(1), kept(e.student), kept(e.teacher), kept(e.ce), out);
      return;
    }
    const T at_label = divergence_at(u, state, factors, y) + factors.label;
    gradient_row<true>(call.classes, factors, T(1), kept(e.student), kept(e.teacher), kept(e.ce), out);
    out[y] = at_label;
  });
}

template <class T, Affine form>
void backward(const DistillationCall<T>& call, int64_t begin, int64_t end) {
  const FlushSubnormal flush;
  DistillationRows<T> rows(call);
  rows.for_rows(begin, end, [&](int64_t row, const T* z, const T* t, T* out) {
    const RowLogits<T, form> u(call, z, t);
    const DistillationRow<T> state = call.states[row];
    const RowFactors<T> factors(call, state, row);
    const T upstream = call.upstream[row * call.upstream_stride];
    const auto student = [&](int64_t j, auto load) { return exponential(u.student.minus(j, state.max, load)); };
    const auto teacher = [&](int64_t j, auto load) { return exponential(u.teacher.minus(j, state.teacher_max, load)); };
    const auto ce = [&](int64_t j, auto load) { return exponential(u.ce.minus(j, state.ce_max, load)); };
    int64_t y = 0;
    if (!has_label(call, row, &y)) {
      gradient_row<false>(call.classes, factors, upstream, student, teacher, ce, out);
      return;
    }
    const T at_label = divergence_at(u, state, factors, y) + factors.label;  // the gradient may replace the logits
    gradient_row<true>(call.classes, factors, upstream, student, teacher, ce, out);
    out[y] = at_label * upstream;
  });
}

template <class T>
void forward_any(const DistillationCall<T>& call, int64_t begin, int64_t end) {
  if (call.student_bias != nullptr) return forward<T, Affine::bias>(call, begin, end);
  return forward<T, Affine::uniform>(call, begin, end);
}

template <class T>
void backward_any(const DistillationCall<T>& call, int64_t begin, int64_t end) {
  if (call.student_bias != nullptr) return backward<T, Affine::bias>(call, begin, end);
  return backward<T, Affine::uniform>(call, begin, end);
}

}  // namespace

extern const DistillationTable distillation_table;
const DistillationTable distillation_table = {{forward_any<float>, backward_any<float>},
                                              {forward_any<double>, backward_any<double>}};

}  // namespace ltk::LTK_ISA

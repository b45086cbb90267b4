// The Python module rlhf_fast._C: every launcher with its pointers as integers, those of CUDA in the submodule `cuda`.
// Only rlhf_fast/ops calls it, and has checked shapes, dtypes and strides before.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>

#include "rlhf_fast.h"

namespace py = pybind11;

namespace {

// A data_ptr(), 0 for none: converts to whatever pointer the launcher's argument is.
struct Address {
  uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// A float, or the address of one on the device.
struct Items {
  double number;
  Address address;
};

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool) {
    value.value = PyLong_AsUnsignedLongLong(source.ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

template <>
struct type_caster<Items> {
  PYBIND11_TYPE_CASTER(Items, const_name("float | int"));
  bool load(handle source, bool convert) {
    value = {-1, {0}};
    if (PyFloat_Check(source.ptr())) {
      value.number = PyFloat_AS_DOUBLE(source.ptr());
      return true;
    }
    type_caster<Address> address;
    const bool loaded = address.load(source, convert);
    value.address = address;
    return loaded;
  }
};
}  // namespace pybind11::detail

namespace {

using namespace rlhf_fast;
using Size = int64_t;

Logits logits_of(Address data, int dtype, Size row_stride) { return {data, (DType)dtype, row_stride}; }

// The arguments of every vocabulary-level launcher, in this order, are those of Rows.
Rows rows_of(Size count, Size vocab, Address targets, Address live, Address temperature, Size temperature_stride,
             float softcap, int threads) {
  return {count, vocab, targets, live, temperature, temperature_stride, softcap, threads};
}

#define ROWS                                                                                              \
  Size count, Size vocab, Address targets, Address live, Address temperature, Size temperature_stride, \
      float softcap, int threads
#define ROWS_VALUE rows_of(count, vocab, targets, live, temperature, temperature_stride, softcap, threads)

py::list paths() {
  py::list names;
  for (const CpuLaunchers* const* path = cpu_paths(); *path; path++) names.append((*path)->path);
  return names;
}

void choose_path(const std::string& name) {
  if (!choose_cpu_path(name.c_str())) {
    throw py::value_error("the CPU path " + name + " is not in this build or cannot run on this processor; there is " +
                          std::string(py::str(paths())));
  }
}

py::dict build_info() {
  py::dict info;
  info["cpu_paths"] = paths();
  info["cpu_path"] = cpu().path;
  info["compiler"] = RLHF_FAST_COMPILER;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef RLHF_FAST_CUDA
  info["cuda"] = RLHF_FAST_CUDA_COMPILER;
  info["cuda_architectures"] = RLHF_FAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

// ---- the launchers' arguments, by position --------------------------------------------------------------------------

MaskedLogprobs masked_logprobs_of(ROWS, Address logits, int dtype, Size stride, Address logprobs, Address entropy,
                                  Address statistics) {
  return {ROWS_VALUE, logits_of(logits, dtype, stride), logprobs, entropy, statistics};
}

MaskedLogprobsBackward masked_logprobs_backward_of(ROWS, Address logits, int dtype, Size stride, Size columns,
                                                   Address statistics, Address logprobs, Address entropy,
                                                   Address grad_logprobs, Address grad_entropy, Address grad,
                                                   Size grad_stride) {
  return {ROWS_VALUE, logits_of(logits, dtype, stride), columns, statistics, logprobs, entropy, grad_logprobs,
          grad_entropy, logits_of(grad, dtype, grad_stride)};
}

ExactKl exact_kl_of(ROWS, Address logits, Size stride, Address ref_logits, Size ref_stride, int dtype, Address kl,
                    Address statistics) {
  return {ROWS_VALUE, logits_of(logits, dtype, stride), logits_of(ref_logits, dtype, ref_stride), kl, statistics};
}

ExactKlBackward exact_kl_backward_of(ROWS, Address logits, Size stride, Address ref_logits, Size ref_stride,
                                     int dtype, Address statistics, Address kl, Address grad_kl, Address grad,
                                     Size grad_stride) {
  return {ROWS_VALUE, logits_of(logits, dtype, stride), logits_of(ref_logits, dtype, ref_stride), statistics, kl,
          grad_kl, logits_of(grad, dtype, grad_stride)};
}

LinearLogprobs linear_logprobs_of(ROWS, Address logits, Size stride, Address logprobs, Address entropy, Address grad,
                                  int dtype, Size grad_stride, Address grad_logprobs, Address grad_entropy) {
  return {ROWS_VALUE, logits, stride, logprobs, entropy, logits_of(grad, dtype, grad_stride), grad_logprobs,
          grad_entropy};
}

LinearPolicyLoss linear_policy_loss_of(ROWS, Address logits, Size stride, Address old_logprobs, Address advantages,
                                       Address ref_logprobs, Address share, float clip_low, float clip_high,
                                       float dual_clip, float kl_coef, float entropy_coef, int kl_slope, Address grad,
                                       int dtype, Size grad_stride, Address logprobs, Address entropy) {
  return {ROWS_VALUE, logits, stride, old_logprobs, advantages, ref_logprobs, share, clip_low, clip_high, dual_clip,
          kl_coef, entropy_coef, (Kl)kl_slope, logits_of(grad, dtype, grad_stride), logprobs, entropy};
}

LinearPolicyRef linear_policy_ref_of(ROWS, Address logits, Size stride, Address ref_logits, Size ref_stride,
                                     Address logprobs, Address ref_logprobs, Address entropy, Address kl,
                                     Address grad, int dtype, Size grad_stride, Address grad_logprobs,
                                     Address grad_entropy, Address grad_kl) {
  return {ROWS_VALUE, logits, stride, ref_logits, ref_stride, logprobs, ref_logprobs, entropy, kl, logits_of(grad,
          dtype, grad_stride), grad_logprobs, grad_entropy, grad_kl};
}

TokenKl token_kl_of(Size count, Address logprobs, Address ref_logprobs, Address live, int estimator, Address kl,
                    int threads) {
  return {count, logprobs, ref_logprobs, live, (Kl)estimator, kl, threads};
}

TokenKlBackward token_kl_backward_of(Size count, Address logprobs, Address ref_logprobs, Address live, int slope,
                                     Address grad_kl, Address grad, int threads) {
  return {count, logprobs, ref_logprobs, live, (Kl)slope, grad_kl, grad, threads};
}

Gae gae_of(Size sequences, Size length, Address cu_seqlens, Address rewards, Address values, Address live,
           double gamma, double lam, bool whiten, Address advantages, Address returns, int threads) {
  return {sequences, length, cu_seqlens, rewards, values, live, gamma, lam, whiten, advantages, returns, threads};
}

MaskedMoments masked_moments_of(Size count, Address x, Address live, Address mean, Address moments, int threads) {
  return {count, x, live, mean, moments, threads};
}

MaskedWhiten masked_whiten_of(Size count, Address x, Address live, bool shift_mean, bool unbiased, bool given,
                              Address statistics, Address whitened, int threads) {
  return {count, x, live, shift_mean, unbiased, given, statistics, whitened, threads};
}

MaskedWhitenBackward masked_whiten_backward_of(Size count, Address x, Address live, bool shift_mean, bool unbiased,
                                               Address statistics, Address grad_whitened, Address grad, int threads) {
  return {count, x, live, shift_mean, unbiased, statistics, grad_whitened, grad, threads};
}

PpoLoss ppo_loss_of(Size sequences, Size length, Address logprobs, Address old_logprobs, Address advantages,
                    Address values, Address old_values, Address returns, Address entropy, Address ref_logprobs,
                    Address live, float clip_low, float clip_high, float dual_clip, float value_clip,
                    float value_coef, float entropy_coef, float kl_coef, int kl, int kl_slope, int aggregation,
                    Items num_items, Address loss, Address statistics, Address grad_logprobs, Address grad_values,
                    Address grad_entropy, int threads) {
  return {true, true, sequences, length, logprobs, old_logprobs, advantages, values, old_values, returns, entropy,
          ref_logprobs, live, clip_low, clip_high, dual_clip, value_clip, value_coef, entropy_coef, kl_coef, (Kl)kl,
          (Kl)kl_slope, (Aggregation)aggregation, num_items.number, num_items.address, loss, statistics,
          grad_logprobs, grad_values, grad_entropy, threads, false};
}

PpoLoss clipped_policy_loss_of(Size sequences, Size length, Address logprobs, Address old_logprobs,
                               Address advantages, Address live, float clip_low, float clip_high, float dual_clip,
                               bool sequence_level, int aggregation, Items num_items, Address loss,
                               Address statistics, Address grad, int threads) {
  PpoLoss a{};
  a.policy = true, a.sequences = sequences, a.length = length, a.live = live;
  a.logprobs = logprobs, a.old_logprobs = old_logprobs, a.advantages = advantages;
  a.clip_low = clip_low, a.clip_high = clip_high, a.dual_clip = dual_clip, a.sequence_level = sequence_level;
  a.aggregation = (Aggregation)aggregation, a.num_items = num_items.number, a.items = num_items.address, a.threads =
  threads;
  a.loss = loss, a.statistics = statistics, a.grad_logprobs = grad;
  return a;
}

PpoLoss clipped_value_loss_of(Size sequences, Size length, Address values, Address old_values, Address returns,
                              Address live, float clip, int aggregation, Items num_items, Address loss,
                              Address statistics, Address grad, int threads) {
  PpoLoss a{};
  a.value = true, a.sequences = sequences, a.length = length, a.live = live;
  a.values = values, a.old_values = old_values, a.returns = returns, a.value_clip = clip, a.value_coef = 1;
  a.aggregation = (Aggregation)aggregation, a.num_items = num_items.number, a.items = num_items.address, a.threads =
  threads;
  a.loss = loss, a.statistics = statistics, a.grad_values = grad;
  return a;
}

// ---- a launcher as a function of the module -------------------------------------------------------------------------

using release = py::call_guard<py::gil_scoped_release>;

template <class Arguments, class... Values>
void on_cpu(py::module_& m, const char* name, Arguments (*arguments)(Values...),
            void (*CpuLaunchers::*launcher)(const Arguments&)) {
  m.def(name, [=](Values... values) { (cpu().*launcher)(arguments(values...)); }, release());
}

#ifdef RLHF_FAST_CUDA
template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.rows, std::string()) {
  return std::to_string(a.rows.count) + " rows of " + std::to_string(a.rows.vocab);
}

template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.length, std::string()) {
  return std::to_string(a.sequences) + " sequences of " + std::to_string(a.length);
}

template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.count, std::string()) {
  return std::to_string(a.count) + " tokens";
}

// Returns the bytes of scratch that it needs before it can launch, 0 = it has launched.
template <class Arguments, class... Values>
void on_cuda(py::module_& m, const char* name, Arguments (*arguments)(Values...),
             const char* (*launcher)(const Arguments&, Scratch&, void*)) {
  m.def(
      name,
      [=](Values... values, Address scratch_data, size_t scratch_size, Address stream) -> size_t {
        const Arguments a = arguments(values...);
        Scratch scratch{scratch_data, scratch_size, 0};
        if (const char* error = launcher(a, scratch, stream)) {
          throw std::runtime_error(std::string(name) + ": CUDA: " + error + " (" + size_of(a) + ")");
        }
        return scratch.size < scratch.needed ? scratch.needed : 0;
      },
      release());
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = RLHF_FAST_INTERFACE;
  m.def("build_info", &build_info);
  m.def("paths", &paths);
  m.def("path", [] { return cpu().path; });
  m.def("choose_path", &choose_path);
  m.def("multiplies_bfloat16", &multiplies_bfloat16);
  m.def(
      "bfloat16_product",
      [](Size rows, Size columns, Size inner, Address left, Size left_stride, Address right, Size right_stride,
         Address out, Size out_stride, int threads) {
        if (!bfloat16_product(
                {rows, columns, inner, left, left_stride, right, right_stride, out, out_stride, threads})) {
          throw std::bad_alloc();
        }
      },
      release());

#define RLHF_FAST_ON_CPU(name, Arguments) on_cpu(m, #name, &name##_of, &CpuLaunchers::name);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_ON_CPU)
  on_cpu(m, "clipped_policy_loss", &clipped_policy_loss_of, &CpuLaunchers::ppo_loss);
  on_cpu(m, "clipped_value_loss", &clipped_value_loss_of, &CpuLaunchers::ppo_loss);

#ifdef RLHF_FAST_CUDA
  py::module_ on_device = m.def_submodule("cuda");
  on_device.def("cannot_run", &cuda::cannot_run);
#define RLHF_FAST_ON_CUDA(name, Arguments) on_cuda(on_device, #name, &name##_of, &cuda::name);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_ON_CUDA)
  on_cuda(on_device, "clipped_policy_loss", &clipped_policy_loss_of, &cuda::ppo_loss);
  on_cuda(on_device, "clipped_value_loss", &clipped_value_loss_of, &cuda::ppo_loss);
#endif
}

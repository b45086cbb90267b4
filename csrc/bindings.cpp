// The Python module rlhf_fast._C: every launcher with its pointers as integers. Only rlhf_fast/ops/_native.py calls it,
// and has checked shapes, dtypes and strides before.
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

#ifdef RLHF_FAST_CUDA
void raise_if(const char* error) {
  if (error) throw std::runtime_error(error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
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

  m.def(
      "masked_logprobs",
      [](ROWS, Address logits, int dtype, Size stride, Address logprobs, Address entropy, Address statistics) {
        cpu().masked_logprobs({ROWS_VALUE, logits_of(logits, dtype, stride), logprobs, entropy, statistics});
      },
      release());
  m.def(
      "masked_logprobs_backward",
      [](ROWS, Address logits, int dtype, Size stride, Size columns, Address statistics, Address logprobs,
         Address entropy, Address grad_logprobs, Address grad_entropy, Address grad, Size grad_stride) {
        cpu().masked_logprobs_backward({ROWS_VALUE, logits_of(logits, dtype, stride), columns, statistics, logprobs,
                                        entropy, grad_logprobs, grad_entropy, logits_of(grad, dtype, grad_stride)});
      },
      release());
  m.def(
      "exact_kl",
      [](ROWS, Address logits, Size stride, Address ref_logits, Size ref_stride, int dtype, Address kl,
         Address statistics) {
        cpu().exact_kl({ROWS_VALUE, logits_of(logits, dtype, stride), logits_of(ref_logits, dtype, ref_stride), kl,
                        statistics});
      },
      release());
  m.def(
      "exact_kl_backward",
      [](ROWS, Address logits, Size stride, Address ref_logits, Size ref_stride, int dtype, Address statistics,
         Address kl, Address grad_kl, Address grad, Size grad_stride) {
        cpu().exact_kl_backward({ROWS_VALUE, logits_of(logits, dtype, stride), logits_of(ref_logits, dtype, ref_stride),
                                 statistics, kl, grad_kl, logits_of(grad, dtype, grad_stride)});
      },
      release());
  m.def(
      "linear_logprobs",
      [](ROWS, Address logits, Size stride, Address logprobs, Address entropy, Address grad, int dtype,
         Size grad_stride, Address grad_logprobs, Address grad_entropy) {
        cpu().linear_logprobs({ROWS_VALUE, logits, stride, logprobs, entropy, logits_of(grad, dtype, grad_stride),
                               grad_logprobs, grad_entropy});
      },
      release());
  m.def(
      "linear_policy_loss",
      [](ROWS, Address logits, Size stride, Address old_logprobs, Address advantages, Address ref_logprobs,
         Address share, float clip_low, float clip_high, float dual_clip, float kl_coef, float entropy_coef,
         int kl_slope, Address grad, int dtype, Size grad_stride, Address logprobs, Address entropy) {
        cpu().linear_policy_loss({ROWS_VALUE, logits, stride, old_logprobs, advantages, ref_logprobs, share, clip_low,
                                  clip_high, dual_clip, kl_coef, entropy_coef, (Kl)kl_slope,
                                  logits_of(grad, dtype, grad_stride), logprobs, entropy});
      },
      release());
  m.def(
      "linear_policy_ref",
      [](ROWS, Address logits, Size stride, Address ref_logits, Size ref_stride, Address logprobs,
         Address ref_logprobs, Address entropy, Address kl, Address grad, int dtype, Size grad_stride,
         Address grad_logprobs, Address grad_entropy, Address grad_kl) {
        cpu().linear_policy_ref({ROWS_VALUE, logits, stride, ref_logits, ref_stride, logprobs, ref_logprobs, entropy,
                                 kl, logits_of(grad, dtype, grad_stride), grad_logprobs, grad_entropy, grad_kl});
      },
      release());
  m.def(
      "token_kl",
      [](Size count, Address logprobs, Address ref_logprobs, Address live, int estimator, Address kl, int threads) {
        cpu().token_kl({count, logprobs, ref_logprobs, live, (Kl)estimator, kl, threads});
      },
      release());
  m.def(
      "token_kl_backward",
      [](Size count, Address logprobs, Address ref_logprobs, Address live, int slope, Address grad_kl, Address grad,
         int threads) {
        cpu().token_kl_backward({count, logprobs, ref_logprobs, live, (Kl)slope, grad_kl, grad, threads});
      },
      release());
  m.def(
      "gae",
      [](Size sequences, Size length, Address cu_seqlens, Address rewards, Address values, Address live, double gamma,
         double lam, bool whiten, Address advantages, Address returns, int threads) {
        cpu().gae({sequences, length, cu_seqlens, rewards, values, live, gamma, lam, whiten, advantages, returns,
                   threads, nullptr});
      },
      release());
  m.def(
      "masked_moments",
      [](Size count, Address x, Address live, Address mean, Address moments, int threads) {
        cpu().masked_moments({count, x, live, mean, moments, threads});
      },
      release());
  m.def(
      "masked_whiten",
      [](Size count, Address x, Address live, bool shift_mean, bool unbiased, bool given, Address statistics,
         Address whitened, int threads) {
        cpu().masked_whiten({count, x, live, shift_mean, unbiased, given, statistics, whitened, threads});
      },
      release());
  m.def(
      "masked_whiten_backward",
      [](Size count, Address x, Address live, bool shift_mean, bool unbiased, Address statistics,
         Address grad_whitened, Address grad, int threads) {
        cpu().masked_whiten_backward({count, x, live, shift_mean, unbiased, statistics, grad_whitened, grad, threads});
      },
      release());
  m.def(
      "ppo_loss",
      [](Size sequences, Size length, Address logprobs, Address old_logprobs, Address advantages, Address values,
         Address old_values, Address returns, Address entropy, Address ref_logprobs, Address live, float clip_low,
         float clip_high, float dual_clip, float value_clip, float value_coef, float entropy_coef, float kl_coef,
         int kl, int kl_slope, int aggregation, double num_items, Address loss, Address statistics,
         Address grad_logprobs, Address grad_values, Address grad_entropy, int threads) {
        cpu().ppo_loss({true, true, sequences, length, logprobs, old_logprobs, advantages, values, old_values, returns,
                        entropy, ref_logprobs, live, clip_low, clip_high, dual_clip, value_clip, value_coef,
                        entropy_coef, kl_coef, (Kl)kl, (Kl)kl_slope, (Aggregation)aggregation, num_items, loss,
                        statistics, grad_logprobs, grad_values, grad_entropy, threads, false});
      },
      release());
  m.def(
      "clipped_policy_loss",
      [](Size sequences, Size length, Address logprobs, Address old_logprobs, Address advantages, Address live,
         float clip_low, float clip_high, float dual_clip, bool sequence_level, int aggregation, double num_items,
         Address loss, Address statistics, Address grad, int threads) {
        PpoLoss a{};
        a.policy = true, a.sequences = sequences, a.length = length, a.live = live;
        a.logprobs = logprobs, a.old_logprobs = old_logprobs, a.advantages = advantages;
        a.clip_low = clip_low, a.clip_high = clip_high, a.dual_clip = dual_clip, a.sequence_level = sequence_level;
        a.aggregation = (Aggregation)aggregation, a.num_items = num_items, a.threads = threads;
        a.loss = loss, a.statistics = statistics, a.grad_logprobs = grad;
        cpu().ppo_loss(a);
      },
      release());
  m.def(
      "clipped_value_loss",
      [](Size sequences, Size length, Address values, Address old_values, Address returns, Address live, float clip,
         int aggregation, double num_items, Address loss, Address statistics, Address grad, int threads) {
        PpoLoss a{};
        a.value = true, a.sequences = sequences, a.length = length, a.live = live;
        a.values = values, a.old_values = old_values, a.returns = returns, a.value_clip = clip, a.value_coef = 1;
        a.aggregation = (Aggregation)aggregation, a.num_items = num_items, a.threads = threads;
        a.loss = loss, a.statistics = statistics, a.grad_values = grad;
        cpu().ppo_loss(a);
      },
      release());

#ifdef RLHF_FAST_CUDA
  m.def(
      "cuda_gae",
      [](Size sequences, Size length, Address cu_seqlens, Address rewards, Address values, Address live, double gamma,
         double lam, bool whiten, Address advantages, Address returns, Address stream) {
        raise_if(cuda::gae({sequences, length, cu_seqlens, rewards, values, live, gamma, lam, whiten, advantages,
                            returns, 0, stream}));
      },
      release());
#endif
}

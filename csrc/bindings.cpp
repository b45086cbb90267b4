// The Python module rlhf_fast._C: one function per launcher, with those of CUDA in the submodule `cuda`. Only
// rlhf_fast/ops calls it, after checking shapes, dtypes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "rlhf_fast.h"

namespace py = pybind11;

namespace {

using namespace rlhf_fast;

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
  info["float32_products"] = multiplies_float32() ? "rlhf-fast" : "torch";
  info["bfloat16_products"] = prefers_bfloat16() ? "rlhf-fast" : "torch";
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

// ---- read(value, to): reads a record of kernels/records.py into its structure ----------------------------------------
//
// A record is a tuple of tensors, numbers, None and further records. Each function returns false if it has set a Python
// error. They use Python's C API instead of pybind11's slower casts, because an op calls them a dozen times.

bool no_error() { return !PyErr_Occurred(); }

bool read(PyObject* value, bool& to) {
  const int truth = PyObject_IsTrue(value);
  to = truth == 1;
  return truth >= 0;
}

bool read(PyObject* value, int64_t& to) {
  to = PyLong_AsLongLong(value);
  return to != -1 || no_error();
}

bool read(PyObject* value, double& to) {
  to = PyFloat_AsDouble(value);
  return to != -1 || no_error();
}

bool read(PyObject* value, float& to) {
  double number;
  const bool ok = read(value, number);
  to = (float)number;
  return ok;
}

// A tensor becomes its address, None a null pointer.
template <class T>
bool read(PyObject* value, T*& to) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  to = nullptr;
  if (value == Py_None) return true;
  PyObject* address = PyObject_CallMethodNoArgs(value, name);
  if (!address) return false;
  to = (T*)PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return to || no_error();
}

template <class T>
bool read(PyObject* value, T& to) {
  if constexpr (std::is_enum_v<T>) {
    const long code = PyLong_AsLong(value);
    to = (T)code;
    if (code >= 0 && code <= last(to)) return true;
    if (no_error()) PyErr_Format(PyExc_ValueError, "expected a code from 0 to %d; got %ld", (int)last(to), code);
    return false;
  } else {
    auto members = fields(to);
    constexpr Py_ssize_t count = std::tuple_size_v<decltype(members)>;
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != count) {
      PyErr_Format(PyExc_TypeError, "expected a record of %zd fields; got %R", count, value);
      return false;
    }
    Py_ssize_t i = 0;
    return std::apply([&](auto&... member) { return (read(PyTuple_GET_ITEM(value, i++), member) && ...); }, members);
  }
}

template <class Arguments>
Arguments arguments_of(const py::handle& record) {
  Arguments arguments;
  if (!read(record.ptr(), arguments)) throw py::error_already_set();
  return arguments;
}

// ---- binding a launcher as a function of the module ------------------------------------------------------------------

using Release = py::gil_scoped_release;
using Address = uintptr_t;  // a data_ptr(), or a stream

// The fields of a BFloat16Term.
using Term = std::tuple<Address, int64_t, Address, int64_t, int64_t, Address, int64_t, int64_t, int64_t, float>;

BFloat16Term term_of(const Term& term) {
  const auto& [left, left_stride, right, right_stride, right_column_stride, packed, inner, start, stop, scale] = term;
  return {(const uint16_t*)left,
          left_stride,
          (const uint16_t*)right,
          right_stride,
          right_column_stride,
          (const uint32_t*)packed,
          inner,
          start,
          stop,
          scale};
}

using Place = std::tuple<Address, int64_t, int64_t>;  // the fields of HeadRows

HeadRows heads_of(const Place& place) {
  const auto& [data, row_stride, head_stride] = place;
  return {(void*)data, row_stride, head_stride};
}

template <class Arguments>
void on_cpu(py::module_& m, const char* name, void (*CpuLaunchers::*launcher)(const Arguments&, int)) {
  m.def(name, [=](const py::handle& record, int threads) {
    const Arguments arguments = arguments_of<Arguments>(record);
    Release release;
    (cpu().*launcher)(arguments, threads);
  });
}

#ifdef RLHF_FAST_CUDA
// The size of a launch, for error messages. The overload is selected by the fields of the structure.
template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.rows, std::string()) {
  return std::to_string(a.rows.length) + " rows of " + std::to_string(a.rows.vocab);
}

template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.length, std::string()) {
  return std::to_string(a.sequences) + " sequences of " + std::to_string(a.length);
}

template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.tokens, std::string()) {
  return std::to_string(a.tokens) + " tokens";
}

template <class Arguments>
auto size_of(const Arguments& a) -> decltype(a.elements, std::string()) {
  return std::to_string(a.elements) + " elements";
}

// The Python function returns 0 if it has launched, else the bytes of scratch that the launch needs.
template <class Arguments>
void on_cuda(py::module_& m, const char* name, const char* (*launcher)(const Arguments&, Scratch&, void*)) {
  m.def(name, [=](const py::handle& record, Address data, size_t size, Address ticket, Address stream) -> size_t {
    const Arguments arguments = arguments_of<Arguments>(record);
    Scratch scratch{(void*)data, size, 0, (unsigned*)ticket};
    // The GIL is kept: a launch takes 5 us, and getting the GIL back from another thread up to its interval of 5 ms.
    if (const char* error = launcher(arguments, scratch, (void*)stream)) {
      throw std::runtime_error(std::string(name) + ": CUDA: " + error + " (" + size_of(arguments) + ")");
    }
    return scratch.size < scratch.needed ? scratch.needed : 0;
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("interface") = RLHF_FAST_INTERFACE;
  m.attr("records") = RLHF_FAST_RECORDS;
  m.def("build_info", &build_info);
  m.def("paths", &paths);
  m.def("path", [] { return cpu().path; });
  m.def("choose_path", &choose_path);
  m.def("multiplies_bfloat16", &multiplies_bfloat16);
  m.def("multiplies_float32", &multiplies_float32);
  m.def("prefers_bfloat16", &prefers_bfloat16);
  m.def("bfloat16_product", [](int64_t rows, int64_t columns, const std::vector<Term>& terms, Address bias, Address out,
                               int64_t out_stride, bool wide, int threads) {
    std::vector<BFloat16Term> read(terms.size());
    for (size_t i = 0; i < terms.size(); i++) read[i] = term_of(terms[i]);
    Release release;
    if (!bfloat16_product({rows, columns, read.data(), (int)read.size(), (const uint16_t*)bias, (void*)out, out_stride,
                           wide, threads})) {
      throw std::bad_alloc();
    }
  });
  m.def("pack_bfloat16", [](int64_t columns, const Term& term, Address packed, int threads) {
    Release release;
    pack_bfloat16(term_of(term), columns, (uint32_t*)packed, threads);
  });
  m.def(
      "float32_product",
      [](int64_t rows, int64_t columns, int64_t inner, Address left, int64_t left_stride, int64_t left_inner_stride,
         Address right, int64_t right_stride, int64_t right_column_stride, Address out, int64_t out_stride, float scale,
         bool add, int threads) {
        cpu().float32_product(
            {rows, columns, inner, (const float*)left, left_stride, left_inner_stride, (const float*)right,
             right_stride, right_column_stride, (float*)out, out_stride, scale, add},
            threads);
      },
      py::call_guard<Release>());

  m.def(
      "short_attention",
      [](int dtype, const std::array<int64_t, 6>& sizes, Address starts, Address mask, float scale,
         const std::array<Place, 4>& rows, Address log_sums, const std::array<Place, 4>& grads, Address scratch,
         int64_t scratch_size, int threads) {
        cpu().short_attention({(DType)dtype,
                               sizes[0],
                               sizes[1],
                               sizes[2],
                               sizes[3],
                               sizes[4],
                               sizes[5],
                               (const int64_t*)starts,
                               (const uint8_t*)mask,
                               scale,
                               heads_of(rows[0]),
                               heads_of(rows[1]),
                               heads_of(rows[2]),
                               heads_of(rows[3]),
                               (float*)log_sums,
                               heads_of(grads[0]),
                               heads_of(grads[1]),
                               heads_of(grads[2]),
                               heads_of(grads[3]),
                               (float*)scratch,
                               scratch_size},
                              threads);
      },
      py::call_guard<Release>());

#define RLHF_FAST_ON_CPU(name, Arguments) on_cpu(m, #name, &CpuLaunchers::name);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_ON_CPU)

#ifdef RLHF_FAST_CUDA
  py::module_ on_device = m.def_submodule("cuda");
  on_device.def("cannot_run", &cuda::cannot_run);
#define RLHF_FAST_ON_CUDA(name, Arguments) on_cuda(on_device, #name, &cuda::name);
  RLHF_FAST_LAUNCHERS(RLHF_FAST_ON_CUDA)
#endif
}

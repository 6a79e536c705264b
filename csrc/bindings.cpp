// The only file that knows Python. Pointers arrive as integers (Tensor.data_ptr()), sizes in elements
// unless named bytes; std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "active_set.h"
#include "philox.h"
#include "uem_score.h"
#ifdef ADADIFF_CUDA
#include "compact_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The lock stays held: the plan takes less time than giving it back.
std::pair<std::int32_t, std::int32_t> leave(std::uintptr_t mask, std::uintptr_t lane, std::uintptr_t row,
                                            std::uintptr_t exit_layer, std::uintptr_t swaps,
                                            std::int32_t n, std::int32_t lanes, std::int32_t layer) {
  using std::int32_t;
  const auto result =
      adadiff::leave(pointer<const std::uint8_t>(mask), pointer<int32_t>(lane), pointer<int32_t>(row),
                     pointer<int32_t>(exit_layer), pointer<int32_t>(swaps), n, lanes, layer);
  return {result.after, result.swaps};
}

void swap_rows(std::uintptr_t data, std::int64_t row_bytes, std::int64_t stride_bytes, std::int64_t rows,
               std::uintptr_t pairs, std::int64_t k) {
  py::gil_scoped_release released;
  adadiff::swap_rows(pointer<void>(data), row_bytes, stride_bytes, rows,
                     pointer<const std::int32_t>(pairs), k);
}

void philox(std::uintptr_t seeds, std::uintptr_t steps, std::int64_t n, std::int64_t stream, std::int64_t blocks,
            std::uintptr_t words) {
  py::gil_scoped_release released;
  adadiff::philox(pointer<const std::int64_t>(seeds), pointer<const std::int64_t>(steps), n, stream, blocks,
                  pointer<std::int64_t>(words));
}

template <typename Element>
void uem_score(std::uintptr_t y, std::int64_t n, std::int64_t tokens, std::int64_t channels,
               std::int64_t num_prefix_tokens, std::uintptr_t weight, std::uintptr_t offset, std::int64_t offset_stride, std::int32_t B,
               std::uintptr_t lanes, std::uintptr_t u) {
  py::gil_scoped_release released;
  adadiff::uem_score(pointer<const Element>(y), n, tokens, channels, num_prefix_tokens, pointer<const float>(weight),
                     pointer<const float>(offset), offset_stride, B, pointer<const std::int32_t>(lanes),
                     pointer<float>(u));
}

template <typename Element>
void def_uem_score(py::module_& m, const char* name) {
  m.def(name, &uem_score<Element>, py::arg("y"), py::arg("n"), py::arg("tokens"), py::arg("channels"),
        py::arg("num_prefix_tokens"), py::arg("weight"), py::arg("offset"), py::arg("offset_stride"), py::arg("B"),
        py::arg("lanes"), py::arg("u"));
}

#ifdef ADADIFF_CUDA
void compact(std::uintptr_t lane, std::uintptr_t row, std::uintptr_t exit_layer, std::uintptr_t state,
             std::uintptr_t u, std::uintptr_t threshold, std::uintptr_t mask, std::uintptr_t partner,
             std::uintptr_t moves, std::uintptr_t snapshot, std::int32_t bound, std::int32_t lanes,
             std::int32_t layer, std::uintptr_t word, int device, std::uintptr_t stream) {
  using std::int32_t;
  const adadiff::compact::Arguments arguments{
      pointer<int32_t>(lane),            pointer<int32_t>(row),
      pointer<int32_t>(exit_layer),      pointer<adadiff::compact::State>(state),
      pointer<const float>(u),           pointer<const float>(threshold),
      pointer<const std::uint8_t>(mask), pointer<const int32_t>(partner),
      pointer<int32_t>(moves),           pointer<int32_t>(snapshot),
      pointer<volatile std::uint64_t>(word), bound, lanes, layer};
  adadiff::cuda::compact(arguments, device, stream);
}

void start(std::uintptr_t lane, std::uintptr_t row, std::uintptr_t exit_layer, std::uintptr_t state,
           std::int32_t lanes, std::uintptr_t word, int device, std::uintptr_t stream) {
  using std::int32_t;
  adadiff::cuda::start(pointer<int32_t>(lane), pointer<int32_t>(row), pointer<int32_t>(exit_layer),
                       pointer<adadiff::compact::State>(state), lanes, pointer<volatile std::uint64_t>(word), device,
                       stream);
}

void def_cuda(py::module_& m) {
  using adadiff::cuda::MappedWord;
  m.attr("max_lanes") = adadiff::compact::kMaxLanes;
  m.def("compact", &compact, py::arg("lane"), py::arg("row"), py::arg("exit_layer"), py::arg("state"), py::arg("u"),
        py::arg("threshold"), py::arg("mask"), py::arg("partner"), py::arg("moves"), py::arg("snapshot"),
        py::arg("bound"), py::arg("lanes"), py::arg("layer"), py::arg("word"), py::arg("device"), py::arg("stream"));
  m.def("start", &start, py::arg("lane"), py::arg("row"), py::arg("exit_layer"), py::arg("state"), py::arg("lanes"),
        py::arg("word"), py::arg("device"), py::arg("stream"));
  py::class_<MappedWord>(m, "MappedWord")
      .def(py::init<int>(), py::arg("device"))
      .def("read", &MappedWord::read)
      .def("poll", &MappedWord::poll, py::arg("tick"), py::arg("layer"), py::arg("seconds"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("device_address", &MappedWord::device_address);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compaction, score and noise; see csrc/active_set.h, uem_score.h and philox.h.";
  m.def("leave", &leave, py::arg("mask"), py::arg("lane"), py::arg("row"), py::arg("exit_layer"),
        py::arg("swaps"), py::arg("n"), py::arg("lanes"), py::arg("layer"));
  m.def("swap_rows", &swap_rows, py::arg("data"), py::arg("row_bytes"), py::arg("stride_bytes"),
        py::arg("rows"), py::arg("pairs"), py::arg("k"));
  m.def("philox", &philox, py::arg("seeds"), py::arg("steps"), py::arg("n"), py::arg("stream"), py::arg("blocks"),
        py::arg("words"));
  def_uem_score<float>(m, "uem_score_float32");
  def_uem_score<adadiff::bfloat16>(m, "uem_score_bfloat16");
#ifdef ADADIFF_CUDA
  m.attr("cuda_built") = true;
  def_cuda(m);
#else
  m.attr("cuda_built") = false;
#endif
}

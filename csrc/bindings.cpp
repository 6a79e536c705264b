// The only file that includes Python headers. Pointers arrive as integers (Tensor.data_ptr()), sizes in elements
// unless named bytes; std::invalid_argument becomes ValueError.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "active_set.h"
#include "compaction.h"
#include "philox.h"
#include "uem_score.h"
#ifdef ADADIFF_CUDA
#include "compaction_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Keeps the GIL: the call is shorter than releasing it.
std::int32_t exit_rows(std::uintptr_t u, std::uintptr_t threshold, std::uintptr_t mask, std::uintptr_t partner,
                       std::uintptr_t row_to_lane, std::uintptr_t lane_to_row, std::uintptr_t exit_layer,
                       std::uintptr_t moves, std::int32_t n, std::int32_t num_lanes, std::int32_t layer) {
  using std::int32_t;
  const adadiff::ExitTest test{pointer<const float>(u), pointer<const float>(threshold),
                               pointer<const std::uint8_t>(mask), pointer<const int32_t>(partner)};
  return adadiff::exit_rows(test, pointer<int32_t>(row_to_lane),
                            pointer<int32_t>(lane_to_row), pointer<int32_t>(exit_layer), pointer<int32_t>(moves), n,
                            num_lanes, layer);
}

void settle_rows(std::uintptr_t moves, std::int64_t k, std::uintptr_t rows, std::int64_t num_rows,
                 std::int64_t rows_stride, std::uintptr_t saved, std::int64_t num_lanes, std::int64_t saved_stride,
                 std::int64_t row_bytes) {
  py::gil_scoped_release released;
  adadiff::settle_rows(pointer<const std::int32_t>(moves), k, pointer<void>(rows), num_rows, rows_stride,
                       pointer<void>(saved), num_lanes, saved_stride, row_bytes);
}

void philox(std::uintptr_t seeds, std::uintptr_t steps, std::int64_t n, std::int64_t stream, std::int64_t blocks,
            std::uintptr_t words) {
  py::gil_scoped_release released;
  adadiff::philox(pointer<const std::int64_t>(seeds), pointer<const std::int64_t>(steps), n, stream, blocks,
                  pointer<std::int64_t>(words));
}

// Returns whether any row may exit by its limit, float[num_lanes]; true without limits (a null pointer).
bool uem_score(std::uintptr_t y, bool is_bfloat16, std::int64_t n, std::int64_t tokens, std::int64_t channels,
               std::int64_t num_prefix_tokens, std::uintptr_t weight, std::uintptr_t offset,
               std::int64_t offset_stride, std::int32_t num_lanes, std::uintptr_t row_to_lane, std::uintptr_t u,
               std::uintptr_t limit) {
  const auto score = [&](auto* rows) {
    adadiff::uem_score(rows, n, tokens, channels, num_prefix_tokens, pointer<const float>(weight),
                       pointer<const float>(offset), offset_stride, num_lanes,
                       pointer<const std::int32_t>(row_to_lane), pointer<float>(u));
  };
  py::gil_scoped_release released;
  if (is_bfloat16) {
    score(pointer<const adadiff::bfloat16>(y));
  } else {
    score(pointer<const float>(y));
  }
  return limit == 0 || adadiff::any_below(pointer<const float>(u), n, pointer<const float>(limit),
                                          pointer<const std::int32_t>(row_to_lane));
}

#ifdef ADADIFF_CUDA
void compact(std::uintptr_t row_to_lane, std::uintptr_t lane_to_row, std::uintptr_t exit_layer, std::uintptr_t state,
             std::uintptr_t u, std::uintptr_t threshold, std::uintptr_t mask, std::uintptr_t partner,
             std::uintptr_t moves, std::uintptr_t snapshot, std::int32_t bound, std::int32_t num_lanes,
             std::int32_t layer, std::uintptr_t word, int device, std::uintptr_t stream) {
  using std::int32_t;
  const adadiff::compaction::Arguments arguments{
      pointer<int32_t>(row_to_lane),     pointer<int32_t>(lane_to_row),
      pointer<int32_t>(exit_layer),      pointer<adadiff::compaction::State>(state),
      pointer<const float>(u),           pointer<const float>(threshold),
      pointer<const std::uint8_t>(mask), pointer<const int32_t>(partner),
      pointer<int32_t>(moves),           pointer<int32_t>(snapshot),
      pointer<volatile std::uint64_t>(word), bound, num_lanes, layer};
  adadiff::cuda::compact(arguments, device, stream);
}

void start(std::uintptr_t row_to_lane, std::uintptr_t lane_to_row, std::uintptr_t exit_layer, std::uintptr_t state,
           std::int32_t num_lanes, std::int32_t count, std::uintptr_t word, int device, std::uintptr_t stream) {
  using std::int32_t;
  adadiff::cuda::start(pointer<int32_t>(row_to_lane), pointer<int32_t>(lane_to_row), pointer<int32_t>(exit_layer),
                       pointer<adadiff::compaction::State>(state), num_lanes, count,
                       pointer<volatile std::uint64_t>(word), device, stream);
}

void def_cuda(py::module_& m) {
  using adadiff::cuda::MappedWord;
  m.def("compact", &compact, py::arg("row_to_lane"), py::arg("lane_to_row"), py::arg("exit_layer"), py::arg("state"),
        py::arg("u"), py::arg("threshold"), py::arg("mask"), py::arg("partner"), py::arg("moves"), py::arg("snapshot"),
        py::arg("bound"), py::arg("num_lanes"), py::arg("layer"), py::arg("word"), py::arg("device"),
        py::arg("stream"));
  m.def("start", &start, py::arg("row_to_lane"), py::arg("lane_to_row"), py::arg("exit_layer"), py::arg("state"),
        py::arg("num_lanes"), py::arg("count"), py::arg("word"), py::arg("device"), py::arg("stream"));
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
  m.doc() = "Compaction, scores and noise on the CPU; see csrc/active_set.h, uem_score.h and philox.h.";
  m.attr("max_lanes") = adadiff::compaction::kMaxLanes;
  m.def("exit_rows", &exit_rows, py::arg("u"), py::arg("threshold"), py::arg("mask"), py::arg("partner"),
        py::arg("row_to_lane"), py::arg("lane_to_row"), py::arg("exit_layer"), py::arg("moves"), py::arg("n"),
        py::arg("num_lanes"), py::arg("layer"));
  m.def("settle_rows", &settle_rows, py::arg("moves"), py::arg("k"), py::arg("rows"), py::arg("num_rows"),
        py::arg("rows_stride"), py::arg("saved"), py::arg("num_lanes"), py::arg("saved_stride"), py::arg("row_bytes"));
  m.def("philox", &philox, py::arg("seeds"), py::arg("steps"), py::arg("n"), py::arg("stream"), py::arg("blocks"),
        py::arg("words"));
  m.def("uem_score", &uem_score, py::arg("y"), py::arg("is_bfloat16"), py::arg("n"), py::arg("tokens"),
        py::arg("channels"), py::arg("num_prefix_tokens"), py::arg("weight"), py::arg("offset"),
        py::arg("offset_stride"), py::arg("num_lanes"), py::arg("row_to_lane"), py::arg("u"),
        py::arg("limit") = 0);
#ifdef ADADIFF_CUDA
  m.attr("cuda_built") = true;
  def_cuda(m);
#else
  m.attr("cuda_built") = false;
#endif
}

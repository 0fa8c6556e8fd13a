// fastphi._graph: what of the GPU engine is no operator on tensors. Python gives addresses and the
// stream (fastphi/engine/gpu/match.py).
#include <pybind11/pybind11.h>

#include "while_graph.h"

namespace py = pybind11;

PYBIND11_MODULE(_graph, m) {
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<fastphi::WhileGraph>(m, "WhileGraph")
      .def(py::init<uintptr_t, uintptr_t>(), py::arg("body"), py::arg("remaining"), Free())
      .def("launch", &fastphi::WhileGraph::launch, py::arg("stream"), Free());
  m.def("driver_version", &fastphi::driver_version);
}

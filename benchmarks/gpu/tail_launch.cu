// Graphs that launch themselves again from the device, and whether CUDA would accept a captured graph for that.
#include <cuda_runtime.h>

namespace {

__global__ void relaunch(int* left) {
  if (--*left > 0) cudaGraphLaunch(cudaGetCurrentGraphExec(), cudaStreamGraphTailLaunch);
}

cudaError_t instantiate(cudaGraph_t graph, cudaGraphExec_t* made) {
  return cudaGraphInstantiateWithFlags(made, graph, cudaGraphInstantiateFlagDeviceLaunch);
}

}  // namespace

extern "C" {

const char* error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }

// 0 if CUDA can instantiate `graph` for launches by the device, else the error.
int accepts(void* graph) {
  cudaGraphExec_t made = nullptr;
  const cudaError_t error = instantiate(static_cast<cudaGraph_t>(graph), &made);
  if (made) cudaGraphExecDestroy(made);
  cudaGetLastError();
  return error;
}

// A graph of one kernel that decrements *left and launches the graph again until it is 0.
int make_chain(int* left, void** made) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  if (cudaError_t e = cudaStreamCreate(&stream)) return e;
  if (cudaError_t e = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal)) return e;
  relaunch<<<1, 1, 0, stream>>>(left);
  if (cudaError_t e = cudaStreamEndCapture(stream, &graph)) return e;
  if (cudaError_t e = instantiate(graph, &exec)) return e;
  if (cudaError_t e = cudaGraphUpload(exec, stream)) return e;
  if (cudaError_t e = cudaStreamSynchronize(stream)) return e;
  *made = exec;
  return 0;
}

int launch(void* exec, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(exec), static_cast<cudaStream_t>(stream));
}

}  // extern "C"

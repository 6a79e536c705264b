// A chain of segments as one CUDA graph, for what an IF node costs where its condition is true and where it is not.
// Each segment sets its condition from a flag in device memory; what depends on it is one small kernel.
#include <cuda_runtime.h>

namespace {

__global__ void decide(cudaGraphConditionalHandle handle, const int* flag) {
  cudaGraphSetConditional(handle, *flag != 0);
}

__global__ void read(const int* flag, int* sink) { *sink = *flag; }

__global__ void work(int* done) { *done += 1; }

cudaError_t add_kernel(cudaGraph_t graph, cudaGraphNode_t* last, void* kernel, void** arguments) {
  cudaKernelNodeParams parameters = {};
  parameters.func = kernel;
  parameters.gridDim = parameters.blockDim = dim3(1);
  parameters.kernelParams = arguments;
  cudaGraphNode_t before = *last;
  return cudaGraphAddKernelNode(last, graph, before ? &before : nullptr, before ? 1 : 0, &parameters);
}

// Returns the body of an IF node behind `last`, and that node as the new `last`.
cudaError_t add_if(cudaGraph_t graph, cudaGraphNode_t* last, cudaGraphConditionalHandle handle, cudaGraph_t* body) {
  cudaGraphNodeParams parameters = {};
  parameters.type = cudaGraphNodeTypeConditional;
  parameters.conditional.handle = handle;
  parameters.conditional.type = cudaGraphCondTypeIf;
  parameters.conditional.size = 1;
  cudaGraphNode_t before = *last;
#if CUDART_VERSION >= 13000
  cudaError_t error = cudaGraphAddNode(last, graph, &before, nullptr, 1, &parameters);
#else
  cudaError_t error = cudaGraphAddNode(last, graph, &before, 1, &parameters);
#endif
  if (error == cudaSuccess) *body = parameters.conditional.phGraph_out[0];
  return error;
}

cudaError_t build(cudaGraph_t graph, int segments, int shape, int* memory) {
  int *flag = memory, *done = memory + 1, *sink = memory + 2;
  void *to_work[] = {&done}, *to_read[] = {&flag, &sink};
  cudaGraph_t level = graph;
  cudaGraphNode_t last = nullptr;
  for (int i = 0; i < segments; ++i) {
    cudaError_t error;
    if (shape == 0) {
      if ((error = add_kernel(level, &last, (void*)read, to_read)) != cudaSuccess) return error;
      if ((error = add_kernel(level, &last, (void*)work, to_work)) != cudaSuccess) return error;
      continue;
    }
    cudaGraphConditionalHandle handle;
    error = cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault);
    if (error != cudaSuccess) return error;
    void* to_decide[] = {&handle, &flag};
    if ((error = add_kernel(level, &last, (void*)decide, to_decide)) != cudaSuccess) return error;
    cudaGraph_t body;
    if ((error = add_if(level, &last, handle, &body)) != cudaSuccess) return error;
    cudaGraphNode_t inside = nullptr;
    if ((error = add_kernel(body, &inside, (void*)work, to_work)) != cudaSuccess) return error;
    if (shape == 2) level = body, last = inside;  // the next segment lies in this one's body
  }
  return cudaSuccess;
}

}  // namespace

// shape: 0 without IF nodes, 1 one after another, 2 each in the body of the one before. memory: int32 [3] on the
// device: the flag, work done, a sink. Returns a cudaError_t; *executable is what `replay_graph` takes.
extern "C" int make_graph(int segments, int shape, int* memory, void** executable) {
  cudaGraph_t graph;
  cudaError_t error = cudaGraphCreate(&graph, 0);
  if (error == cudaSuccess) error = build(graph, segments, shape, memory);
  if (error == cudaSuccess) error = cudaGraphInstantiate((cudaGraphExec_t*)executable, graph, 0);
  return error;
}

extern "C" int replay_graph(void* executable, void* stream) {
  return cudaGraphLaunch((cudaGraphExec_t)executable, (cudaStream_t)stream);
}

extern "C" const char* error_name(int error) { return cudaGetErrorString((cudaError_t)error); }

// Streams, events, captures and graphs of libcudart.so.13.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

using namespace pretend;

namespace {

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }
Graph* graph_of(cudaGraph_t handle) { return reinterpret_cast<Graph*>(handle); }

// What may not be asked of a stream that captures.
int not_capturing(Stream* stream, const char* call) {
  if (!stream) return INVALID_HANDLE;
  if (stream->capture == Capture::NONE) return OK;
  stream->capture = Capture::BROKEN;
  complain(std::string(call) + " of a stream that captures");
  return NOT_PERMITTED_IN_CAPTURE;
}

}  // namespace

// --- streams
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  State& all = state();
  Guard guard(all.lock);
  auto* stream = new Stream;
  stream->id = ++all.last_stream, stream->device = current_device;
  stream->flags = flags, stream->priority = priority;
  all.streams.insert(stream);
  ++all.counts["stream"];
  *out = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* out) {
  return cudaStreamCreateWithPriority(out, 0, 0);
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Guard guard(state().lock);
  state().streams.erase(stream_of(handle));
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Stream* stream = stream_of(handle);
  *priority = stream ? stream->priority : 0;
  return done(stream ? OK : INVALID_HANDLE);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  count("synchronize");
  Stream* stream = stream_of(handle);
  const int error = not_capturing(stream, "cudaStreamSynchronize");
  if (!error) merge(host_clock(), stream->known);
  return done(error);
}
API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Stream* stream = stream_of(handle);
  const int error = not_capturing(stream, "cudaStreamQuery");
  if (!error) merge(host_clock(), stream->known);
  return done(error);
}
API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t call, void* data,
                                      unsigned) {
  const int error = not_capturing(stream_of(handle), "cudaStreamAddCallback");
  if (!error) call(handle, cudaSuccess, data);
  return done(error);
}

// --- events
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  delete event_of(handle);
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t in, unsigned) {
  Guard guard(state().lock);
  Event* event = event_of(handle);
  Stream* stream = stream_of(in);
  if (!stream) return done(INVALID_HANDLE);
  event->when = now();
  event->captured_in = stream->capture == Capture::ACTIVE ? stream : nullptr;
  event->capture_id = stream->capture_id;
  event->known = stream->known;
  merge(event->known, host_clock());
  count("event record");
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t in) {
  return cudaEventRecordWithFlags(handle, in, 0);
}
API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event* event = event_of(handle);
  if (event->captured_in) return done(EVENT_OF_CAPTURE);
  Guard guard(state().lock);
  merge(host_clock(), event->known);
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  count("synchronize");
  return cudaEventQuery(handle);
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  const double passed = 1e3 * (event_of(to)->when - event_of(from)->when);
  *ms = static_cast<float>(passed < 1e-3 ? 1e-3 : passed);
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned) {
  Guard guard(state().lock);
  Stream* stream = stream_of(handle);
  if (!stream) return done(INVALID_HANDLE);
  const Event* event = event_of(of);
  count("stream wait");
  const Stream* from = event->captured_in;
  if (from && from->capture == Capture::ACTIVE && stream->capture == Capture::NONE) {
    stream->capture = Capture::ACTIVE, stream->origin = false;
    stream->graph = from->graph, stream->capture_id = event->capture_id, stream->mode = from->mode;
    stream->thread = from->thread;
  }
  merge(stream->known, event->known);
  return cudaSuccess;
}

// --- captures
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const int before = capture_mode;
  capture_mode = static_cast<int>(*mode);
  *mode = static_cast<cudaStreamCaptureMode>(before);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Guard guard(state().lock);
  Stream* stream = stream_of(handle);
  if (!stream) return done(INVALID_HANDLE);
  if (stream == &state().devices[stream->device].legacy) return done(NOT_PERMITTED_IN_CAPTURE);
  if (stream->capture != Capture::NONE) return done(INVALID_VALUE);
  stream->capture = Capture::ACTIVE, stream->origin = true;
  stream->graph = new Graph, stream->mode = static_cast<int>(mode);
  stream->capture_id = ++state().captures, stream->thread = std::this_thread::get_id();
  count("capture");
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
  Guard guard(state().lock);
  Stream* stream = stream_of(handle);
  if (!stream || stream->capture == Capture::NONE || !stream->origin) return done(INVALID_VALUE);
  bool broken = stream->capture == Capture::BROKEN;
  Graph* graph = stream->graph;
  for (Stream* other : state().streams)
    if (other->capture_id == stream->capture_id && other != stream) {
      broken |= other->capture == Capture::BROKEN;
      other->capture = Capture::NONE, other->graph = nullptr;
    }
  stream->capture = Capture::NONE, stream->graph = nullptr;
  *out = broken ? nullptr : reinterpret_cast<cudaGraph_t>(graph);
  return done(broken ? CAPTURE_INVALIDATED : OK);
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Stream* stream = stream_of(handle);
  if (!stream) return done(INVALID_HANDLE);
  *status = stream->capture == Capture::NONE     ? cudaStreamCaptureStatusNone
            : stream->capture == Capture::ACTIVE ? cudaStreamCaptureStatusActive
                                                 : cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** after,
                                         const cudaGraphEdgeData** edges, size_t* n) {
  const Stream* stream = stream_of(handle);
  if (id) *id = stream->capture_id;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(stream->graph);
  if (after) *after = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaStreamIsCapturing(handle, status);
}

// --- graphs
API cudaError_t cudaGraphCreate(cudaGraph_t* out, unsigned) {
  *out = reinterpret_cast<cudaGraph_t>(new Graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) {  // kept: an executable graph here is its graph
  count("graph destroy");
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                              unsigned long long) {
  if (!graph) return done(INVALID_VALUE);
  count("graph instantiate");
  count("graph nodes", nodes_of(graph_of(graph)));
  *out = reinterpret_cast<cudaGraphExec_t>(new Exec{graph_of(graph)});
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                     unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete reinterpret_cast<Exec*>(exec);
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  Node node;
  node.kind = "graph launch", node.child = reinterpret_cast<Exec*>(exec)->graph;
  count("replayed nodes", nodes_of(node.child));
  return done(put(stream_of(stream), std::move(node)));
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n) {
  const auto& all = graph_of(graph)->nodes;
  for (size_t i = 0; nodes && i < *n && i < all.size(); ++i)
    nodes[i] = reinterpret_cast<cudaGraphNode_t>(all[i].get());
  *n = all.size();
  return cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*,
                                             size_t* n) {
  *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

// A WHILE node's body goes on while the flag is set that its last kernel (csrc/graph) is told of.
API cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t,
                                                 unsigned, unsigned) {
  *handle = 1;
  return cudaSuccess;
}
API cudaError_t cudaGraphAddNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t*,
                                 const cudaGraphEdgeData*, size_t, cudaGraphNodeParams* p) {
  if (p->type != cudaGraphNodeTypeConditional) return done(NOT_SUPPORTED);
  auto* body = new Graph;
  graph_of(graph)->bodies.push_back(body);
  p->conditional.phGraph_out = new cudaGraph_t(reinterpret_cast<cudaGraph_t>(body));
  auto node = std::make_unique<Node>();
  node->kind = "while";
  node->run = [body](Stream& in) {
    long turns = 0;
    const int* more = body->nodes.empty() ? nullptr : body->nodes.back()->goes_on;
    do {
      replay(body, in);
      if (++turns > 1000000) {
        complain("a WHILE node does not end");
        std::abort();
      }
    } while (more && *more);
  };
  *out = reinterpret_cast<cudaGraphNode_t>(node.get());
  graph_of(graph)->nodes.push_back(std::move(node));
  return cudaSuccess;
}
API cudaError_t cudaGraphAddChildGraphNode(cudaGraphNode_t* out, cudaGraph_t graph,
                                           const cudaGraphNode_t*, size_t, cudaGraph_t child) {
  auto node = std::make_unique<Node>();
  node->kind = "child", node->child = graph_of(child);
  *out = reinterpret_cast<cudaGraphNode_t>(node.get());
  graph_of(graph)->nodes.push_back(std::move(node));
  return cudaSuccess;
}
API cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* out, cudaGraph_t graph,
                                       const cudaGraphNode_t*, size_t,
                                       const cudaKernelNodeParams* p) {
  auto node = std::make_unique<Node>();
  node->kind = "kernel";
  std::memcpy(&node->goes_on, p->kernelParams[1], sizeof(void*));
  *out = reinterpret_cast<cudaGraphNode_t>(node.get());
  graph_of(graph)->nodes.push_back(std::move(node));
  return cudaSuccess;
}

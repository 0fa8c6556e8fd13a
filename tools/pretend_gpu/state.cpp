#include "state.h"

#include <cstdio>
#include <cstdlib>
#include <ctime>

namespace pretend {

thread_local int current_device = 0;
thread_local int capture_mode = 0;

int device_count() {
  static const int n = [] {
    const char* said = std::getenv("PRETEND_GPUS");
    return said ? std::atoi(said) : 2;
  }();
  return n;
}

const char* device_name() {
  static const char* said = std::getenv("PRETEND_NAME");
  return said ? said : "pretended H100";
}

State& state() {
  static State* all = [] {
    auto* made = new State;
    made->devices.resize(device_count());
    for (int i = 0; i < device_count(); ++i)
      for (Stream* s : {&made->devices[i].legacy, &made->devices[i].per_thread})
        s->id = ++made->last_stream, s->device = i;
    return made;
  }();
  return *all;
}

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void count(const std::string& what, long n) {
  Guard guard(state().lock);
  state().counts[what] += n;
}

void complain(const std::string& what) {
  Guard guard(state().lock);
  if (state().complaints.size() < 100) state().complaints.push_back(what);
  std::fprintf(stderr, "pretended GPU: %s\n", what.c_str());
}

Stream* stream_of(const void* handle) {
  State& all = state();
  const auto special = reinterpret_cast<uintptr_t>(handle);
  if (special <= 1) return &all.devices[current_device].legacy;
  if (special == 2) return &all.devices[current_device].per_thread;
  Guard guard(all.lock);
  auto* stream = static_cast<Stream*>(const_cast<void*>(handle));
  return all.streams.count(stream) ? stream : nullptr;
}

int check_launch(const Node& n) {
  const unsigned *g = n.grid, *b = n.block;
  const bool good = g[0] && g[1] && g[2] && g[0] <= 2147483647u && g[1] <= 65535 && g[2] <= 65535 &&
                    b[0] && b[1] && b[2] && b[0] * b[1] * b[2] <= 1024 && n.shared <= 232448;
  if (good) return OK;
  complain("launch of " + n.name + ": grid " + std::to_string(g[0]) + " " + std::to_string(g[1]) +
           " " + std::to_string(g[2]) + ", " + std::to_string(b[0] * b[1] * b[2]) +
           " threads, shared memory " + std::to_string(n.shared));
  return INVALID_CONFIGURATION;
}

// Work is done in the order in which it was asked for, by one thread at a time. That lock is not
// the state's: work calls Python, and whoever holds Python's own lock asks for the state's.
int put(Stream* stream, Node node) {
  static std::recursive_mutex order;
  State& all = state();
  if (!stream) {
    complain(node.kind + " " + node.name + " in a stream that is not there");
    return INVALID_HANDLE;
  }
  if (stream->device != current_device && (node.kind == "kernel" || node.kind == "emulated")) {
    complain(node.name + " in a stream of device " + std::to_string(stream->device) +
             " while device " + std::to_string(current_device) + " is current");
    return INVALID_HANDLE;
  }
  const Guard in_turn(order);
  {
    Guard guard(all.lock);
    if (stream->capture == Capture::BROKEN) return CAPTURE_INVALIDATED;
    if (stream->capture == Capture::ACTIVE) {
      ++all.counts["captured " + node.kind];
      stream->graph->nodes.push_back(std::make_unique<Node>(std::move(node)));
      return OK;
    }
    ++all.counts[node.kind];
    if (node.kind == "kernel") ++all.counts["kernel " + node.name];
    step(*stream);
  }
  if (node.run) node.run(*stream);
  if (node.child) replay(node.child, *stream);
  return OK;
}

int forbidden_in_captures(const char* call, bool in_any) {
  State& all = state();
  Guard guard(all.lock);
  if (capture_mode == 2 && !in_any) return OK;
  for (Stream* s : all.streams)
    if (s->capture == Capture::ACTIVE &&
        (s->mode == 0 || (s->mode == 1 && s->thread == std::this_thread::get_id()) ||
         (in_any && s->device == current_device))) {
      s->capture = Capture::BROKEN;
      complain(std::string(call) + " breaks the capture of stream " + std::to_string(s->id));
      return NOT_PERMITTED_IN_CAPTURE;
    }
  return OK;
}

long nodes_of(const Graph* graph) {
  long n = 0;
  for (const auto& node : graph->nodes) n += node->child ? nodes_of(node->child) : 1;
  for (const Graph* body : graph->bodies) n += nodes_of(body);
  return n;
}

void replay(const Graph* graph, Stream& stream) {
  for (const auto& node : graph->nodes) {
    if (node->run) node->run(stream);
    if (node->child) replay(node->child, stream);
  }
}

const Block* device_block(const void* at) {
  State& all = state();
  Guard guard(all.lock);
  auto it = all.memory.upper_bound(reinterpret_cast<uintptr_t>(at));
  if (it == all.memory.begin()) return nullptr;
  --it;
  return reinterpret_cast<uintptr_t>(at) < it->first + it->second.size ? &it->second : nullptr;
}

bool is_pinned(const void* at) {
  State& all = state();
  Guard guard(all.lock);
  auto it = all.pinned.upper_bound(reinterpret_cast<uintptr_t>(at));
  if (it == all.pinned.begin()) return false;
  --it;
  return reinterpret_cast<uintptr_t>(at) < it->first + it->second;
}

bool within(const void* at, size_t bytes) {
  const Block* block = device_block(at);
  if (!block || !bytes) return true;
  return device_block(static_cast<const char*>(at) + bytes - 1) == block;
}

}  // namespace pretend

using namespace pretend;

static void (*python)(long, void*) = nullptr;

// What the tests ask: {"kernel": 3, ...} so far, and from zero again; complaints, a line each.
API const char* pretend_counts(int reset) {
  static std::string out;
  State& all = state();
  Guard guard(all.lock);
  out = "{";
  for (const auto& [what, n] : all.counts) {
    out += "\"";
    for (const char c : what)
      out += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
    out += "\": " + std::to_string(n) + ", ";
  }
  out += "\"bytes\": " + std::to_string(all.used) + ", \"peak\": " + std::to_string(all.peak) + "}";
  if (reset) all.counts.clear();
  return out.c_str();
}
API const char* pretend_complaints() {
  static std::string out;
  Guard guard(state().lock);
  out.clear();
  for (const std::string& line : state().complaints) out += line + "\n";
  state().complaints.clear();
  return out.c_str();
}
// What Python does in a kernel's place (emulate.py).
API void pretend_python(void (*call)(long, void*)) { python = call; }
// 0: it was done; else the error. In a capture it becomes a node, done at each replay.
API int pretend_emulate(void* stream, long id, const char* name) {
  Node node;
  node.kind = "emulated", node.name = name;
  node.run = [id](Stream& in) { python(id, &in); };
  return put(stream_of(stream), std::move(node));
}
API int pretend_captures(void* stream) { return stream_of(stream)->capture != Capture::NONE; }
// `stream`: as `pretend_python`'s call was given it
API void pretend_access(void* stream, void* at, size_t bytes, int write, const char* what) {
  access(*static_cast<Stream*>(stream), at, bytes, write != 0, what);
}

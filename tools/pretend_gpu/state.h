// What the two pretended libraries share: devices, streams, captures, graphs, memory, and the
// record of what was asked of them. Work is done at once, in the caller's thread; who waits for
// whom is kept beside it (order.cpp), as a real device would have done it later.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace pretend {

using Guard = std::lock_guard<std::recursive_mutex>;

// Errors of CUDA's that are met here; the runtime's and the driver's numbers are the same.
enum Error {
  OK = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  INVALID_CONFIGURATION = 9,
  INVALID_DEVICE = 101,
  INVALID_HANDLE = 400,
  NOT_PERMITTED_IN_CAPTURE = 900,
  CAPTURE_INVALIDATED = 901,
  EVENT_OF_CAPTURE = 902,
  NOT_SUPPORTED = 801,
};

// How far in each stream's work something is known to be done: {number of stream: tick}.
using Clock = std::map<int, long>;
void merge(Clock& into, const Clock& other);

struct Graph;
struct Stream;

struct Node {
  std::string kind, name;  // kernel, copy ..., memset, emulated, while, child
  unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, shared = 0;
  Graph* child = nullptr;
  const int* goes_on = nullptr;      // of the last kernel in a WHILE node's body
  std::function<void(Stream&)> run;  // what it does to memory, in the stream where it is launched
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  std::vector<Graph*> bodies;  // of WHILE nodes
};

struct Exec {
  Graph* graph;
};

enum class Capture { NONE, ACTIVE, BROKEN };

struct Stream {
  int id = 0, device = 0, priority = 0;
  unsigned flags = 0;  // 1: does not wait for the legacy stream
  Capture capture = Capture::NONE;
  int mode = 0;            // of the capture: 0 global, 1 of this thread, 2 relaxed
  std::thread::id thread;  // that began it
  unsigned long long capture_id = 0;
  Graph* graph = nullptr;
  bool origin = false;  // where the capture began
  Clock known;
};

struct Event {
  Stream* captured_in = nullptr;
  unsigned long long capture_id = 0;
  double when = 0;
  Clock known;
};

struct Block {
  size_t size;
  int device;
};

struct Device {
  Stream legacy, per_thread;
};

struct State {
  std::recursive_mutex lock;
  std::map<uintptr_t, Block> memory;  // live blocks of the devices' memory, by their start
  std::map<uintptr_t, size_t> pinned;
  std::map<const void*, std::string> kernels;  // host stub -> mangled name
  std::vector<Device> devices;
  std::set<Stream*> streams;
  std::map<std::string, long> counts;
  std::vector<std::string> complaints;  // what a real device would have let happen, or not
  size_t used = 0, peak = 0;
  int last_error = 0, last_stream = 0;
  unsigned long long captures = 0;
};

State& state();
int device_count();
const char* device_name();  // PRETEND_NAME, where a program is to take it for a real one
extern thread_local int current_device;
extern thread_local int capture_mode;  // of this thread: 0 global, 1 of this thread, 2 relaxed

// nullptr where there is none of that handle
Stream* stream_of(const void* handle);
void count(const std::string& what, long n = 1);
void complain(const std::string& what);
double now();

// A call's record: a node where the stream captures, and else done at once.
int put(Stream* stream, Node node);
// A call that a capture forbids (cudaMalloc, cudaDeviceSynchronize, ...): the error, where one
// does.
// in_any: in a capture of whatever mode and thread, as of what waits for the whole device.
int forbidden_in_captures(const char* call, bool in_any = false);
int check_launch(const Node& node);
long nodes_of(const Graph* graph);
void replay(const Graph* graph, Stream& stream);

const Block* device_block(const void* at);  // that holds the address, or nullptr
bool is_pinned(const void* at);
bool within(const void* at, size_t bytes);  // no device block is left by it

// order.cpp: a happens-before of streams, and who touched which 512 bytes last
Clock& host_clock();
void step(Stream& stream);  // a piece of work of its own, after all that the host knows
void access(Stream& stream, const void* at, size_t bytes, bool write, const std::string& what);
void forget(const void* at, size_t bytes);  // memory that goes back to the device
void wait_for_all();                        // the host, for every stream

}  // namespace pretend

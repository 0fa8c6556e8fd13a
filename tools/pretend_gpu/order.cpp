// Who may touch memory when: each stream, event and host thread knows how far every stream's work
// is done (a vector clock), and each 512 bytes of device memory, the grain of torch's allocator,
// know who touched them last. Two touches, one of them a write, with nothing between them that
// makes one wait for the other, are a race: so is memory that was freed and given to another stream
// too soon.
#include "state.h"

#include <cstdio>
#include <unordered_map>

namespace pretend {

namespace {

constexpr uintptr_t GRAIN = 512;

struct Touch {
  long tick = 0;
  std::string what;
};

struct Grain {
  int writer = -1;
  Touch write;
  std::map<int, Touch> reads;  // by stream
};

std::unordered_map<uintptr_t, Grain>& grains() {
  static auto* all = new std::unordered_map<uintptr_t, Grain>;
  return *all;
}

bool waited(const Stream& stream, int other, long tick) {
  if (other == stream.id) return true;
  const auto known = stream.known.find(other);
  return known != stream.known.end() && known->second >= tick;
}

}  // namespace

void merge(Clock& into, const Clock& other) {
  for (const auto& [stream, tick] : other) {
    long& mine = into[stream];
    if (tick > mine) mine = tick;
  }
}

Clock& host_clock() {
  static Clock clock;  // of all threads: what one has waited for, another may have been told
  return clock;
}

void step(Stream& stream) {
  merge(stream.known, host_clock());
  Device& device = state().devices[stream.device];
  if (&stream == &device.legacy) {
    for (Stream* other : state().streams)
      if (!(other->flags & 1) && other->device == stream.device) merge(stream.known, other->known);
  } else if (!(stream.flags & 1)) {
    merge(stream.known, device.legacy.known);
  }
  ++stream.known[stream.id];
}

void access(Stream& stream, const void* at, size_t bytes, bool write, const std::string& what) {
  Guard guard(state().lock);
  if (!bytes || !device_block(at)) return;
  const long tick = stream.known[stream.id];
  const auto from = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t g = from / GRAIN; g <= (from + bytes - 1) / GRAIN; ++g) {
    Grain& grain = grains()[g];
    const char* did = nullptr;
    int by = -1;
    const Touch* before = nullptr;
    if (grain.writer >= 0 && !waited(stream, grain.writer, grain.write.tick))
      did = "wrote", by = grain.writer, before = &grain.write;
    if (write)
      for (const auto& [reader, touch] : grain.reads)
        if (!waited(stream, reader, touch.tick)) did = "read", by = reader, before = &touch;
    if (did) {
      char where[64];
      std::snprintf(where, sizeof where, "%p", reinterpret_cast<void*>(g * GRAIN));
      complain("race: " + what + (write ? " writes" : " reads") + " memory at " + where +
               " in stream " + std::to_string(stream.id) + ", which " + before->what + " " + did +
               " in stream " + std::to_string(by) + ", and neither waits for the other");
      grain = {};
    }
    if (write)
      grain = {stream.id, {tick, what}, {}};
    else
      grain.reads[stream.id] = {tick, what};
  }
}

void forget(const void* at, size_t bytes) {
  const auto from = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t g = from / GRAIN; bytes && g <= (from + bytes - 1) / GRAIN; ++g) grains().erase(g);
}

void wait_for_all() {
  Guard guard(state().lock);
  for (Stream* stream : state().streams) merge(host_clock(), stream->known);
  for (Device& device : state().devices)
    merge(host_clock(), device.legacy.known), merge(host_clock(), device.per_thread.known);
}

}  // namespace pretend

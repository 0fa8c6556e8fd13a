// SIGINT during long calls. One handler for all threads that are in such a call, taken away with
// the last of them.
#include "interrupt.h"

#if defined(__unix__)
#include <signal.h>

#include <mutex>
#endif

namespace fastphi {

#if defined(__unix__)

namespace {

std::mutex lock;
int users = 0;
struct sigaction replaced;  // by ours; the signal goes on to it
volatile sig_atomic_t pressed = 0;

void handle(int number, siginfo_t* info, void* context) {
  pressed = pressed + 1;
  if (replaced.sa_flags & SA_SIGINFO)
    replaced.sa_sigaction(number, info, context);
  else
    replaced.sa_handler(number);
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == handle;
}

}  // namespace

Interrupt::Interrupt() {
  const std::lock_guard<std::mutex> guard(lock);
  before_ = pressed;
  if (users++) return;
  sigaction(SIGINT, nullptr, &replaced);
  if (replaced.sa_handler == SIG_DFL || replaced.sa_handler == SIG_IGN) return;
  struct sigaction ours = replaced;
  ours.sa_flags |= SA_SIGINFO;
  ours.sa_sigaction = handle;
  sigaction(SIGINT, &ours, nullptr);
}

Interrupt::~Interrupt() {
  const std::lock_guard<std::mutex> guard(lock);
  if (--users) return;
  struct sigaction now;
  sigaction(SIGINT, nullptr, &now);
  if (is_ours(now)) sigaction(SIGINT, &replaced, nullptr);
}

bool Interrupt::seen() const { return pressed != before_; }

#else

Interrupt::Interrupt() : before_(0) {}
Interrupt::~Interrupt() {}
bool Interrupt::seen() const { return false; }

#endif

}  // namespace fastphi

#pragma once

namespace fastphi {

// Whether Ctrl-C was pressed in an object's life. Python sees a signal only once a call into C++
// returns: a long loop looks here, and returns. The handler that is there, Python's, is called too;
// where the signal is ignored or ends the process, that is left so.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  bool seen() const;

 private:
  int before_;  // times pressed
};

}  // namespace fastphi

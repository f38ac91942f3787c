// io_uring through its system calls, for the reads of one I/O thread. One submission a segment; a short read is
// submitted again for the rest, and the end of the member file gives zeros.
#pragma once

#include <linux/io_uring.h>

#include <deque>

#include "engine.h"

namespace nbd {

class Uring {
 public:
  Uring() = default;
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  /// True where this process may set up a ring.
  static bool available();

  /// `eventFd` becomes readable with completions. False where the kernel refuses.
  bool open(const Layout& layout, MemberCounters* counters, int eventFd);
  bool isOpen() const { return fd_ >= 0; }

  void submit(ReadJob* job);
  /// Tells the kernel about what submit() queued: once a turn.
  void kick();
  /// Collects completions; finished jobs are appended to `done`.
  void reap(std::vector<ReadJob*>& done);
  uint32_t inFlight() const { return inFlight_; }

 private:
  struct Item {
    ReadJob* job;
    uint32_t segment;
    bool blocking;  // by a worker of the kernel, which waits
  };

  void close();
  void pump();
  void prepare(const Item& item);

  int fd_ = -1;
  const Layout* layout_ = nullptr;
  MemberCounters* counters_ = nullptr;
  void* ringMemory_ = nullptr;
  size_t ringBytes_ = 0;
  io_uring_sqe* entries_ = nullptr;
  size_t entriesBytes_ = 0;
  unsigned *sqHead_ = nullptr, *sqTail_ = nullptr, *sqArray_ = nullptr, *cqHead_ = nullptr, *cqTail_ = nullptr;
  unsigned sqMask_ = 0, cqMask_ = 0, sqSize_ = 0;
  io_uring_cqe* completions_ = nullptr;
  unsigned unsubmitted_ = 0;
  uint32_t inFlight_ = 0;
  std::vector<Item> items_;       // by user_data
  std::vector<uint32_t> freeItems_;
  std::deque<Item> backlog_;      // waits for a free entry
};

}  // namespace nbd

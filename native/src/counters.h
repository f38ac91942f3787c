// Counters with one writing thread each: a relaxed load and store, no locked instruction on the hot path. Readers add
// up the copies of all threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace nbd {

class Counter {
 public:
  void add(uint64_t amount) {
    value_.store(value_.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
  }
  uint64_t get() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

struct MemberCounters {
  Counter reads, readBytes, writes, writeBytes, syncs;
};

struct alignas(64) ExportCounters {
  Counter reads, readBytes, writes, writeBytes, flushes, trims, zeroes, errors, upcalls, inPlaceWrites, laneWrites, laneBytes;
};

}  // namespace nbd

// Blocks of an export that are being written on both sides of a mirror. Two changes of the same bytes must not be on their
// way at once: the sides could do them in different orders. A write on a lane takes its blocks or is given to the policy; the
// policy holds the blocks of what it does itself, and where a lane has one of them, waits for a barrier before it begins.
//
// Places are shared by blocks that lie kPlaces apart, which costs a decision now and then and nothing else. Writes are also counted
// by stretches of the export, until both sides have them or the policy has answered them, for those who ask about a lot of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "assert.h"

namespace nbd {

class Claims {
 public:
  static constexpr uint64_t kBlock = 4096;
  static constexpr uint64_t kPlaces = 16384;
  static constexpr uint64_t kStretch = 256 * 1024;
  static constexpr uint64_t kStretchPlaces = 16384;

  /// From an I/O thread: false, and nothing is taken, where somebody has one of the blocks.
  bool take(uint64_t offset, uint64_t length) {
    const Span span(offset, length);
    for (uint64_t i = 0; i < span.count; i++) {
      uint32_t expected = 0;
      if (place(span.first + i).compare_exchange_strong(expected, kTaken, std::memory_order_acq_rel)) continue;
      while (i-- > 0) place(span.first + i).fetch_and(~kTaken, std::memory_order_acq_rel);
      return false;
    }
    count(offset, length, 1);
    return true;
  }
  /// The blocks; `leave` follows, now or later.
  void give(uint64_t offset, uint64_t length) {
    const Span span(offset, length);
    for (uint64_t i = 0; i < span.count; i++) {
      const uint32_t before = place(span.first + i).fetch_and(~kTaken, std::memory_order_acq_rel);
      NBD_ASSERT((before & kTaken) != 0);
    }
  }

  /// From the JavaScript thread: nobody takes them until `release`. True where some were taken before.
  bool hold(uint64_t offset, uint64_t length) {
    const Span span(offset, length);
    uint32_t before = 0;
    for (uint64_t i = 0; i < span.count; i++) before |= place(span.first + i).fetch_add(1, std::memory_order_acq_rel);
    return (before & kTaken) != 0;
  }
  void release(uint64_t offset, uint64_t length) {
    const Span span(offset, length);
    for (uint64_t i = 0; i < span.count; i++) {
      const uint32_t before = place(span.first + i).fetch_sub(1, std::memory_order_acq_rel);
      NBD_ASSERT((before & ~kTaken) > 0);
    }
  }
  void leave(uint64_t offset, uint64_t length) { count(offset, length, -1); }

  /// Whether a write in the range has not left, of those that began before a barrier. Perhaps also where it lies elsewhere.
  bool busy(uint64_t offset, uint64_t length) const {
    const uint64_t first = offset / kStretch;
    const uint64_t count = std::min((offset + length - 1) / kStretch - first + 1, kStretchPlaces);
    for (uint64_t i = 0; i < count; i++) {
      if (stretches_[(first + i) % kStretchPlaces].load(std::memory_order_acquire) != 0) return true;
    }
    return false;
  }

 private:
  static constexpr uint32_t kTaken = 1u << 31;

  struct Span {
    Span(uint64_t offset, uint64_t length) : first(offset / kBlock) {
      count = std::min((offset + length - 1) / kBlock - first + 1, kPlaces);
    }
    uint64_t first;
    uint64_t count;
  };

  std::atomic<uint32_t>& place(uint64_t block) { return places_[block % kPlaces]; }

  void count(uint64_t offset, uint64_t length, int32_t change) {
    const uint64_t last = (offset + length - 1) / kStretch;
    for (uint64_t stretch = offset / kStretch; stretch <= last; stretch++) {
      const int32_t before = stretches_[stretch % kStretchPlaces].fetch_add(change, std::memory_order_acq_rel);
      NBD_ASSERT(before + change >= 0);
    }
  }

  std::atomic<uint32_t> places_[kPlaces] = {};
  std::atomic<int32_t> stretches_[kStretchPlaces] = {};
};

}  // namespace nbd

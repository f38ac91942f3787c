// The tables of one export, as the volume policy writes them and this side reads them: stripe -> slot, the init bitmap
// (one bit a format unit) and the direct bitmap (one bit a stripe), all 32-bit words in memory owned by JavaScript.
//
// Order (rule 1 of the interface): the policy writes a slot before it sets the init bit, so the bit is loaded here with
// acquire before the slot. The direct bit of a stripe implies its slot and its init bit.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "claims.h"
#include "counters.h"

namespace nbd {

class Lane;

inline uint32_t loadWord(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

struct Tables {
  uint64_t size = 0;  // bytes
  const uint32_t* slots = nullptr;
  const uint32_t* init = nullptr;
  const uint32_t* direct = nullptr;
};

constexpr uint32_t kSlotNone = 0;              // reads as formatting data
constexpr uint32_t kSlotBroken = 0xffffffffu;  // formatted, yet no slot: the tables contradict themselves

struct Export {
  uint32_t id = 0;
  uint64_t stripeSize = 0;
  uint32_t formatUnit = 1;  // stripes
  uint8_t fill = 0;
  std::atomic<const Tables*> tables{nullptr};
  std::unique_ptr<uint8_t[]> fillBlock;  // kFillBlockSize bytes of `fill`; null where fill is 0
  std::unique_ptr<ExportCounters[]> counters;  // one an I/O thread
  std::atomic<uint64_t> fullStripeWrites{0};

  // Mirrors, see lane.h. Both flags change while no direct bit is set and nothing is under way.
  std::atomic<bool> forwards{false};   // writes go in place with a lane, or not at all
  std::atomic<bool> lanesOnly{false};  // writes go in place for a peer's lane, and for nobody else
  std::unique_ptr<Claims> claims;      // there before `forwards`
  std::vector<Lane*> lanes;            // one an I/O thread, which alone touches it; null where there is none

  // The rest belongs to the JavaScript thread.
  uint32_t sessions = 0;
  uint32_t adopted = 0;     // upcalls without a connection that are not completed
  uint32_t rangeReads = 0;  // that have not been reported
  uint32_t openLanes = 0;
  bool closing = false;
  double closeTag = 0;

  const Tables& current() const { return *tables.load(std::memory_order_acquire); }

  uint32_t slotForRead(const Tables& at, uint64_t stripe) const {
    const uint64_t unit = formatUnit == 1 ? stripe : stripe / formatUnit;
    if (((loadWord(at.init + (unit >> 5)) >> (unit & 31)) & 1) == 0) return kSlotNone;
    const uint32_t slot = loadWord(at.slots + stripe);
    if (slot != kSlotNone) return slot;
    // A trim may have come between the two loads; then the bit is 0 by now.
    if (((loadWord(at.init + (unit >> 5)) >> (unit & 31)) & 1) == 0) return kSlotNone;
    return kSlotBroken;
  }

  /// The slot where a write may go in place, or kSlotNone where a decision is needed.
  uint32_t slotForWrite(const Tables& at, uint64_t stripe) const {
    if (((loadWord(at.direct + (stripe >> 5)) >> (stripe & 31)) & 1) == 0) return kSlotNone;
    return loadWord(at.slots + stripe);
  }
};

constexpr uint64_t kFillBlockSize = 64 * 1024;

}  // namespace nbd

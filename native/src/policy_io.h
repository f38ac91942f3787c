// Member access that the policy asks for: full-stripe writes, parts in place, slots, ranges, sync, punch. Each runs on a pool
// and reports with one Done event.
#pragma once

#include "shared.h"

namespace nbd {

struct OverlayRef {
  uint64_t offset;  // export bytes
  uint64_t length;
  Payload* payload;  // retained by the task; null for zeros
};

struct FormatOrder {
  std::shared_ptr<Export> target;
  double tag = 0;
  uint64_t stripe = 0;
  std::vector<uint32_t> slots;
  std::vector<uint32_t> bases;  // empty, or one a slot; 0 = formatting data
  std::vector<OverlayRef> overlays;
};

void submitFormat(Shared& shared, FormatOrder order);
/// Writes the part of an upcall that lies in `stripe` to `slot`.
/// Appends it to tasks for `Shared::writing`: those of one turn are queued together.
void makePart(Shared& shared, double tag, std::shared_ptr<Export> target, uint64_t stripe, uint32_t slot, OverlayRef overlay,
              TaskList& tasks);
void submitSlot(Shared& shared, double tag, bool write, uint32_t slot, uint64_t offset, uint8_t* data, uint64_t length);
/// Fills [data, data + length) with what the export holds from `offset` on. The tables are looked at now; the Done event
/// carries the export and `epoch`.
void submitRange(Shared& shared, double tag, Export& target, uint64_t epoch, uint64_t offset, uint8_t* data,
                 uint64_t length);
void submitSync(Shared& shared, double tag);
void submitPunch(Shared& shared, double tag, uint32_t slot, uint32_t count);

}  // namespace nbd

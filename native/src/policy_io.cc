#include "policy_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "assert.h"
#include "compose.h"

namespace nbd {

namespace {

/// Never written, so all its pages are the kernel's one page of zeros: the cheapest source there is.
alignas(4096) uint8_t zeroBlock[kFillBlockSize];

/// Base slots are read into scratch memory of about this size at a time.
constexpr uint64_t kBaseScratch = 1 << 20;

void report(Shared& shared, double tag, const IoError& error, bool write, bool value = true) {
  Event event{};
  event.kind = EventKind::Done;
  event.tag = tag;
  event.value = value ? 1 : 0;
  event.error = error;
  event.write = write;
  shared.events.push(event);
}

class PolicyTask : public Task {
 public:
  PolicyTask(Shared& shared, double tag) : shared_(shared), tag_(tag) {}
  void cancel() override {
    report(shared_, tag_, {ECANCELED, 0, 0}, false);
    delete this;
  }

 protected:
  Shared& shared_;
  const double tag_;
};

/// `length` bytes that repeat a block.
void mapRepeated(const Layout& layout, uint32_t slot, uint64_t stripeOffset, const uint8_t* block, uint64_t length,
                 Segments& segments) {
  while (length > 0) {
    const uint64_t part = std::min(length, kFillBlockSize);
    mapRange(layout, slot, stripeOffset, const_cast<uint8_t*>(block), part, segments);
    stripeOffset += part;
    length -= part;
  }
}

class FormatTask final : public PolicyTask {
 public:
  FormatTask(Shared& shared, FormatOrder order) : PolicyTask(shared, order.tag), order_(std::move(order)) {}
  ~FormatTask() override {
    for (OverlayRef& overlay : order_.overlays) {
      if (overlay.payload != nullptr) overlay.payload->release();
    }
  }

  void run(WorkerContext& context) override {
    std::vector<Overlay> overlays;
    overlays.reserve(order_.overlays.size());
    for (const OverlayRef& overlay : order_.overlays) {
      overlays.push_back(
          {overlay.offset, overlay.length, overlay.payload == nullptr ? nullptr : overlay.payload->data()});
    }
    const uint64_t stripeSize = order_.target->stripeSize;
    const size_t count = order_.slots.size();
    const size_t group = order_.bases.empty() ? count : std::max<uint64_t>(1, kBaseScratch / stripeSize);
    IoError error;
    bool writing = true;
    for (size_t first = 0; first < count && error.error == 0; first += group) {
      writing = writeGroup(context, overlays, first, std::min(count, first + group), &error);
    }
    if (error.error == 0) order_.target->fullStripeWrites.fetch_add(count, std::memory_order_relaxed);
    report(shared_, tag_, error, writing);
    delete this;
  }

 private:
  /// Composes and writes stripes [first, end) of the unit. False where it failed before the write.
  bool writeGroup(WorkerContext& context, const std::vector<Overlay>& overlays, size_t first, size_t end,
                  IoError* error) {
    const Layout& layout = shared_.layout;
    const uint64_t stripeSize = order_.target->stripeSize;
    const uint64_t groupStart = (order_.stripe + first) * stripeSize;
    std::vector<Piece> pieces;
    composePieces(groupStart, groupStart + (end - first) * stripeSize, overlays, pieces);
    if (!order_.bases.empty() && !readBases(context, pieces, first, end, error)) return false;

    Segments& segments = context.segments;
    segments.clear();
    const uint8_t* fill = order_.target->fillBlock == nullptr ? zeroBlock : order_.target->fillBlock.get();
    for (const Piece& piece : pieces) {
      for (uint64_t at = piece.start; at < piece.end;) {
        const uint64_t stripe = at / stripeSize;
        const uint64_t within = at - stripe * stripeSize;
        const uint64_t part = std::min(piece.end - at, stripeSize - within);
        const size_t index = stripe - order_.stripe;
        const uint32_t slot = order_.slots[index];
        if (piece.kind == PieceKind::Data) {
          mapRange(layout, slot, within, const_cast<uint8_t*>(piece.data) + (at - piece.start), part, segments);
        } else if (piece.kind == PieceKind::Zero) {
          mapRepeated(layout, slot, within, zeroBlock, part, segments);
        } else if (hasBase(index)) {
          mapRange(layout, slot, within, context.scratch.data() + (at - groupStart), part, segments);
        } else {
          mapRepeated(layout, slot, within, fill, part, segments);
        }
        at += part;
      }
    }
    context.io.write(segments, error);
    return true;
  }

  bool hasBase(size_t index) const { return !order_.bases.empty() && order_.bases[index] != 0; }

  /// What no overlay covers and a base slot holds.
  bool readBases(WorkerContext& context, const std::vector<Piece>& pieces, size_t first, size_t end, IoError* error) {
    const uint64_t stripeSize = order_.target->stripeSize;
    const uint64_t groupStart = (order_.stripe + first) * stripeSize;
    if (context.scratch.size() < (end - first) * stripeSize) context.scratch.resize((end - first) * stripeSize);
    Segments& segments = context.segments;
    segments.clear();
    for (const Piece& piece : pieces) {
      if (piece.kind != PieceKind::Base) continue;
      for (uint64_t at = piece.start; at < piece.end;) {
        const uint64_t stripe = at / stripeSize;
        const uint64_t within = at - stripe * stripeSize;
        const uint64_t part = std::min(piece.end - at, stripeSize - within);
        const size_t index = stripe - order_.stripe;
        if (hasBase(index)) {
          mapRange(shared_.layout, order_.bases[index], within, context.scratch.data() + (at - groupStart), part,
                   segments);
        }
        at += part;
      }
    }
    return context.io.readWaiting(segments, error);
  }

  FormatOrder order_;
};

class PartTask final : public PolicyTask {
 public:
  PartTask(Shared& shared, double tag, std::shared_ptr<Export> target, uint64_t stripe, uint32_t slot,
           OverlayRef overlay)
      : PolicyTask(shared, tag), target_(std::move(target)), stripe_(stripe), slot_(slot), overlay_(overlay) {}
  ~PartTask() override {
    if (overlay_.payload != nullptr) overlay_.payload->release();
  }

  void run(WorkerContext& context) override {
    const uint64_t start = stripe_ * target_->stripeSize;
    const uint64_t from = std::max(start, overlay_.offset);
    const uint64_t to = std::min(start + target_->stripeSize, overlay_.offset + overlay_.length);
    IoError error;
    if (from < to) {
      Segments& segments = context.segments;
      segments.clear();
      if (overlay_.payload == nullptr) {
        mapRepeated(shared_.layout, slot_, from - start, zeroBlock, to - from, segments);
      } else {
        mapRange(shared_.layout, slot_, from - start, overlay_.payload->data() + (from - overlay_.offset), to - from,
                 segments);
      }
      context.io.write(segments, &error);
    }
    report(shared_, tag_, error, true);
    delete this;
  }

 private:
  const std::shared_ptr<Export> target_;
  const uint64_t stripe_;
  const uint32_t slot_;
  const OverlayRef overlay_;
};

class SlotTask final : public PolicyTask {
 public:
  SlotTask(Shared& shared, double tag, bool write, uint32_t slot, uint64_t offset, uint8_t* data, uint64_t length)
      : PolicyTask(shared, tag), write_(write), slot_(slot), offset_(offset), data_(data), length_(length) {}

  void run(WorkerContext& context) override {
    Segments& segments = context.segments;
    segments.clear();
    mapRange(shared_.layout, slot_, offset_, data_, length_, segments);
    IoError error;
    if (!segments.empty()) {
      if (write_) {
        context.io.write(segments, &error);
      } else {
        context.io.readWaiting(segments, &error);
      }
    }
    report(shared_, tag_, error, write_);
    delete this;
  }

 private:
  const bool write_;
  const uint32_t slot_;
  const uint64_t offset_;
  uint8_t* const data_;
  const uint64_t length_;
};

class RangeTask final : public PolicyTask {
 public:
  RangeTask(Shared& shared, double tag, Export& target, uint64_t epoch)
      : PolicyTask(shared, tag), target_(target), epoch_(epoch) {}

  void map(const Tables& tables, uint64_t offset, uint8_t* data, uint64_t length) {
    while (length > 0) {
      const uint64_t stripe = offset / target_.stripeSize;
      const uint64_t within = offset - stripe * target_.stripeSize;
      const uint64_t part = std::min(length, target_.stripeSize - within);
      const uint32_t slot = target_.slotForRead(tables, stripe);
      if (slot == kSlotBroken) {
        error_ = {EIO, 0, offset};
        return;
      }
      if (slot != kSlotNone) {
        mapRange(shared_.layout, slot, within, data, part, segments_);
      } else if (!fills_.empty() && fills_.back().data + fills_.back().length == data) {
        fills_.back().length += part;
      } else {
        fills_.push_back({data, part});
      }
      offset += part;
      data += part;
      length -= part;
    }
  }

  void run(WorkerContext& context) override {
    for (const Fill& fill : fills_) memset(fill.data, target_.fill, fill.length);
    if (error_.error == 0) context.io.readGathered(segments_, &error_);
    finish();
  }

  void cancel() override {
    error_ = {ECANCELED, 0, 0};
    finish();
  }

 private:
  struct Fill {
    uint8_t* data;
    uint64_t length;
  };

  void finish() {
    Event event{};
    event.kind = EventKind::Done;
    event.tag = tag_;
    event.value = 1;
    event.error = error_;
    event.target = &target_;
    event.epoch = epoch_;
    shared_.events.push(event);
    delete this;
  }

  Export& target_;  // stays while its rangeReads are counted
  const uint64_t epoch_;
  Segments segments_;
  std::vector<Fill> fills_;
  IoError error_;
};

/// All members at once, one task each; the last one reports.
struct SyncGroup {
  std::atomic<uint32_t> remaining;
  std::mutex mutex;
  IoError error;
};

class SyncTask final : public PolicyTask {
 public:
  SyncTask(Shared& shared, double tag, uint32_t member, SyncGroup* group)
      : PolicyTask(shared, tag), member_(member), group_(group) {}

  void run(WorkerContext& context) override {
    int failure = 0;
    while (fdatasync(shared_.layout.members[member_].fd) != 0) {
      if (errno == EINTR) continue;
      failure = errno;
      break;
    }
    context.io.counters()[member_].syncs.add(1);
    finish(failure);
  }

  void cancel() override { finish(ECANCELED); }

 private:
  void finish(int failure) {
    if (failure != 0) {
      std::lock_guard<std::mutex> lock(group_->mutex);
      group_->error = {failure, member_, 0};
    }
    if (group_->remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      report(shared_, tag_, group_->error, true);
      delete group_;
    }
    delete this;
  }

  const uint32_t member_;
  SyncGroup* const group_;
};

class PunchTask final : public PolicyTask {
 public:
  PunchTask(Shared& shared, double tag, uint32_t slot, uint32_t count)
      : PolicyTask(shared, tag), slot_(slot), count_(count) {}

  void run(WorkerContext&) override {
    const Layout& layout = shared_.layout;
    const uint64_t offset = layout.dataOffset + slot_ * layout.chunkSize;
    const uint64_t length = count_ * layout.chunkSize;
    IoError error;
    bool given = true;
    for (uint32_t member = 0; member < layout.members.size() && error.error == 0; member++) {
      if (layout.members[member].blockDevice) {
        given = false;
        continue;
      }
      while (fallocate(layout.members[member].fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       static_cast<off_t>(offset), static_cast<off_t>(length)) != 0) {
        if (errno == EINTR) continue;
        if (errno == EOPNOTSUPP || errno == ENOSYS || errno == ENODEV) {
          given = false;
        } else {
          error = {errno, member, offset};
        }
        break;
      }
    }
    report(shared_, tag_, error, true, given);
    delete this;
  }

 private:
  const uint64_t slot_;
  const uint64_t count_;
};

}  // namespace

void submitFormat(Shared& shared, FormatOrder order) {
  shared.writing->submit(new FormatTask(shared, std::move(order)));
}

void makePart(Shared& shared, double tag, std::shared_ptr<Export> target, uint64_t stripe, uint32_t slot, OverlayRef overlay,
              TaskList& tasks) {
  tasks.push(new PartTask(shared, tag, std::move(target), stripe, slot, overlay));
}

void submitSlot(Shared& shared, double tag, bool write, uint32_t slot, uint64_t offset, uint8_t* data,
                uint64_t length) {
  WorkPool& pool = write ? *shared.writing : *shared.waiting;
  pool.submit(new SlotTask(shared, tag, write, slot, offset, data, length));
}

void submitRange(Shared& shared, double tag, Export& target, uint64_t epoch, uint64_t offset, uint8_t* data,
                 uint64_t length) {
  RangeTask* task = new RangeTask(shared, tag, target, epoch);
  task->map(target.current(), offset, data, length);
  shared.waiting->submit(task);
}

void submitSync(Shared& shared, double tag) {
  SyncGroup* group = new SyncGroup{};
  const uint32_t count = static_cast<uint32_t>(shared.layout.members.size());
  group->remaining.store(count);
  for (uint32_t member = 0; member < count; member++) {
    shared.waiting->submit(new SyncTask(shared, tag, member, group));
  }
}

void submitPunch(Shared& shared, double tag, uint32_t slot, uint32_t count) {
  shared.waiting->submit(new PunchTask(shared, tag, slot, count));
}

}  // namespace nbd

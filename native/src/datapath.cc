#include "datapath.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "assert.h"
#include "connection.h"
#include "lane.h"
#include "loop.h"
#include "policy_io.h"
#include "uring.h"

namespace nbd {

namespace {

constexpr uint32_t kWaitingThreads = 16;
constexpr uint32_t kWritingThreadsMax = 4;

enum CommandWord { kComplete = 1, kFormatUnit, kWritePart, kSync, kPunch, kBarrier, kCloseExport, kDropLane, kEndSession };

uint32_t loopIndexOf(const Upcall& upcall) { return upcall.connection->loopIndex(); }

}  // namespace

Datapath::Datapath(Layout layout, const Limits& limits) {
  shared_.layout = std::move(layout);
  shared_.limits = limits;
}

std::unique_ptr<Datapath> Datapath::open(Layout layout, const Limits& limits, uint32_t threads, EngineChoice engine,
                                         EventQueue::Wake wake, void* context, std::string* reason) {
  std::unique_ptr<Datapath> datapath(new Datapath(std::move(layout), limits));
  Shared& shared = datapath->shared_;
  probeMembers(shared.layout);
  const bool ring = engine != EngineChoice::Threads && Uring::available();
  if (engine == EngineChoice::IoUring && !ring) {
    *reason = "io_uring is not available to this process";
    return nullptr;
  }
  shared.engine = ring ? EngineKind::IoUring : EngineKind::Threads;
  shared.events.onWake(wake, context);
  const long cores = sysconf(_SC_NPROCESSORS_ONLN);
  const uint32_t writers = std::clamp<uint32_t>(static_cast<uint32_t>(cores), 1, kWritingThreadsMax);
  shared.waiting.reset(new WorkPool(shared.layout, kWaitingThreads));
  shared.writing.reset(new WorkPool(shared.layout, writers));
  NBD_ASSERT(threads >= 1 && threads <= kLoopsMax);
  for (uint32_t i = 0; i < threads; i++) {
    shared.loops.emplace_back(new Loop(shared, i));
    const int failure = shared.loops.back()->start();
    if (failure != 0) {
      *reason = std::string("cannot start an I/O thread: ") + strerror(failure);
      return nullptr;
    }
  }
  datapath->sessionLoops_.assign(threads, 0);
  datapath->batches_.resize(threads);
  return datapath;
}

Datapath::~Datapath() { stop(); }

void Datapath::stop() {
  if (stopped_) return;
  stopped_ = true;
  // First those who hand jobs back, then those who get them.
  if (shared_.waiting) shared_.waiting->stop();
  if (shared_.writing) shared_.writing->stop();
  for (auto& loop : shared_.loops) loop->stop();
  std::vector<Event> late;
  shared_.events.take(late);
  pending_.insert(pending_.end(), late.begin(), late.end());
  for (size_t i = pendingAt_; i < pending_.size(); i++) {
    if (pending_[i].upcall != nullptr) upcalls_.push_back(pending_[i].upcall);
  }
  for (Upcall* upcall : upcalls_) {
    if (upcall == nullptr) continue;
    if (upcall->payload != nullptr) upcall->payload->release();
    delete upcall;
  }
  upcalls_.clear();
  pending_.clear();
  pendingAt_ = 0;
  for (RangeWaiting& waiting : rangeBarriers_) {
    delete waiting.barrier->retired;
    delete waiting.barrier;
  }
  rangeBarriers_.clear();
  for (auto& [id, target] : exports_) delete target->tables.load();
  exports_.clear();
}

// --- exports and sessions ------------------------------------------------------------------------------------------

void Datapath::openExport(uint32_t id, uint64_t stripeSize, uint32_t formatUnit, uint8_t fill, const Tables& tables) {
  NBD_ASSERT(exports_.find(id) == exports_.end());
  std::shared_ptr<Export> target(new Export);
  target->id = id;
  target->stripeSize = stripeSize;
  target->formatUnit = formatUnit;
  target->fill = fill;
  target->tables.store(new Tables(tables));
  if (fill != 0) {
    target->fillBlock.reset(new uint8_t[kFillBlockSize]);
    memset(target->fillBlock.get(), fill, kFillBlockSize);
  }
  target->counters.reset(new ExportCounters[shared_.loops.size()]);
  target->lanes.assign(shared_.loops.size(), nullptr);
  exports_[id] = std::move(target);
}

void Datapath::retable(uint32_t id, double tag, const Tables& tables) {
  Export& target = *exports_.at(id);
  // Each access loads the pointer once; those that began before are over when the barrier has been passed.
  const Tables* retired = target.tables.exchange(new Tables(tables), std::memory_order_acq_rel);
  barrier(tag, retired, nullptr);
  sendBatches();
}

void Datapath::serve(uint32_t exportId, SessionOptions options) {
  Export& target = *exports_.at(exportId);
  NBD_ASSERT(!target.closing);
  const uint32_t loop = static_cast<uint32_t>(
      std::min_element(sessionLoops_.begin(), sessionLoops_.end()) - sessionLoops_.begin());
  sessionLoops_[loop]++;
  target.sessions++;
  loopOfSession_[options.id] = loop;
  LoopCommand command{};
  command.kind = LoopCommand::Kind::Add;
  command.connection = new Connection(*shared_.loops[loop], target, std::move(options));
  shared_.loops[loop]->post(command);
}

void Datapath::openLane(uint32_t exportId, uint32_t laneId, uint32_t loop, int fd) {
  Export& target = *exports_.at(exportId);
  NBD_ASSERT(!target.closing && loop < shared_.loops.size());
  if (target.claims == nullptr) target.claims.reset(new Claims);
  target.openLanes++;
  LoopCommand command{};
  command.kind = LoopCommand::Kind::AddLane;
  command.lane = new Lane(*shared_.loops[loop], target, fd, laneId);
  shared_.loops[loop]->post(command);
}

void Datapath::setForwards(uint32_t exportId, bool on) {
  Export& target = *exports_.at(exportId);
  if (target.claims == nullptr) target.claims.reset(new Claims);
  target.forwards.store(on, std::memory_order_release);
}

void Datapath::setLanesOnly(uint32_t exportId, bool on) {
  exports_.at(exportId)->lanesOnly.store(on, std::memory_order_release);
}

bool Datapath::holdBlocks(uint32_t exportId, uint64_t offset, uint64_t length) {
  return exports_.at(exportId)->claims->hold(offset, length);
}

void Datapath::releaseBlocks(uint32_t exportId, uint64_t offset, uint64_t length) {
  exports_.at(exportId)->claims->release(offset, length);
}

bool Datapath::blocksBusy(uint32_t exportId, uint64_t offset, uint64_t length) {
  const auto found = exports_.find(exportId);
  if (found == exports_.end() || found->second->claims == nullptr) return false;
  return found->second->claims->busy(offset, length);
}

void Datapath::settleClose(Export& target) {
  if (!target.closing || target.sessions > 0 || target.openLanes > 0 || target.adopted > 0 || target.rangeReads > 0) {
    return;
  }
  Event event{};
  event.kind = EventKind::Done;
  event.tag = target.closeTag;
  event.value = 1;
  pending_.push_back(event);
  delete target.tables.exchange(nullptr);
  exports_.erase(target.id);
  shared_.events.nudge();
}

// --- commands ------------------------------------------------------------------------------------------------------

Upcall* Datapath::outstanding(double index) {
  const size_t at = static_cast<size_t>(index);
  NBD_ASSERT(at < upcalls_.size() && upcalls_[at] != nullptr);
  return upcalls_[at];
}

Upcall* Datapath::release(double index) {
  Upcall* upcall = outstanding(index);
  upcalls_[static_cast<size_t>(index)] = nullptr;
  freeIndexes_.push_back(static_cast<uint32_t>(index));
  return upcall;
}

uint32_t Datapath::hold(Upcall* upcall) {
  if (freeIndexes_.empty()) {
    upcalls_.push_back(upcall);
    return static_cast<uint32_t>(upcalls_.size() - 1);
  }
  const uint32_t index = freeIndexes_.back();
  freeIndexes_.pop_back();
  upcalls_[index] = upcall;
  return index;
}

void Datapath::post(uint32_t loop, const LoopCommand& command) { batches_[loop].push_back(command); }

void Datapath::sendBatches() {
  for (uint32_t loop = 0; loop < batches_.size(); loop++) {
    if (batches_[loop].empty()) continue;
    shared_.loops[loop]->post(batches_[loop]);
    batches_[loop].clear();
  }
}

void Datapath::barrier(double tag, const Tables* retired, Export* lanesOf) {
  Barrier* barrier = new Barrier;
  barrier->tag = tag;
  barrier->retired = retired;
  barrier->remaining.store(static_cast<uint32_t>(shared_.loops.size()) + 1);
  for (uint32_t loop = 0; loop < shared_.loops.size(); loop++) {
    // A thread without sessions has no access in flight and gets none before this thread gives it a session.
    if (sessionLoops_[loop] == 0) {
      shared_.pass(barrier);
      continue;
    }
    LoopCommand command{};
    command.kind = LoopCommand::Kind::Barrier;
    command.barrier = barrier;
    command.target = lanesOf;
    post(loop, command);
  }
  if (rangeEpochs_.size() == 1 && rangeEpochs_.back() == 0) {
    shared_.pass(barrier);
    return;
  }
  rangeBarriers_.push_back({rangeEpochFirst_ + rangeEpochs_.size() - 1, barrier});
  rangeEpochs_.push_back(0);
}

void Datapath::submit(const double* words, size_t count) {
  const double* const end = words + count;
  TaskList parts;
  while (words < end) words = submitOne(words, end, parts);
  shared_.writing->submitAll(parts);
  sendBatches();
}

/// Parts of one call are queued together; whatever else comes finds those before it queued.
const double* Datapath::submitOne(const double* at, const double* end, TaskList& parts) {
  auto take = [&]() {
    NBD_ASSERT(at < end);
    return *at++;
  };
  auto overlayOf = [&](const Upcall& upcall) {
    if (upcall.payload != nullptr) upcall.payload->retain();
    return OverlayRef{upcall.offset, upcall.length, upcall.payload};
  };
  const int kind = static_cast<int>(take());
  if (kind != kWritePart && kind != kComplete) shared_.writing->submitAll(parts);
  switch (kind) {
    case kComplete: {
      Upcall* upcall = release(take());
      if (upcall->counted) upcall->target->claims->leave(upcall->offset, upcall->length);
      if (upcall->connection == nullptr) {
        take();
        Export& target = *upcall->target;
        if (upcall->payload != nullptr) upcall->payload->release();
        delete upcall;
        target.adopted--;
        settleClose(target);
        return at;
      }
      LoopCommand command{};
      command.kind = LoopCommand::Kind::Complete;
      command.upcall = upcall;
      command.error = static_cast<uint32_t>(take());
      post(loopIndexOf(*upcall), command);
      return at;
    }
    case kFormatUnit: {
      FormatOrder order;
      order.tag = take();
      order.target = exports_.at(static_cast<uint32_t>(take()));
      order.stripe = static_cast<uint64_t>(take());
      for (size_t left = static_cast<size_t>(take()); left > 0; left--) {
        order.slots.push_back(static_cast<uint32_t>(take()));
      }
      for (size_t left = static_cast<size_t>(take()); left > 0; left--) {
        order.bases.push_back(static_cast<uint32_t>(take()));
      }
      NBD_ASSERT(order.bases.empty() || order.bases.size() == order.slots.size());
      for (size_t left = static_cast<size_t>(take()); left > 0; left--) {
        order.overlays.push_back(overlayOf(*outstanding(take())));
      }
      submitFormat(shared_, std::move(order));
      return at;
    }
    case kWritePart: {
      const double tag = take();
      const Upcall& upcall = *outstanding(take());
      const uint64_t stripe = static_cast<uint64_t>(take());
      makePart(shared_, tag, exports_.at(upcall.target->id), stripe, static_cast<uint32_t>(take()), overlayOf(upcall),
               parts);
      return at;
    }
    case kSync:
      submitSync(shared_, take());
      return at;
    case kPunch: {
      const double tag = take();
      const uint32_t slot = static_cast<uint32_t>(take());
      submitPunch(shared_, tag, slot, static_cast<uint32_t>(take()));
      return at;
    }
    case kBarrier: {
      const double tag = take();
      const auto lanesOf = exports_.find(static_cast<uint32_t>(take()));
      barrier(tag, nullptr, lanesOf == exports_.end() ? nullptr : lanesOf->second.get());
      return at;
    }
    case kCloseExport: {
      const double tag = take();
      Export& target = *exports_.at(static_cast<uint32_t>(take()));
      target.closing = true;
      target.closeTag = tag;
      if (target.sessions == 0 && target.openLanes == 0) {
        settleClose(target);
        return at;
      }
      LoopCommand command{};
      command.kind = LoopCommand::Kind::CloseExport;
      command.target = &target;
      for (uint32_t loop = 0; loop < shared_.loops.size(); loop++) post(loop, command);
      return at;
    }
    case kDropLane: {
      LoopCommand command{};
      command.kind = LoopCommand::Kind::DropLane;
      command.id = static_cast<uint32_t>(take());
      for (uint32_t loop = 0; loop < shared_.loops.size(); loop++) post(loop, command);
      return at;
    }
    case kEndSession: {
      LoopCommand command{};
      command.kind = LoopCommand::Kind::EndSession;
      command.id = static_cast<uint32_t>(take());
      const auto session = loopOfSession_.find(command.id);
      if (session != loopOfSession_.end()) post(session->second, command);
      return at;
    }
    default:
      NBD_ASSERT(false);
  }
  return at;
}

uint32_t Datapath::adopt(uint32_t exportId, UpcallKind kind, uint64_t offset, uint64_t length, uint8_t* data) {
  Export& target = *exports_.at(exportId);
  NBD_ASSERT(!target.closing);
  NBD_ASSERT((kind == UpcallKind::Write) == (data != nullptr));
  Upcall* upcall = new Upcall;
  upcall->target = &target;
  upcall->kind = kind;
  upcall->offset = offset;
  upcall->length = length;
  if (data != nullptr) upcall->payload = Payload::borrow(data, length);
  target.adopted++;
  return hold(upcall);
}

bool Datapath::readPayload(uint32_t index, uint64_t offset, uint8_t* target, uint64_t length) {
  const Upcall& upcall = *outstanding(index);
  if (upcall.payload == nullptr || offset > upcall.payload->size || length > upcall.payload->size - offset) return false;
  memcpy(target, upcall.payload->data() + offset, length);
  return true;
}

void Datapath::readRange(double tag, uint32_t exportId, uint64_t offset, uint8_t* data, uint64_t length) {
  const auto found = exports_.find(exportId);
  Export* target = found == exports_.end() ? nullptr : found->second.get();
  if (target == nullptr || (target->closing && target->sessions == 0 && target->adopted == 0)) {
    Event event{};
    event.kind = EventKind::Done;
    event.tag = tag;
    event.error = {ECANCELED, 0, 0};
    shared_.events.push(event);
    return;
  }
  const uint64_t size = target->current().size;
  NBD_ASSERT(offset <= size && length <= size - offset);
  target->rangeReads++;
  rangeEpochs_.back()++;
  submitRange(shared_, tag, *target, rangeEpochFirst_ + rangeEpochs_.size() - 1, offset, data, length);
}

void Datapath::rangeReadDone(Export& target, uint64_t epoch) {
  NBD_ASSERT(epoch >= rangeEpochFirst_ && rangeEpochs_[epoch - rangeEpochFirst_] > 0);
  rangeEpochs_[epoch - rangeEpochFirst_]--;
  while (rangeEpochs_.size() > 1 && rangeEpochs_.front() == 0) {
    rangeEpochs_.pop_front();
    rangeEpochFirst_++;
  }
  while (!rangeBarriers_.empty() && rangeBarriers_.front().epoch < rangeEpochFirst_) {
    shared_.pass(rangeBarriers_.front().barrier);
    rangeBarriers_.pop_front();
  }
  NBD_ASSERT(target.rangeReads > 0);
  target.rangeReads--;
  settleClose(target);
}

void Datapath::slotIo(double tag, bool write, uint32_t slot, uint64_t offset, uint8_t* data, uint64_t length) {
  submitSlot(shared_, tag, write, slot, offset, data, length);
}

void Datapath::completeStatus(uint32_t index, const double* words, size_t count) {
  Upcall* upcall = release(index);
  const Mode mode = upcall->connection->mode();
  const bool one = (upcall->request.flags & kFlagRequestOne) != 0;
  const bool extended = mode == Mode::Extended;
  const size_t extentSize = extended ? 16 : 8;
  std::vector<uint8_t>* body = new std::vector<uint8_t>;
  const double* const end = words + count;
  while (words < end) {
    const uint32_t context = static_cast<uint32_t>(*words++);
    const size_t extents = static_cast<size_t>(*words++);
    const double* const next = words + 2 * extents;
    NBD_ASSERT(extents > 0 && next <= end);
    const size_t start = body->size();
    const size_t most = one ? 1 : std::min<size_t>(extents, shared_.limits.statusExtentsMax);
    body->resize(start + kExtendedReplySize + 8 + most * extentSize);
    uint8_t* const header = body->data() + start;
    uint8_t* const payload = header + chunkHeaderSize(mode);
    uint8_t* p = payload + (extended ? 8 : 4);
    // "The sum of the length fields of the first N-1 extents MUST be less than the requested length".
    uint64_t covered = 0;
    uint32_t used = 0;
    while (used < most && covered < upcall->length) {
      uint64_t length = static_cast<uint64_t>(words[0]);
      if (one) length = std::min(length, upcall->length);
      bool cut = false;
      if (!extended && length > UINT32_MAX) {
        length = (uint64_t{1} << 32) - 4096;  // the longest that ends on a page
        cut = true;
      }
      if (extended) {
        p = put64(p, length);
        p = put64(p, static_cast<uint64_t>(words[1]));
      } else {
        p = put32(p, static_cast<uint32_t>(length));
        p = put32(p, static_cast<uint32_t>(words[1]));
      }
      words += 2;
      covered += length;
      used++;
      if (cut) break;
    }
    words = next;
    put32(payload, context);
    if (extended) put32(payload + 4, used);
    const uint16_t type = extended ? kReplyBlockStatusExtended : kReplyBlockStatus;
    const uint16_t flags = words == end ? kReplyFlagDone : 0;
    putChunkHeader(header, mode, flags, type, upcall->request.cookie, upcall->request.offset,
                   static_cast<uint64_t>(p - payload));
    body->resize(static_cast<size_t>(p - body->data()));
  }
  LoopCommand command{};
  command.kind = LoopCommand::Kind::CompleteStatus;
  command.upcall = upcall;
  command.body = body;
  shared_.loops[loopIndexOf(*upcall)]->post(command);
}

// --- events --------------------------------------------------------------------------------------------------------

size_t Datapath::drain(double* out, size_t records) {
  size_t filled = 0;
  while (filled < records) {
    if (pendingAt_ == pending_.size()) {
      pending_.clear();
      pendingAt_ = 0;
      shared_.events.take(pending_);
      if (pending_.empty()) break;
    }
    const Event event = pending_[pendingAt_++];  // by value: a session's end may append
    fillRecord(event, out + filled * kRecordWords);
    filled++;
  }
  return filled;
}

void Datapath::fillRecord(const Event& event, double* out) {
  out[0] = static_cast<double>(event.kind);
  switch (event.kind) {
    case EventKind::Upcall: {
      const Upcall& upcall = *event.upcall;
      out[1] = hold(event.upcall);
      out[2] = upcall.target->id;
      out[3] = static_cast<double>(upcall.kind);
      out[4] = upcall.request.flags | (upcall.half ? 1 << 16 : 0) | (upcall.lane ? 1 << 17 : 0);
      out[5] = static_cast<double>(upcall.offset);
      out[6] = static_cast<double>(upcall.length);
      out[7] = upcall.session;
      out[8] = static_cast<double>(upcall.contextMask & UINT32_MAX);
      out[9] = static_cast<double>(upcall.contextMask >> 32);
      return;
    }
    case EventKind::Done:
      out[1] = event.tag;
      out[2] = event.value;
      out[3] = event.error.error;
      out[4] = event.error.member;
      out[5] = static_cast<double>(event.error.offset);
      out[6] = event.write ? 1 : 0;
      if (event.target != nullptr) rangeReadDone(*event.target, event.epoch);
      return;
    case EventKind::SessionEnd: {
      out[1] = event.tag;
      out[2] = event.value;
      auto session = loopOfSession_.find(static_cast<uint32_t>(event.tag));
      NBD_ASSERT(session != loopOfSession_.end());
      sessionLoops_[session->second]--;
      loopOfSession_.erase(session);
      Export& target = *event.target;
      target.sessions--;
      settleClose(target);
      return;
    }
    case EventKind::LaneEnd:
      out[1] = event.tag;
      event.target->openLanes--;
      settleClose(*event.target);
      return;
  }
}

void Datapath::exportCounters(uint32_t id, double* out) {
  const Export& target = *exports_.at(id);
  uint64_t sums[12] = {};
  for (size_t i = 0; i < shared_.loops.size(); i++) {
    const ExportCounters& c = target.counters[i];
    const Counter* all[12] = {&c.reads,  &c.readBytes, &c.writes, &c.writeBytes, &c.flushes,
                              &c.trims,  &c.zeroes,    &c.errors, &c.upcalls,    &c.inPlaceWrites,
                              &c.laneWrites, &c.laneBytes};
    for (int k = 0; k < 12; k++) sums[k] += all[k]->get();
  }
  for (int k = 0; k < 12; k++) out[k] = static_cast<double>(sums[k]);
  out[12] = static_cast<double>(target.fullStripeWrites.load(std::memory_order_relaxed));
}

void Datapath::memberCounters(double* out) {
  for (uint32_t member = 0; member < shared_.layout.members.size(); member++) {
    uint64_t sums[5] = {};
    shared_.waiting->addCounters(member, sums);
    shared_.writing->addCounters(member, sums);
    for (const auto& loop : shared_.loops) {
      const MemberCounters& c = loop->memberCounters(member);
      sums[0] += c.reads.get();
      sums[1] += c.readBytes.get();
      sums[2] += c.writes.get();
      sums[3] += c.writeBytes.get();
      sums[4] += c.syncs.get();
    }
    for (int k = 0; k < 5; k++) out[member * 5 + k] = static_cast<double>(sums[k]);
  }
}

}  // namespace nbd

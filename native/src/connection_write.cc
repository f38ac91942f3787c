// Writes: in place where all direct bits are 1, with a lane where a mirror takes part; else gathered for the policy.
#include <algorithm>
#include <cstring>

#include "assert.h"
#include "connection.h"
#include "lane.h"
#include "loop.h"

namespace nbd {

namespace {

/// A payload that is still arriving is written in pieces of at least this, cut where pages are.
constexpr size_t kPiece = 128 * 1024;
constexpr uint64_t kPage = 4096;

}  // namespace

void Connection::startWrite() {
  counters().writes.add(1);
  counters().writeBytes.add(current_.length);
  writeOffset_ = current_.offset;
  phase_ = Phase::InPlace;
}

bool Connection::mapDirect(const Tables& tables, uint64_t offset, uint64_t length, uint8_t* data,
                           Segments& segments) const {
  const Layout& layout = loop_.shared().layout;
  while (length > 0) {
    const uint64_t stripe = offset / target_.stripeSize;
    const uint64_t within = offset - stripe * target_.stripeSize;
    const uint64_t part = std::min(length, target_.stripeSize - within);
    const uint32_t slot = target_.slotForWrite(tables, stripe);
    if (slot == kSlotNone) return false;
    mapRange(layout, slot, within, data, part, segments);
    offset += part;
    data += part;
    length -= part;
  }
  return true;
}

/// Whether direct bits are all that a write of this connection needs.
bool Connection::mayWriteAlone() const {
  if (target_.forwards.load(std::memory_order_acquire)) return false;
  return lane_ || !target_.lanesOnly.load(std::memory_order_acquire);
}

/// All of a write of a lane is there: whether it is what the peer sent. Nothing that is not goes any further.
bool Connection::laneIntact() {
  const uint32_t low = static_cast<uint32_t>(current_.cookie);
  const uint32_t sum = laneChecksum(current_.flags, low, current_.offset, current_.length, input_->begin());
  if (sum == current_.cookie >> 32) return true;
  cut(SessionEnd::Protocol);
  return false;
}

bool Connection::takeInPlace() {
  const uint64_t left = parser_.payloadLeft();
  const size_t available = inputSize();
  uint64_t piece = left;
  if (lane_) {
    if (available < left) return false;
    // Once: where memory is short it goes up in pieces, and what is left of it was looked at with the first.
    if (writeOffset_ == current_.offset && !laneIntact()) return false;
  } else if (available < left) {
    if (available < kPiece) return false;
    piece = available - (writeOffset_ + available) % kPage;
  }
  const Tables& tables = target_.current();
  if (writeOffset_ + left > tables.size) {  // it shrank meanwhile
    discard(kEnospc);
    return true;
  }
  // The bytes are here, so from now on nothing waits for the client: look at the bits and write.
  Segments& segments = loop_.segments();
  segments.clear();
  // In this order: who forbids it does so before the first direct bit is set.
  if (!mapDirect(tables, writeOffset_, piece, input_->begin(), segments) || !mayWriteAlone()) {
    uint64_t gather = left;
    if (!reserve(left)) {
      // What is always there for a connection that holds nothing takes it further, piece by piece.
      gather = std::min(left, kMemoryAlways - writeOffset_ % kPage);
      if (!reserve(gather)) {
        NBD_ASSERT(inFlightBytes_ > 0);
        waitsForMemory_ = true;
        return false;
      }
    }
    payload_ = Payload::create(gather);
    gathered_ = 0;
    phase_ = Phase::Gather;
    return true;
  }
  IoError error;
  if (!loop_.io().write(segments, &error)) {
    discard(wireErrorOf(error.error));
    return true;
  }
  counters().inPlaceWrites.add(1);
  dropInput(piece);
  parser_.consumed(piece);
  writeOffset_ += piece;
  if (parser_.payloadLeft() == 0) writeDone();
  return true;
}

void Connection::writeDone() {
  phase_ = Phase::Header;
  if ((current_.flags & kFlagFua) != 0) {
    // In place already; the policy makes it durable and then answers.
    upcall(current_, UpcallKind::Sync, current_.offset, current_.length);
  } else {
    reply(current_, kOk);
  }
}

bool Connection::takeGather() {
  const size_t part = std::min<size_t>(inputSize(), payload_->size - gathered_);
  if (part > 0) {
    memcpy(payload_->data() + gathered_, input_->begin(), part);
    gathered_ += part;
    dropInput(part);
    parser_.consumed(part);
  }
  if (gathered_ < payload_->size) return false;
  gatherDone();
  return true;
}

void Connection::gatherDone() {
  NBD_ASSERT(gathered_ == payload_->size);
  const bool last = parser_.payloadLeft() == 0;
  NBD_ASSERT(!last || writeOffset_ + gathered_ == current_.offset + current_.length);
  bool torn = false;
  if (last && writeOnLane(&torn)) return;
  phase_ = last ? Phase::Header : Phase::PieceWait;
  Request request = current_;
  // Whoever makes the last piece durable makes all of them durable.
  if (!last) request.flags &= static_cast<uint16_t>(~kFlagFua);
  Upcall* call = upcall(request, UpcallKind::Write, writeOffset_, gathered_);
  call->payload = payload_;
  call->charged = payload_->size;
  call->piece = !last;
  call->half = torn;
  payload_ = nullptr;
}

/// In place here, and over there at the same time. False where the policy has to see to it; nothing is answered then. `torn`:
/// some of it may have been changed here.
bool Connection::writeOnLane(bool* torn) {
  if (!target_.forwards.load(std::memory_order_acquire)) return false;
  // One that was begun in another way goes on in that way.
  if (writeOffset_ != current_.offset || gathered_ != current_.length || gathered_ > kLaneBytesMax) return false;
  if ((current_.flags & kFlagFua) != 0) return false;
  Lane* const lane = target_.lanes[loop_.index()];
  if (lane == nullptr || lane->full()) return false;
  const Tables& tables = target_.current();
  if (writeOffset_ + gathered_ > tables.size) return false;
  Segments& segments = loop_.segments();
  segments.clear();
  if (!target_.claims->take(writeOffset_, gathered_)) return false;
  IoError error;
  const bool direct = mapDirect(tables, writeOffset_, gathered_, payload_->data(), segments);
  if (!direct || !loop_.io().write(segments, &error)) {
    // A write that failed is made again by the policy, which knows what to do with the failure.
    *torn = direct;
    target_.claims->give(writeOffset_, gathered_);
    target_.claims->leave(writeOffset_, gathered_);
    return false;
  }
  counters().inPlaceWrites.add(1);
  counters().laneWrites.add(1);
  counters().laneBytes.add(gathered_);
  Upcall* call = loop_.takeUpcall();
  call->connection = this;
  call->target = &target_;
  call->request = current_;
  call->kind = UpcallKind::Write;
  call->offset = writeOffset_;
  call->length = gathered_;
  call->session = id_;
  call->payload = payload_;
  call->charged = payload_->size;
  payload_ = nullptr;
  phase_ = Phase::Header;
  inFlight_++;
  lane->begin(call);
  return true;
}

/// A piece of a payload that is larger than what could be had has been dealt with: on to the next one.
void Connection::pieceDone(const Upcall* call, uint32_t error) {
  if (state_ != State::Open) return;
  NBD_ASSERT(phase_ == Phase::PieceWait);
  writeOffset_ += call->length;
  if (error == kOk) {
    phase_ = Phase::InPlace;
  } else {
    discard(error);
  }
}

}  // namespace nbd

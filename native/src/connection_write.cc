// Writes: in place where all direct bits are 1, else gathered for the policy.
#include <algorithm>
#include <cstring>

#include "assert.h"
#include "connection.h"
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

bool Connection::takeInPlace() {
  const uint64_t left = parser_.payloadLeft();
  const size_t available = inputSize();
  uint64_t piece = left;
  if (available < left) {
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
  if (!mapDirect(tables, writeOffset_, piece, input_->begin(), segments)) {
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
  phase_ = last ? Phase::Header : Phase::PieceWait;
  Request request = current_;
  // Whoever makes the last piece durable makes all of them durable.
  if (!last) request.flags &= static_cast<uint16_t>(~kFlagFua);
  Upcall* call = upcall(request, UpcallKind::Write, writeOffset_, gathered_);
  call->payload = payload_;
  call->charged = payload_->size;
  call->piece = !last;
  payload_ = nullptr;
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

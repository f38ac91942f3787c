// Reads. Up to kReadWholeMax a reply is prepared in one run of memory and leaves only when all its bytes are there, so
// any error can still be reported. Above, and where memory is short, it is streamed piece by piece, as fast as the client
// takes it.
//
// Each piece is read at once where the data is cached; otherwise the piece is prepared again in a chunk of its own, which
// an engine fills. Slots are looked up when the access begins, and the access counts in an epoch until it ends.
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "assert.h"
#include "connection.h"
#include "loop.h"

namespace nbd {

namespace {

constexpr uint64_t kReadWholeMax = 2 << 20;
constexpr uint64_t kStreamPiece = 512 * 1024;
constexpr uint64_t kStreamPieceSmall = 48 * 1024;  // where memory is short: with its headers a kPieceChunk
constexpr int kStreamPieces = 8;  // in one turn
constexpr uint64_t kLargeReply = 256 * 1024;
constexpr int kLargeReplyRoom = 1 << 20;  // the kernel doubles it, for what it keeps beside the bytes
constexpr uint32_t kWideSocketsMax = 128;
constexpr size_t kHoleSize = kExtendedReplySize + 8 + 4;

}  // namespace

size_t Connection::planBound(const Request& request, uint64_t length) const {
  if (mode_ == Mode::Simple) return kSimpleReplySize + length;
  if ((request.flags & kFlagDontFragment) != 0) return kExtendedReplySize + 8 + length;
  const uint64_t stripes = length / target_.stripeSize + 2;
  return length + stripes * kHoleSize;
}

Connection::Plan Connection::planRead(uint8_t* at, const Request& request, const Part& part, Segments& segments) {
  segments.clear();
  const Tables& tables = target_.current();
  if (part.offset + part.length > tables.size) return {0, true, part.offset};  // it shrank meanwhile
  const bool raw = mode_ == Mode::Simple || (request.flags & kFlagDontFragment) != 0;
  return raw ? planRaw(at, request, part, tables, segments) : planChunks(at, request, part, tables, segments);
}

/// One header, then all bytes, formatted or not.
Connection::Plan Connection::planRaw(uint8_t* at, const Request& request, const Part& part, const Tables& tables,
                                     Segments& segments) {
  uint8_t* p = at;
  if (part.first) {
    if (mode_ == Mode::Simple) {
      p = putSimpleReply(p, kOk, request.cookie);
    } else {
      const uint16_t flags = part.last ? kReplyFlagDone : 0;
      p = putChunkHeader(p, mode_, flags, kReplyOffsetData, request.cookie, request.offset, 8 + request.length);
      p = put64(p, request.offset);
    }
  }
  uint64_t offset = part.offset;
  for (uint64_t left = part.length; left > 0;) {
    const uint64_t stripe = offset / target_.stripeSize;
    const uint64_t within = offset - stripe * target_.stripeSize;
    const uint64_t length = std::min(left, target_.stripeSize - within);
    const uint32_t slot = stream_.failed ? kSlotNone : target_.slotForRead(tables, stripe);
    if (slot == kSlotBroken) return {0, true, offset};
    if (slot == kSlotNone) {
      memset(p, target_.fill, length);
    } else {
      mapRange(loop_.shared().layout, slot, within, p, length, segments);
    }
    p += length;
    offset += length;
    left -= length;
  }
  return {static_cast<size_t>(p - at), false, 0};
}

/// Runs of unformatted stripes as holes, everything else as data.
Connection::Plan Connection::planChunks(uint8_t* at, const Request& request, const Part& part, const Tables& tables,
                                        Segments& segments) {
  enum class Run : uint8_t { None, Data, Hole };
  const size_t dataHeader = chunkHeaderSize(mode_) + 8;
  const uint64_t end = part.offset + part.length;
  uint8_t* p = at;
  uint8_t* header = nullptr;  // of the data run that is open
  Run run = Run::None;
  uint64_t runStart = part.offset;
  uint64_t offset = part.offset;
  auto closeRun = [&] {
    const uint64_t length = offset - runStart;
    const uint16_t flags = offset == end && part.last ? kReplyFlagDone : 0;
    if (run == Run::Data) {
      uint8_t* h =
          putChunkHeader(header, mode_, flags, kReplyOffsetData, request.cookie, request.offset, 8 + length);
      put64(h, runStart);
    } else if (run == Run::Hole) {
      p = putChunkHeader(p, mode_, flags, kReplyOffsetHole, request.cookie, request.offset, 12);
      p = put64(p, runStart);
      p = put32(p, static_cast<uint32_t>(length));
    }
    runStart = offset;
  };
  while (offset < end) {
    const uint64_t stripe = offset / target_.stripeSize;
    const uint64_t within = offset - stripe * target_.stripeSize;
    const uint64_t length = std::min(end - offset, target_.stripeSize - within);
    const uint32_t slot = target_.slotForRead(tables, stripe);
    if (slot == kSlotBroken) return {0, true, offset};
    const Run kind = slot == kSlotNone && target_.fill == 0 ? Run::Hole : Run::Data;
    if (kind != run) {
      closeRun();
      run = kind;
      if (kind == Run::Data) {
        header = p;
        p += dataHeader;
      }
    }
    if (kind == Run::Data) {
      if (slot == kSlotNone) {
        memset(p, target_.fill, length);
      } else {
        mapRange(loop_.shared().layout, slot, within, p, length, segments);
      }
      p += length;
    }
    offset += length;
  }
  closeRun();
  return {static_cast<size_t>(p - at), false, 0};
}

void Connection::executeRead(const Request& request) {
  counters().reads.add(1);
  counters().readBytes.add(request.length);
  if (request.length >= kLargeReply) widen();
  if (request.length > kReadWholeMax || (request.length > kStreamPieceSmall && !loop_.memoryLeft(request.length))) {
    startStream(request);
    return;
  }
  const Part part{request.offset, request.length, true, true};
  uint8_t* at = out_.reserve(planBound(request, request.length), kMediumChunk);
  Segments& segments = loop_.segments();
  const Plan plan = planRead(at, request, part, segments);
  if (plan.broken) {
    readFailed(request);
    return;
  }
  IoError error;
  switch (loop_.io().readCached(segments, &error)) {
    case MemberIo::ReadResult::Done:
      out_.commit(plan.bytes);
      return;
    case MemberIo::ReadResult::Failed:
      readFailed(request);
      return;
    case MemberIo::ReadResult::WouldBlock:
      if (!readLater(request, part, false)) readWithLittle(request);
      return;
  }
}

/// A local socket takes some 200 KiB by default: several sleeps and wake-ups for each large reply. TCP finds its size
/// alone. Bounded, since what a socket holds is the kernel's memory for as long as the client does not read.
void Connection::widen() {
  if (widenTried_) return;
  widenTried_ = true;
  if (!local_) return;
  std::atomic<uint32_t>& count = loop_.shared().wideSockets;
  if (count.fetch_add(1, std::memory_order_relaxed) >= kWideSocketsMax) {
    count.fetch_sub(1, std::memory_order_relaxed);
    return;
  }
  wide_ = true;
  // As much of it as the system allows (net.core.wmem_max).
  setsockopt(fd_, SOL_SOCKET, SO_SNDBUF, &kLargeReplyRoom, sizeof kLargeReplyRoom);
}

/// There is no memory for the whole reply.
void Connection::readWithLittle(const Request& request) {
  if (inFlightBytes_ > 0) {
    waitsForMemory_ = true;
    phase_ = Phase::ReadWait;
  } else {
    startStream(request);
  }
}

bool Connection::retryRead() {
  const Part part{current_.offset, current_.length, true, true};
  phase_ = Phase::Header;
  if (!readLater(current_, part, false)) readWithLittle(current_);
  return true;
}

void Connection::readFailed(const Request& request) { reply(request, kEio); }

/// Hands a part to an engine; false where there is no memory for it yet.
bool Connection::readLater(const Request& request, const Part& part, bool stream) {
  const size_t bound = planBound(request, part.length);
  const uint64_t charged = loop_.chunks().memoryOf(bound);
  if (!reserve(charged)) return false;
  ReadJob* job = new ReadJob;
  job->connection = this;
  job->request = request;
  job->chunk = loop_.chunks().take(bound);
  job->charged = charged;
  job->length = part.length;
  job->stream = stream;
  const Plan plan = planRead(job->chunk->data(), request, part, job->segments);
  job->chunk->end = static_cast<uint32_t>(plan.bytes);
  job->epoch = loop_.beginAccess();
  inFlight_++;
  if (stream) stream_.waiting = true;
  if (plan.broken) {
    job->error = {EIO, 0, plan.brokenOffset};
    job->segments.clear();
  }
  loop_.read(job);
  return true;
}

void Connection::readFinished(ReadJob* job) {
  inFlight_--;
  discharge(job->charged);
  if (job->stream) stream_.waiting = false;
  if (broken_) {
    if (job->stream) stream_.active = false;
    loop_.chunks().give(job->chunk);
  } else if (job->error.error != 0) {
    loop_.chunks().give(job->chunk);
    if (job->stream) {
      streamFailed(stream_.position);
    } else {
      readFailed(job->request);
    }
  } else if (job->stream) {
    out_.append(job->chunk);
    streamAdvanced(job->length);
  } else if (job->chunk->capacity > kSmallChunk) {
    replies().append(job->chunk);
  } else {
    // Small replies share chunks: those of a client that does not read would take up many times their size.
    OutQueue& out = replies();
    const size_t size = job->chunk->size();
    memcpy(out.reserve(size), job->chunk->begin(), size);
    out.commit(size);
    loop_.chunks().give(job->chunk);
  }
  loop_.touch(this);
}

// --- streams -------------------------------------------------------------------------------------------------------

void Connection::startStream(const Request& request) {
  stream_ = Stream{};
  stream_.active = true;
  stream_.raw = mode_ == Mode::Simple || (request.flags & kFlagDontFragment) != 0;
  stream_.request = request;
  stream_.position = request.offset;
}

void Connection::pumpStream() {
  const Request& request = stream_.request;
  const uint64_t end = request.offset + request.length;
  for (int pieces = 0; stream_.active && !stream_.waiting && !waitsForMemory_ && !broken_; pieces++) {
    if (!out_.empty()) flush();
    if (!out_.empty() || broken_) return;
    if (pieces == kStreamPieces) {
      loop_.touch(this);
      return;
    }
    const auto pieceOf = [&](uint64_t most) {
      const uint64_t length = std::min(most, end - stream_.position);
      return Part{stream_.position, length, !stream_.begun, stream_.position + length == end};
    };
    const bool plenty = loop_.memoryLeft(kStreamPiece);
    const Part part = pieceOf(plenty ? kStreamPiece : kStreamPieceSmall);
    uint8_t* at = out_.reserve(planBound(request, part.length), plenty ? kLargeChunk : kPieceChunk);
    Segments& segments = loop_.segments();
    const Plan plan = planRead(at, request, part, segments);
    IoError error;
    if (plan.broken) {
      streamFailed(plan.brokenOffset);
      continue;
    }
    switch (loop_.io().readCached(segments, &error)) {
      case MemberIo::ReadResult::Done:
        out_.commit(plan.bytes);
        streamAdvanced(part.length);
        break;
      case MemberIo::ReadResult::Failed:
        streamFailed(stream_.position);
        break;
      case MemberIo::ReadResult::WouldBlock:
        if (readLater(request, part, true)) return;
        if (inFlightBytes_ == 0) {
          const bool started = readLater(request, pieceOf(kStreamPieceSmall), true);
          NBD_ASSERT(started);
        } else {
          waitsForMemory_ = true;
        }
        return;
    }
  }
}

void Connection::streamAdvanced(uint64_t bytes) {
  stream_.begun = true;
  stream_.position += bytes;
  if (stream_.position == stream_.request.offset + stream_.request.length) endStream();
}

void Connection::streamFailed(uint64_t offset) {
  const Request request = stream_.request;
  if (!stream_.begun) {
    stream_.active = false;
    readFailed(request);
    endStream();
  } else if (mode_ == Mode::Simple) {
    // The header promised data: "the server MUST immediately initiate a hard disconnect".
    counters().errors.add(1);
    stream_.active = false;
    cut(SessionEnd::Error);
  } else if (stream_.raw) {
    // The chunk is completed with zeros; the error follows it.
    NBD_ASSERT(!stream_.failed);
    stream_.failed = true;
    stream_.failedOffset = offset;
  } else {
    stream_.failed = true;
    stream_.failedOffset = offset;
    endStream();
  }
}

void Connection::endStream() {
  const Request request = stream_.request;
  uint8_t* at = out_.reserve(kStatusReplyMax);
  uint8_t* p = at;
  if (stream_.failed) {
    counters().errors.add(1);
    p = putChunkHeader(p, mode_, kReplyFlagDone, kReplyErrorOffset, request.cookie, request.offset, 6 + 8);
    p = put32(p, kEio);
    p = put16(p, 0);
    p = put64(p, stream_.failedOffset);
  } else if (stream_.begun && stream_.raw && mode_ != Mode::Simple) {
    p = putChunkHeader(p, mode_, kReplyFlagDone, kReplyNone, request.cookie, request.offset, 0);
  }
  out_.commit(static_cast<size_t>(p - at));
  stream_.active = false;
  stream_.failed = false;  // else planRaw would fill later reads instead of reading them
  out_.splice(held_);
}

}  // namespace nbd

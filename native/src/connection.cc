#include "connection.h"

#include <errno.h>
#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "assert.h"
#include "lane.h"
#include "loop.h"

namespace nbd {

namespace {

constexpr uint64_t kTurnBytes = 1 << 20;        // received in one turn, before others have theirs
constexpr size_t kSendEarly = 192 * 1024;       // replies are sent in the middle of a batch past this
constexpr size_t kOutHigh = 1 << 20;            // and no more requests are executed past this
constexpr uint64_t kLingerMicroseconds = 2'000'000;
constexpr int32_t kSpinAfter = 4;               // requests that came alone, before polling begins
constexpr int32_t kSpinPenaltyMax = 256;
constexpr int32_t kDeepQueue = -256;            // several requests at once: no polling for so many turns
constexpr int kSendParts = 16;
constexpr uint64_t kSocketOverhead = 1024;      // what the kernel counts for a reply in a socket, beside its bytes
constexpr uint64_t kGapMax = 1000;              // microseconds

}  // namespace

Connection::Connection(Loop& loop, Export& target, SessionOptions options)
    : target_(target),
      loop_(loop),
      fd_(options.fd),
      id_(options.id),
      parser_(options.rules),
      mode_(options.rules.mode),
      lane_(options.lane),
      contexts_(std::move(options.contexts)),
      received_(std::move(options.received)),
      out_(loop.chunks()),
      held_(loop.chunks()) {
  NBD_ASSERT(contexts_.size() <= 64);
  int domain = 0;
  socklen_t size = sizeof domain;
  local_ = getsockopt(fd_, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
}

Connection::~Connection() {
  NBD_ASSERT(inFlight_ == 0);
  if (fd_ >= 0) ::close(fd_);
  if (wide_) loop_.shared().wideSockets.fetch_sub(1, std::memory_order_relaxed);
  if (input_ != nullptr) loop_.chunks().give(input_);
  if (payload_ != nullptr) payload_->release();
}

void Connection::attach() {
  if (!received_.empty()) {
    input_ = loop_.chunks().take(std::max<size_t>(received_.size(), kMediumChunk));
    memcpy(input_->data(), received_.data(), received_.size());
    input_->end = static_cast<uint32_t>(received_.size());
    received_.clear();
    received_.shrink_to_fit();
  }
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | EPOLLET;
  event.data.ptr = this;  // its lowest bit is 0: see Loop::eventOf
  if (epoll_ctl(loop_.epollFd(), EPOLL_CTL_ADD, fd_, &event) != 0) cut(SessionEnd::Error);
  loop_.touch(this);
}

void Connection::onEvent(uint32_t events) {
  if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) readable_ = true;
  if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) hangupSeen_ = true;
  if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0) full_ = false;
  // Nothing is read any more while draining: a dead socket shows by its error alone.
  if ((events & (EPOLLHUP | EPOLLERR)) != 0 && state_ != State::Open) cut(reason_);
  loop_.touch(this);
}

uint32_t Connection::loopIndex() const { return loop_.index(); }

ExportCounters& Connection::counters() { return target_.counters[loop_.index()]; }

// --- turns ---------------------------------------------------------------------------------------------------------

bool Connection::blocked() const {
  const Limits& limits = loop_.shared().limits;
  return stream_.active || waitsForMemory_ || inFlight_ >= limits.requestsInFlight ||
         inFlightBytes_ >= limits.payloadPerConnection ||
         (!out_.empty() && out_.bytes() > (loop_.memoryLeft(0) ? kOutHigh : kMemoryAlways));
}

bool Connection::streamCanGoOn() const {
  return stream_.active && !stream_.waiting && !waitsForMemory_ && !broken_ && out_.empty();
}

bool Connection::stalled() const {
  if (phase_ == Phase::Header) return blocked();
  return waitsForMemory_ || phase_ == Phase::PieceWait;
}

bool Connection::work() {
  while (state_ == State::Open) {
    if (stalled()) return true;
    bool more = false;
    switch (phase_) {
      case Phase::Header:
        more = takeRequest();
        break;
      case Phase::InPlace:
        more = takeInPlace();
        break;
      case Phase::Gather:
        more = takeGather();
        break;
      case Phase::Discard:
        more = takeDiscard();
        break;
      case Phase::StatusPayload:
        more = takeStatusPayload();
        break;
      case Phase::PieceWait:
        NBD_ASSERT(false);  // is stalled
        break;
      case Phase::ReadWait:
        more = retryRead();
        break;
    }
    if (!more) return stalled();
    if (out_.bytes() >= kSendEarly) flush();
  }
  return false;
}

void Connection::turn() {
  if (state_ == State::Closed) return;
  if (!out_.empty()) flush();
  uint64_t budget = kTurnBytes;
  bool wasStalled = false;
  for (;;) {
    wasStalled = work();
    if (stream_.active) pumpStream();
    if (state_ != State::Open) break;
    if (wasStalled) {
      if (!out_.empty()) flush();
      if (state_ != State::Open || stalled()) break;
      continue;
    }
    if (!readable_) break;
    if (budget == 0) {
      loop_.touch(this);
      break;
    }
    const ssize_t got = receive();
    if (got > 0) {
      budget -= std::min(budget, static_cast<uint64_t>(got));
    } else if (got == 0) {
      end(SessionEnd::Hangup);
      break;
    } else if (errno != EAGAIN) {
      cut(SessionEnd::Hangup);
      break;
    }
  }
  flush();
  chargeReplies();
  // This flush may have made room for what stopped above: then no event says that it can go on.
  if ((state_ == State::Open && wasStalled && !stalled()) || streamCanGoOn()) loop_.touch(this);
  settleInput();
  settle();
  if (requestsInTurn_ == 1) {
    singles_ = std::min(singles_ + 1, kSpinPenaltyMax + kSpinAfter);
  } else if (requestsInTurn_ > 1) {
    singles_ = kDeepQueue;
  }
  requestsSince_ += requestsInTurn_;
  requestsInTurn_ = 0;
}

uint64_t Connection::backlog(uint64_t now) {
  // Only of a local socket is it known what the client has read: of TCP, what it has acknowledged.
  if (!local_ || state_ != State::Open || requestsSince_ == 0) return 0;
  // While it has replies to take, its next requests come as fast as it takes them.
  const uint64_t gap = (now - backlogFrom_) / requestsSince_;
  const uint64_t replySize = replyBytesSince_ / requestsSince_ + kSocketOverhead;
  backlogFrom_ = now;
  requestsSince_ = 0;
  replyBytesSince_ = 0;
  gap_ = (7 * gap_ + std::min(gap, kGapMax)) / 8;
  int unread = 0;
  if (ioctl(fd_, SIOCOUTQ, &unread) != 0) return 0;
  return static_cast<uint64_t>(unread) / replySize * gap_;
}

bool Connection::spinnable() const {
  return singles_ >= kSpinAfter + spinPenalty_ && state_ == State::Open && phase_ == Phase::Header &&
         inFlight_ == 0 && out_.empty() && input_ == nullptr && !readable_;
}

void Connection::spinEnded(bool successful) {
  if (successful) {
    spinPenalty_ = 0;
    return;
  }
  // The pause was longer than polling is worth: each failure makes the next attempt wait for a longer pattern.
  spinPenalty_ = std::min(spinPenalty_ * 2 + 4, kSpinPenaltyMax);
  singles_ = 0;
  settleInput();
}

bool Connection::poll() {
  readable_ = true;
  const ssize_t got = receive();
  if (got < 0 && errno == EAGAIN) return false;
  if (got <= 0) {
    readable_ = true;  // let the turn see the end
    hangupSeen_ = true;
  }
  return true;
}

// --- input ---------------------------------------------------------------------------------------------------------

ssize_t Connection::receive() {
  ChunkPool& pool = loop_.chunks();
  if (input_ == nullptr) {
    input_ = pool.take(kMediumChunk);
  } else if (input_->size() == 0) {
    input_->clear();
  } else if (input_->capacity < kMediumChunk) {
    Chunk* larger = pool.take(kMediumChunk);
    memcpy(larger->data(), input_->begin(), input_->size());
    larger->end = input_->size();
    pool.give(input_);
    input_ = larger;
  } else if (input_->room() < input_->capacity / 2) {
    input_->compact();
  }
  iovec parts[2];
  int partCount = 0;
  size_t wanted = 0;
  if (phase_ == Phase::Gather && input_->size() == 0) {
    // The rest of a payload lands where it stays.
    parts[partCount++] = {payload_->data() + gathered_, payload_->size - gathered_};
    wanted += payload_->size - gathered_;
  }
  parts[partCount++] = {input_->data() + input_->end, input_->room()};
  wanted += input_->room();
  ssize_t got;
  do {
    if (partCount == 1) {
      got = recv(fd_, parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT);
    } else {
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = static_cast<size_t>(partCount);
      got = recvmsg(fd_, &message, MSG_DONTWAIT);
    }
  } while (got < 0 && errno == EINTR);
  if (got <= 0) {
    if (got < 0 && errno == EAGAIN) readable_ = false;
    return got;
  }
  // Less than asked for: the socket is empty, and epoll tells when it no longer is. After a hang-up there is no
  // further event, so what remains is read until the end shows.
  if (static_cast<size_t>(got) < wanted && !hangupSeen_) readable_ = false;
  size_t left = static_cast<size_t>(got);
  if (partCount == 2) {
    const size_t part = std::min<size_t>(left, payload_->size - gathered_);
    gathered_ += part;
    parser_.consumed(part);
    left -= part;
  }
  input_->end += static_cast<uint32_t>(left);
  return got;
}

void Connection::dropInput(size_t bytes) {
  NBD_ASSERT(input_ != nullptr && bytes <= input_->size());
  input_->start += static_cast<uint32_t>(bytes);
}

/// What a connection keeps between turns is as small as what it has to keep.
void Connection::settleInput() {
  if (input_ == nullptr) return;
  ChunkPool& pool = loop_.chunks();
  if (input_->size() == 0) {
    pool.give(input_);
    input_ = nullptr;
  } else if (input_->capacity > kSmallChunk && input_->size() <= kSmallChunk) {
    Chunk* smaller = pool.take(kSmallChunk);
    memcpy(smaller->data(), input_->begin(), input_->size());
    smaller->end = input_->size();
    pool.give(input_);
    input_ = smaller;
  }
}

// --- requests ------------------------------------------------------------------------------------------------------

bool Connection::takeRequest() {
  const uint8_t* at = input_ == nullptr ? nullptr : input_->begin();
  switch (parser_.next(at, inputSize(), target_.current().size)) {
    case RequestParser::Step::NeedMore:
      return false;
    case RequestParser::Step::Ended:
      end(SessionEnd::Protocol);
      return false;
    case RequestParser::Step::Request:
      break;
  }
  dropInput(parser_.headerSize());
  requestsInTurn_++;
  current_ = parser_.request();
  if (current_.command == kDisconnect) {
    end(SessionEnd::Disconnect);
  } else if (lane_ && (current_.command != kWrite || current_.flags != 0 || current_.length > kLaneBytesMax ||
                       parser_.verdict().error != kOk)) {
    // What the peer cannot have meant is taken for bits that flipped on the way.
    end(SessionEnd::Protocol);
    return false;
  } else if (parser_.verdict().error != kOk) {
    discard(parser_.verdict().error);
  } else {
    execute();
  }
  return true;
}

void Connection::execute() {
  switch (current_.command) {
    case kRead:
      executeRead(current_);
      return;
    case kWrite:
      startWrite();
      return;
    case kFlush:
      counters().flushes.add(1);
      upcall(current_, UpcallKind::Sync, 0, 0);
      return;
    case kTrim:
      counters().trims.add(1);
      upcall(current_, UpcallKind::Trim, current_.offset, current_.length);
      return;
    case kWriteZeroes:
      counters().zeroes.add(1);
      upcall(current_, UpcallKind::Zero, current_.offset, current_.length);
      return;
    case kCache:
      cache(current_);
      return;
    case kBlockStatus:
      if ((current_.flags & kFlagPayloadLength) != 0) {
        statusFilled_ = 0;
        phase_ = Phase::StatusPayload;
      } else {
        statusUpcall(current_, current_.length, ~uint64_t{0} >> (64 - contexts_.size()));
      }
      return;
    default:
      NBD_ASSERT(false);
  }
}

void Connection::discard(uint32_t error) {
  discardError_ = error;
  phase_ = Phase::Discard;
}

bool Connection::takeDiscard() {
  const size_t part = std::min<size_t>(inputSize(), parser_.payloadLeft());
  if (part > 0) {
    dropInput(part);
    parser_.consumed(part);
  }
  if (parser_.payloadLeft() > 0) return false;
  phase_ = Phase::Header;
  reply(current_, discardError_);
  return true;
}

bool Connection::takeStatusPayload() {
  const size_t part = std::min<size_t>(inputSize(), parser_.payloadLeft());
  if (part > 0) {
    NBD_ASSERT(statusFilled_ + part <= sizeof statusPayload_);
    memcpy(statusPayload_ + statusFilled_, input_->begin(), part);
    statusFilled_ += static_cast<uint32_t>(part);
    dropInput(part);
    parser_.consumed(part);
  }
  if (parser_.payloadLeft() > 0) return false;
  phase_ = Phase::Header;
  uint64_t length = 0;
  uint64_t mask = 0;
  const uint64_t size = target_.current().size;
  const bool valid = decodeStatusPayload(statusPayload_, statusFilled_, contexts_.data(),
                                         static_cast<uint32_t>(contexts_.size()), &length, &mask);
  if (!valid || length == 0 || current_.offset > size || length > size - current_.offset) {
    reply(current_, kEinval);
  } else {
    statusUpcall(current_, length, mask);
  }
  return true;
}

void Connection::statusUpcall(const Request& request, uint64_t length, uint64_t mask) {
  Upcall* call = upcall(request, UpcallKind::Status, request.offset, length);
  call->contextMask = mask;
}

void Connection::cache(const Request& request) {
  AdviseJob* job = new AdviseJob;
  job->connection = this;
  job->request = request;
  const Tables& tables = target_.current();
  // "There may be a limit on how much can be cached at once": ours is one payload.
  const uint64_t end =
      std::min({request.offset + request.length, tables.size,
                request.offset + static_cast<uint64_t>(loop_.shared().limits.payloadMax)});
  for (uint64_t at = request.offset; at < end;) {
    const uint64_t stripe = at / target_.stripeSize;
    const uint64_t within = at - stripe * target_.stripeSize;
    const uint64_t part = std::min(end - at, target_.stripeSize - within);
    const uint32_t slot = target_.slotForRead(tables, stripe);
    // Places in the export as addresses: neighbours join into one segment, and nobody looks at the memory.
    if (slot != kSlotNone && slot != kSlotBroken) {
      uint8_t* place = reinterpret_cast<uint8_t*>(kTurnBytes + at);
      mapRange(loop_.shared().layout, slot, within, place, part, job->segments);
    }
    at += part;
  }
  if (job->segments.empty()) {
    delete job;
    reply(request, kOk);
    return;
  }
  job->epoch = loop_.beginAccess();
  inFlight_++;
  loop_.advise(job);
}

void Connection::adviseFinished(AdviseJob* job) {
  inFlight_--;
  reply(job->request, kOk);
  loop_.touch(this);
}

Upcall* Connection::upcall(const Request& request, UpcallKind kind, uint64_t offset, uint64_t length) {
  Upcall* call = loop_.takeUpcall();
  call->connection = this;
  call->target = &target_;
  call->request = request;
  call->kind = kind;
  call->offset = offset;
  call->length = length;
  call->session = id_;
  call->lane = lane_;
  counters().upcalls.add(1);
  inFlight_++;
  loop_.queueUpcall(call);
  return call;
}

void Connection::complete(Upcall* call, uint32_t error) {
  inFlight_--;
  if (call->charged > 0) discharge(call->charged);
  if (call->piece) {
    pieceDone(call, error);
  } else {
    reply(call->request, error);
  }
  loop_.touch(this);
}

void Connection::completeStatus(Upcall* call, const std::vector<uint8_t>& body) {
  inFlight_--;
  if (!broken_) {
    OutQueue& out = replies();
    memcpy(out.reserve(body.size()), body.data(), body.size());
    out.commit(body.size());
  }
  loop_.touch(this);
}

void Connection::reply(const Request& request, uint32_t error) {
  if (error != kOk) counters().errors.add(1);
  if (broken_) return;
  OutQueue& out = replies();
  uint8_t* at = out.reserve(kStatusReplyMax);
  out.commit(static_cast<size_t>(putStatusReply(at, mode_, error, request.cookie, request.offset) - at));
}

// --- memory --------------------------------------------------------------------------------------------------------

/// Never fails for at most kMemoryAlways of a connection that holds nothing.
bool Connection::reserve(uint64_t bytes) {
  const bool alone = inFlightBytes_ == 0;
  if (!alone && inFlightBytes_ + bytes > loop_.shared().limits.payloadPerConnection) return false;
  if (!loop_.reserveMemory(bytes, alone)) return false;
  inFlightBytes_ += bytes;
  return true;
}

void Connection::discharge(uint64_t bytes) {
  NBD_ASSERT(bytes <= inFlightBytes_);
  inFlightBytes_ -= bytes;
  waitsForMemory_ = false;
  loop_.releaseMemory(bytes);
}

/// Replies that the client does not take count against what all may hold together.
void Connection::chargeReplies() {
  // Prepared for a read that then had to wait for the disk.
  if (out_.empty()) out_.clear();
  const uint64_t bytes = out_.memory() + held_.memory();
  if (bytes == replyBytesCharged_) return;
  if (bytes > replyBytesCharged_) {
    loop_.takeMemory(bytes - replyBytesCharged_);
  } else {
    loop_.releaseMemory(replyBytesCharged_ - bytes);
  }
  replyBytesCharged_ = bytes;
}

// --- output and end ------------------------------------------------------------------------------------------------

void Connection::flush() {
  if (broken_) {
    out_.clear();
    return;
  }
  while (!out_.empty()) {
    if (full_) {
      if (state_ != State::Open && deadline_ == 0) deadline_ = Loop::nowMicroseconds() + kLingerMicroseconds;
      wantWritable(true);
      return;
    }
    iovec parts[kSendParts];
    const int count = out_.gather(parts, kSendParts);
    ssize_t sent;
    if (count == 1) {
      sent = send(fd_, parts[0].iov_base, parts[0].iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = static_cast<size_t>(count);
      sent = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) {
        full_ = true;  // until an event says otherwise
        continue;
      }
      cut(SessionEnd::Hangup);
      return;
    }
    deadline_ = 0;  // it moves
    size_t wanted = 0;
    for (int i = 0; i < count; i++) wanted += parts[i].iov_len;
    full_ = static_cast<size_t>(sent) < wanted;  // and an event comes when it takes more
    out_.drop(static_cast<size_t>(sent));
    replyBytesSince_ += static_cast<size_t>(sent);
  }
  wantWritable(false);
}

void Connection::wantWritable(bool wanted) {
  if (writableWanted_ == wanted || fd_ < 0) return;
  writableWanted_ = wanted;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | EPOLLET | (wanted ? static_cast<uint32_t>(EPOLLOUT) : 0);
  event.data.ptr = this;
  NBD_ASSERT(epoll_ctl(loop_.epollFd(), EPOLL_CTL_MOD, fd_, &event) == 0);
}

void Connection::enter(State next) {
  static constexpr bool kMoves[4][4] = {
      // to    Open   Draining Flushing Closed
      /* Open     */ {false, true, false, false},
      /* Draining */ {false, false, true, false},
      /* Flushing */ {false, false, false, true},
      /* Closed   */ {false, false, false, false},
  };
  NBD_ASSERT(kMoves[static_cast<int>(state_)][static_cast<int>(next)]);
  state_ = next;
}

void Connection::end(SessionEnd reason) {
  if (state_ != State::Open) return;
  reason_ = reason;
  enter(State::Draining);
  if (phase_ == Phase::ReadWait) {
    // It was read off the socket, so it is answered.
    phase_ = Phase::Header;
    reply(current_, kEshutdown);
  }
  if (payload_ != nullptr) {
    // Half of a payload is no request yet.
    discharge(payload_->size);
    payload_->release();
    payload_ = nullptr;
  }
  waitsForMemory_ = false;
  loop_.linger(this);
  loop_.touch(this);
}

void Connection::cut(SessionEnd reason) {
  if (state_ == State::Closed) return;
  broken_ = true;
  end(reason);
  out_.clear();
  held_.clear();
  if (stream_.active && !stream_.waiting) stream_.active = false;
  loop_.touch(this);
}

void Connection::abandon() {
  inFlight_ = 0;
  out_.clear();
  held_.clear();
  chargeReplies();
}

void Connection::settle() {
  if (state_ == State::Draining && inFlight_ == 0 && !stream_.active) {
    out_.splice(held_);
    flush();
    enter(State::Flushing);
  }
  if (state_ != State::Flushing || !(out_.empty() || broken_)) return;
  enter(State::Closed);
  out_.clear();
  held_.clear();
  chargeReplies();
  epoll_ctl(loop_.epollFd(), EPOLL_CTL_DEL, fd_, nullptr);
  ::close(fd_);
  fd_ = -1;
  Event event{};
  event.kind = EventKind::SessionEnd;
  event.tag = id_;
  event.value = static_cast<double>(reason_);
  event.target = &target_;
  loop_.queueEvent(event);
  loop_.bury(this);
}

}  // namespace nbd

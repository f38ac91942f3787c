#include "lane.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "assert.h"
#include "connection.h"
#include "loop.h"

namespace nbd {

namespace {

constexpr int kSendParts = 64;  // two an operation

}  // namespace

Lane::Lane(Loop& loop, Export& target, int fd, uint32_t id) : loop_(loop), target_(target), fd_(fd), id_(id) {}

Lane::~Lane() {
  NBD_ASSERT(inFlight_ == 0 && fences_.empty());
  // Whoever gave the socket may still have it: closing it here is then not enough for epoll to forget this lane.
  epoll_ctl(loop_.epollFd(), EPOLL_CTL_DEL, fd_, nullptr);
  ::close(fd_);
}

bool Lane::attach() {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP;
  event.data.u64 = loop_.eventOf(this);
  return epoll_ctl(loop_.epollFd(), EPOLL_CTL_ADD, fd_, &event) == 0;
}

void Lane::wantWritable(bool wanted) {
  if (writableWanted_ == wanted) return;
  writableWanted_ = wanted;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | (wanted ? static_cast<uint32_t>(EPOLLOUT) : 0);
  event.data.u64 = loop_.eventOf(this);
  NBD_ASSERT(epoll_ctl(loop_.epollFd(), EPOLL_CTL_MOD, fd_, &event) == 0);
}

// --- to the peer ---------------------------------------------------------------------------------------------------

void Lane::begin(Upcall* call) {
  NBD_ASSERT(!full() && call->length <= kLaneBytesMax);
  uint16_t place;
  if (free_.empty()) {
    place = static_cast<uint16_t>(ops_.size());
    ops_.emplace_back();
  } else {
    place = free_.back();
    free_.pop_back();
  }
  Op& op = ops_[place];
  const uint32_t low = uint32_t{++serial_} << 16 | place;
  const uint32_t sum = laneChecksum(0, low, call->offset, call->length, call->payload->data());
  op.call = call;
  op.epoch = epochFirst_ + epochs_.size() - 1;
  epochs_.back()++;
  op.sentAt = 0;
  op.cookie = uint64_t{sum} << 32 | low;
  uint8_t* at = put32(op.header, kRequestMagic);
  at = put16(at, 0);
  at = put16(at, kWrite);
  at = put64(at, op.cookie);
  at = put64(at, call->offset);
  put32(at, static_cast<uint32_t>(call->length));
  inFlight_++;
  loop_.countLaneOps(1);
  if (toSendAt_ == toSend_.size()) movedAt_ = Loop::nowMicroseconds();
  if (toSendAt_ >= kOpsMax) {
    // Where the peer is always behind, the list is never empty.
    toSend_.erase(toSend_.begin(), toSend_.begin() + static_cast<ptrdiff_t>(toSendAt_));
    toSendAt_ = 0;
  }
  toSend_.push_back(place);
  loop_.queueLane(this);
}

bool Lane::flush() {
  while (toSendAt_ < toSend_.size()) {
    iovec parts[kSendParts];
    int count = 0;
    uint64_t skip = sentBytes_;
    for (size_t i = toSendAt_; i < toSend_.size() && count + 2 <= kSendParts; i++) {
      Op& op = ops_[toSend_[i]];
      uint8_t* const payload = op.call->payload->data();
      if (skip < kRequestSize) {
        parts[count++] = {op.header + skip, kRequestSize - skip};
        parts[count++] = {payload, op.call->length};
      } else {
        const uint64_t within = skip - kRequestSize;
        parts[count++] = {payload + within, op.call->length - within};
      }
      skip = 0;
    }
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t sent = sendmsg(fd_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN) return false;
      wantWritable(true);
      return true;
    }
    movedAt_ = Loop::nowMicroseconds();
    sentBytes_ += static_cast<uint64_t>(sent);
    while (toSendAt_ < toSend_.size()) {
      Op& op = ops_[toSend_[toSendAt_]];
      const uint64_t whole = kRequestSize + op.call->length;
      if (sentBytes_ < whole) break;
      sentBytes_ -= whole;
      op.sentAt = movedAt_;
      toSendAt_++;
    }
  }
  toSend_.clear();
  toSendAt_ = 0;
  wantWritable(false);
  return true;
}

/// One answer that never comes holds up a client, and every barrier of the export: that others come does not make up for it.
uint64_t Lane::stalledSince() const {
  if (inFlight_ == 0) return 0;
  uint64_t since = toSendAt_ < toSend_.size() ? movedAt_ : ~uint64_t{0};
  for (const Op& op : ops_) {
    if (op.call != nullptr && op.sentAt != 0) since = std::min(since, op.sentAt);
  }
  return since;
}

// --- from the peer -------------------------------------------------------------------------------------------------

bool Lane::onEvent(uint32_t events) {
  if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0 && !receive()) return false;
  return (events & EPOLLOUT) == 0 || flush();
}

/// False where the peer is gone, or says what it cannot say.
bool Lane::receive() {
  for (;;) {
    const ssize_t got = recv(fd_, input_ + inputSize_, sizeof input_ - inputSize_, MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN;
    }
    if (got == 0) return false;
    inputSize_ += static_cast<size_t>(got);
    const bool drained = inputSize_ < sizeof input_;
    size_t at = 0;
    for (; inputSize_ - at >= kSimpleReplySize; at += kSimpleReplySize) {
      const uint8_t* reply = input_ + at;
      if (load32(reply) != kSimpleReplyMagic || !settle(load32(reply + 4), load64(reply + 8))) return false;
    }
    memmove(input_, input_ + at, inputSize_ - at);
    inputSize_ -= at;
    if (drained) return true;
  }
}

bool Lane::settle(uint32_t error, uint64_t cookie) {
  const size_t place = cookie & 0xffff;
  if (place >= ops_.size()) return false;
  Op& op = ops_[place];
  if (op.call == nullptr || op.cookie != cookie || op.sentAt == 0) return false;
  Upcall* const call = op.call;
  release(op);
  if (error == kOk) {
    target_.claims->leave(call->offset, call->length);
    call->connection->complete(call, kOk);
    loop_.giveUpcall(call);
  } else {
    giveUp(call);
  }
  return true;
}

void Lane::release(Op& op) {
  target_.claims->give(op.call->offset, op.call->length);
  NBD_ASSERT(op.epoch >= epochFirst_ && epochs_[op.epoch - epochFirst_] > 0);
  epochs_[op.epoch - epochFirst_]--;
  op.call = nullptr;
  free_.push_back(static_cast<uint16_t>(&op - ops_.data()));
  inFlight_--;
  loop_.countLaneOps(-1);
  if (!fences_.empty()) settleFences();
}

void Lane::fence(Barrier* barrier) {
  if (inFlight_ == 0) return;
  // Whoever asks has not passed it yet, so it is still there.
  barrier->remaining.fetch_add(1, std::memory_order_relaxed);
  fences_.push_back({epochFirst_ + epochs_.size() - 1, barrier});
  epochs_.push_back(0);
}

void Lane::settleFences() {
  while (epochs_.size() > 1 && epochs_.front() == 0) {
    epochs_.pop_front();
    epochFirst_++;
  }
  while (!fences_.empty() && fences_.front().epoch < epochFirst_) {
    loop_.passLater(fences_.front().barrier);
    fences_.pop_front();
  }
}

// --- end -----------------------------------------------------------------------------------------------------------

void Lane::end() {
  Event event{};
  event.kind = EventKind::LaneEnd;
  event.tag = id_;
  event.target = &target_;
  loop_.queueEvent(event);
  for (Op& op : ops_) {
    if (op.call == nullptr) continue;
    Upcall* const call = op.call;
    release(op);
    giveUp(call);
  }
}

/// It counts (Claims) until the policy, which sees it later than this, has answered it.
void Lane::giveUp(Upcall* call) {
  call->half = true;
  call->counted = true;
  loop_.queueUpcall(call);
}

void Lane::abandon() {
  for (Op& op : ops_) {
    if (op.call == nullptr) continue;
    Upcall* const call = op.call;
    release(op);
    loop_.giveUpcall(call);
  }
}

}  // namespace nbd

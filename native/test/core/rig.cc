#include "rig.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <future>

namespace nbd::test {
namespace {

std::atomic<bool> slowReads{false};
std::mutex heldMutex;
std::condition_variable heldChanged;
size_t heldSize = 0;  // under heldMutex

void beforeRead(size_t size) {
  static thread_local Random random(reinterpret_cast<uintptr_t>(&random));
  if (slowReads.load(std::memory_order_relaxed) && random.chance(10)) {
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(5000)));
  }
  std::unique_lock<std::mutex> lock(heldMutex);
  heldChanged.wait(lock, [size] { return heldSize == 0 || heldSize != size; });
}

}  // namespace

void holdReads(size_t size) {
  std::lock_guard<std::mutex> lock(heldMutex);
  heldSize = size;
  heldChanged.notify_all();
}

}  // namespace nbd::test

ssize_t slowPread(int fd, void* data, size_t size, off_t offset) {
  nbd::test::beforeRead(size);
  return pread(fd, data, size, offset);
}

ssize_t slowPreadv(int fd, const iovec* parts, int count, off_t offset) {
  size_t size = 0;
  for (int i = 0; i < count; i++) size += parts[i].iov_len;
  nbd::test::beforeRead(size);
  return preadv(fd, parts, count, offset);
}

namespace nbd::test {

Rig::Rig(const RigOptions& options)
    : options(options), stripeSize(options.members * options.chunkSize), random_(options.shuffled) {
  slowReads = options.slowReads;
  const uint64_t stripes = (options.size + stripeSize - 1) / stripeSize;
  slots.resize(stripes);
  init.resize(stripes / 32 + 1);
  direct.resize(stripes / 32 + 1);
  Layout layout;
  for (uint32_t i = 0; i < options.members; i++) {
    char name[] = "/tmp/fullstripe-member-XXXXXX";
    const int fd = mkstemp(name);
    CHECK(fd >= 0);
    unlink(name);
    members_.push_back(fd);
    Member member;
    member.fd = fd;
    layout.members.push_back(member);
  }
  layout.dataMembers = options.members;
  layout.chunkSize = options.chunkSize;
  layout.dataOffset = 64 * 1024;
  Limits limits;
  limits.payloadMax = options.payloadMax;
  limits.requestsInFlight = 64;
  limits.payloadPerConnection = options.payloadPerConnection;
  limits.payloadTotal = options.payloadTotal;
  limits.replyBytesQueued = 4 << 20;
  limits.statusExtentsMax = 64;
  auto wake = [](void* context) {
    Rig* rig = static_cast<Rig*>(context);
    std::lock_guard<std::mutex> lock(rig->mutex_);
    rig->woken_ = true;
    rig->policyWake_.notify_one();
  };
  std::string reason;
  datapath_ = Datapath::open(std::move(layout), limits, options.threads, options.engine, wake, this, &reason);
  if (datapath_ == nullptr) {
    for (const int fd : members_) ::close(fd);
    throw Skip{reason};
  }
  if (options.uncached) {
    // As on a file system that does not tell cached from uncached data. No session looks at this yet.
    for (Member& member : const_cast<Layout&>(datapath_->layout()).members) member.nowait = member.inMemory = false;
  }
  Tables tables;
  tables.size = options.size;
  tables.slots = slots.data();
  tables.init = init.data();
  tables.direct = direct.data();
  datapath_->openExport(kExport, stripeSize, options.formatUnit, options.fill, tables);
  thread_ = std::thread([this] { policy(); });
}

Rig::~Rig() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    policyWake_.notify_one();
  }
  thread_.join();
  datapath_.reset();
  for (const int fd : members_) ::close(fd);
}

// --- the policy's thread -------------------------------------------------------------------------------------------

void Rig::policy() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopping_) {
    if (!calls_.empty()) {
      const std::function<void()> body = std::move(calls_.front());
      calls_.pop_front();
      lock.unlock();
      body();
      lock.lock();
    } else if (woken_) {
      woken_ = false;
      lock.unlock();
      drain();
      lock.lock();
    } else if (!held_ && !queue_.empty()) {
      const Call call = next();
      waiting_ = queue_.size();
      lock.unlock();
      handle(call);
      sendAnswers(8);
      lock.lock();
    } else if (!answers_.empty()) {
      lock.unlock();
      sendAnswers(0);
      lock.lock();
    } else {
      policyWake_.wait(lock);
    }
  }
}

void Rig::drain() {
  double records[16 * kRecordWords];
  size_t count;
  do {
    count = datapath_->drain(records, 16);
    std::lock_guard<std::mutex> lock(mutex_);
    for (const double* r = records; r < records + count * kRecordWords; r += kRecordWords) {
      switch (static_cast<EventKind>(r[0])) {
        case EventKind::Upcall:
          queue_.push_back({static_cast<uint32_t>(r[1]), static_cast<uint32_t>(r[3]), static_cast<uint32_t>(r[4]),
                            static_cast<uint64_t>(r[5]), static_cast<uint64_t>(r[6]),
                            static_cast<uint64_t>(r[8]) | static_cast<uint64_t>(r[9]) << 32});
          break;
        case EventKind::Done:
          done_[r[1]] = static_cast<int>(r[3]);
          break;
        case EventKind::SessionEnd:
          ended_[static_cast<uint32_t>(r[1])] = static_cast<int>(r[2]);
          break;
        case EventKind::LaneEnd:  // lanes have a rig of their own (lane_test.cc)
          break;
      }
    }
    waiting_ = queue_.size();
    changed_.notify_all();
  } while (count == 16);
}

/// Policy's thread: takes events in until the command has been done. False where it failed or all ends.
bool Rig::await(double tag) {
  for (;;) {
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    const auto found = done_.find(tag);
    if (found != done_.end()) {
      const bool good = found->second == 0;
      done_.erase(found);
      return good;
    }
    policyWake_.wait(lock, [this] { return woken_ || stopping_; });
    if (stopping_) return false;
    woken_ = false;
  }
}

void Rig::setBit(std::vector<uint32_t>& bits, uint64_t index, bool value) {
  const uint32_t bit = 1u << (index & 31);
  if (value) {
    __atomic_fetch_or(&bits[index >> 5], bit, __ATOMIC_SEQ_CST);
  } else {
    __atomic_fetch_and(&bits[index >> 5], ~bit, __ATOMIC_SEQ_CST);
  }
}

void Rig::handle(const Call& call) {
  uint32_t error = kOk;
  switch (static_cast<UpcallKind>(call.kind)) {
    case UpcallKind::Write:
    case UpcallKind::Zero:
      if (!fill(call)) error = kEio;
      break;
    case UpcallKind::Trim:
      trim(call);
      break;
    case UpcallKind::Sync:
      break;
    case UpcallKind::Status: {
      std::vector<double> words;
      for (uint32_t i = 0; i < 2; i++) {
        if (((call.mask >> i) & 1) == 0) continue;
        words.insert(words.end(), {100.0 + i, 2, 4096, 3, static_cast<double>(call.length), 0});
      }
      datapath_->completeStatus(call.index, words.data(), words.size());
      return;
    }
  }
  if ((call.flags & kFlagFua) != 0 || call.kind == static_cast<uint32_t>(UpcallKind::Sync)) {
    const double tag = submit({4, 0});
    if (!await(tag)) error = kEio;
  }
  answer(call, error);
}

Rig::Call Rig::next() {
  const size_t at = options.shuffled == 0 ? 0 : random_.below(queue_.size());
  const Call call = queue_[at];
  queue_.erase(queue_.begin() + static_cast<long>(at));
  return call;
}

void Rig::answer(const Call& call, uint32_t error) {
  answers_.emplace_back(call.index, error);
  if (options.shuffled == 0) sendAnswers(0);
}

/// Sends answers, in any order, until at most so many are left.
void Rig::sendAnswers(size_t most) {
  std::vector<double> words;
  while (answers_.size() > most) {
    std::swap(answers_[random_.below(answers_.size())], answers_.back());
    words.insert(words.end(), {1, static_cast<double>(answers_.back().first), static_cast<double>(answers_.back().second)});
    answers_.pop_back();
  }
  if (!words.empty()) datapath_->submit(words.data(), words.size());
}

bool Rig::fill(const Call& call) {
  const uint64_t stripes = slots.size();
  std::vector<double> tags;
  const uint64_t unitSize = options.formatUnit * stripeSize;
  for (uint64_t unit = call.offset / unitSize; unit * unitSize < call.offset + call.length; unit++) {
    const uint64_t first = unit * options.formatUnit;
    const uint64_t last = std::min(stripes, first + options.formatUnit);
    if (((init[unit >> 5] >> (unit & 31)) & 1) != 0) {
      for (uint64_t stripe = first; stripe < last; stripe++) {
        tags.push_back(submit({3, 0, static_cast<double>(call.index), static_cast<double>(stripe),
                               static_cast<double>(slots[stripe])}));
      }
      continue;
    }
    std::vector<double> words{2, 0, kExport, static_cast<double>(first), static_cast<double>(last - first)};
    std::vector<uint32_t> taken;
    for (uint64_t stripe = first; stripe < last; stripe++) {
      taken.push_back(takeSlot());
      words.push_back(taken.back());
    }
    words.insert(words.end(), {0, 1, static_cast<double>(call.index)});
    if (!await(submit(words))) return false;
    for (uint64_t stripe = first; stripe < last; stripe++) {
      __atomic_store_n(&slots[stripe], taken[stripe - first], __ATOMIC_SEQ_CST);
    }
    setBit(init, unit, true);
    for (uint64_t stripe = first; stripe < last; stripe++) setBit(direct, stripe, true);
  }
  bool good = true;
  for (const double tag : tags) good = await(tag) && good;
  return good;
}

/// Gives back the format units that lie wholly in the range.
void Rig::trim(const Call& call) {
  const uint64_t unitSize = options.formatUnit * stripeSize;
  const uint64_t from = (call.offset + unitSize - 1) / unitSize;
  const uint64_t to = (call.offset + call.length) / unitSize;
  if (from >= to) return;
  const uint64_t first = from * options.formatUnit;
  const uint64_t last = to * options.formatUnit;
  for (uint64_t stripe = first; stripe < last; stripe++) setBit(direct, stripe, false);
  if (!await(submit({6, 0, 0}))) return;
  for (uint64_t unit = from; unit < to; unit++) setBit(init, unit, false);
  if (!await(submit({6, 0, 0}))) return;
  for (uint64_t stripe = first; stripe < last; stripe++) {
    const uint32_t slot = slots[stripe];
    __atomic_store_n(&slots[stripe], kSlotNone, __ATOMIC_SEQ_CST);
    if (slot == kSlotNone) continue;
    if (!await(submit({5, 0, static_cast<double>(slot), 1}))) return;
    freeSlots_.push_back(slot);
  }
}

uint32_t Rig::takeSlot() {
  if (freeSlots_.empty()) return nextSlot_++;
  const uint32_t slot = freeSlots_.back();
  freeSlots_.pop_back();
  return slot;
}

// --- from tests ----------------------------------------------------------------------------------------------------

void Rig::call(const std::function<void(Datapath&)>& body) {
  if (std::this_thread::get_id() == thread_.get_id()) {
    body(*datapath_);
    return;
  }
  std::promise<void> over;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_.push_back([&] {
      body(*datapath_);
      over.set_value();
    });
    policyWake_.notify_one();
  }
  over.get_future().wait();
}

double Rig::submit(std::vector<double> words) {
  double tag = 0;
  call([&](Datapath& datapath) {
    tag = ++tag_;
    words[1] = tag;
    datapath.submit(words.data(), words.size());
  });
  return tag;
}

bool Rig::done(double tag, int seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  // The time of day: sanitizers know that wait, and not every one of them knows the one on a steady clock.
  return changed_.wait_until(lock, std::chrono::system_clock::now() + std::chrono::seconds(seconds),
                             [&] { return done_.count(tag) != 0; });
}

int Rig::result(double tag) {
  CHECK(done(tag));
  std::lock_guard<std::mutex> lock(mutex_);
  const int error = done_.at(tag);
  done_.erase(tag);
  return error;
}

double Rig::readRange(uint64_t offset, Bytes& into) {
  double tag = 0;
  call([&](Datapath& datapath) {
    tag = ++tag_;
    datapath.readRange(tag, kExport, offset, into.data(), into.size());
  });
  return tag;
}

int Rig::endOf(uint32_t session) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ended_.find(session);
  return found == ended_.end() ? -1 : found->second;
}

size_t Rig::endCount() {
  std::lock_guard<std::mutex> lock(mutex_);
  return ended_.size();
}

void Rig::hold(bool held) {
  std::lock_guard<std::mutex> lock(mutex_);
  held_ = held;
  policyWake_.notify_one();
}

size_t Rig::upcallsWaiting() {
  std::lock_guard<std::mutex> lock(mutex_);
  return waiting_;
}

Bytes Rig::readSlot(uint32_t slot) {
  Bytes data(stripeSize);
  double tag = 0;
  call([&](Datapath& datapath) {
    tag = ++tag_;
    datapath.slotIo(tag, false, slot, 0, data.data(), data.size());
  });
  CHECK(done(tag));
  return data;
}

std::unique_ptr<Client> Rig::connect(Mode mode, bool readOnly) {
  int pair[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  const timeval limit{20, 0};
  setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  SessionOptions session;
  session.fd = pair[1];
  session.id = ++session_;
  session.rules.mode = mode;
  session.rules.readOnly = readOnly;
  session.rules.payloadMax = options.payloadMax;
  if (mode != Mode::Simple) {
    session.contexts = {100, 101};
    session.rules.contexts = true;
    session.rules.contextCount = 2;
  }
  auto client = std::make_unique<Client>(pair[0], session.id, mode);
  call([&](Datapath& datapath) { datapath.serve(kExport, std::move(session)); });
  return client;
}

// --- clients -------------------------------------------------------------------------------------------------------

void Client::close() {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

void Client::sendBytes(const void* data, size_t size) {
  const char* at = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t sent = ::send(fd, at, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    CHECK(sent > 0);
    at += sent;
    size -= static_cast<size_t>(sent);
  }
}

bool Client::take(void* into, size_t size) {
  char* at = static_cast<char*>(into);
  while (size > 0) {
    const ssize_t got = recv(fd, at, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0 || (got < 0 && errno == ECONNRESET)) return false;
    CHECK(got > 0);
    at += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

Bytes Client::header(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, uint64_t cookie) const {
  Bytes bytes(requestSize(mode));
  uint8_t* p = put32(bytes.data(), mode == Mode::Extended ? kExtendedRequestMagic : kRequestMagic);
  p = put16(p, flags);
  p = put16(p, command);
  p = put64(p, cookie);
  p = put64(p, offset);
  if (mode == Mode::Extended) {
    put64(p, length);
  } else {
    put32(p, static_cast<uint32_t>(length));
  }
  return bytes;
}

uint64_t Client::send(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, const Bytes& payload) {
  const uint64_t cookie = ++cookie_;
  if (mode == Mode::Extended && !payload.empty()) flags |= kFlagPayloadLength;
  Bytes bytes = header(command, flags, offset, length, cookie);
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  Pending pending{command, offset, {}, 0, length};
  pending.reply.cookie = cookie;
  if (command == kRead) pending.reply.data.resize(length);
  pending_[cookie] = std::move(pending);
  sendBytes(bytes.data(), bytes.size());
  return cookie;
}

Client::Reply Client::receive() {
  for (;;) {
    uint8_t head[kExtendedReplySize];
    const size_t size = mode == Mode::Simple ? kSimpleReplySize : chunkHeaderSize(mode);
    if (!take(head, size)) {
      Reply reply;
      reply.ended = true;
      return reply;
    }
    const auto found = pending_.find(load64(head + 8));
    CHECK(found != pending_.end());
    Pending& pending = found->second;
    bool last = true;
    if (mode == Mode::Simple) {
      CHECK_EQUAL(load32(head), kSimpleReplyMagic);
      pending.reply.error = load32(head + 4);
      if (pending.reply.error == 0 && pending.command == kRead) {
        CHECK(take(pending.reply.data.data(), pending.length));
        pending.covered = pending.length;
      }
    } else {
      const bool extended = mode == Mode::Extended;
      CHECK_EQUAL(load32(head), extended ? kExtendedReplyMagic : kStructuredReplyMagic);
      if (extended) CHECK_EQUAL(load64(head + 16), pending.offset);
      last = (load16(head + 4) & kReplyFlagDone) != 0;
      const uint16_t type = load16(head + 6);
      const uint64_t length = extended ? load64(head + 24) : load32(head + 16);
      CHECK(length <= (64u << 20));
      Bytes body(length);
      CHECK(take(body.data(), length));
      pending.reply.chunks++;
      if (type == kReplyOffsetData || type == kReplyOffsetHole) {
        const uint64_t at = load64(body.data()) - pending.offset;
        const uint64_t part = type == kReplyOffsetData ? length - 8 : load32(body.data() + 8);
        CHECK(pending.command == kRead && at <= pending.length && part > 0 && part <= pending.length - at);
        if (type == kReplyOffsetData) std::copy(body.begin() + 8, body.end(), pending.reply.data.begin() + static_cast<long>(at));
        pending.covered += part;
      } else if (type == kReplyError || type == kReplyErrorOffset) {
        pending.reply.error = load32(body.data());
      } else if (type == kReplyBlockStatus || type == kReplyBlockStatusExtended) {
        pending.reply.data = std::move(body);
      } else {
        CHECK_EQUAL(type, uint16_t{kReplyNone});
      }
    }
    if (!last) continue;
    if (pending.command == kRead && pending.reply.error == 0) CHECK_EQUAL(pending.covered, pending.length);
    Reply reply = std::move(pending.reply);
    pending_.erase(found);
    return reply;
  }
}

Client::Reply Client::exchange(uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, const Bytes& payload) {
  const uint64_t cookie = send(command, flags, offset, length, payload);
  Reply reply = receive();
  CHECK(!reply.ended);
  CHECK_EQUAL(reply.cookie, cookie);
  return reply;
}

Bytes Client::read(uint64_t offset, uint64_t length, uint16_t flags) {
  Reply reply = exchange(kRead, flags, offset, length);
  CHECK_EQUAL(reply.error, uint32_t{kOk});
  return std::move(reply.data);
}

uint32_t Client::write(uint64_t offset, const Bytes& data, uint16_t flags) {
  return exchange(kWrite, flags, offset, data.size(), data).error;
}

// --- descriptors ---------------------------------------------------------------------------------------------------

size_t openDescriptors() {
  size_t count = 0;
  DIR* directory = opendir("/proc/self/fd");
  while (readdir(directory) != nullptr) count++;
  closedir(directory);
  return count;
}

bool hasDescriptor(const char* part) {
  bool found = false;
  DIR* directory = opendir("/proc/self/fd");
  while (const dirent* entry = readdir(directory)) {
    char target[256];
    const ssize_t length = readlink((std::string("/proc/self/fd/") + entry->d_name).c_str(), target, sizeof target - 1);
    if (length <= 0) continue;
    target[length] = 0;
    found = found || strstr(target, part) != nullptr;
  }
  closedir(directory);
  return found;
}

}  // namespace nbd::test

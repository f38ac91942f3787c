#include "rig.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "harness.h"

using namespace nbd;

namespace test {

namespace {

constexpr int kDeadlineMilliseconds = 30'000;
constexpr auto kDeadline = std::chrono::seconds(30);

}  // namespace

// --- client --------------------------------------------------------------------------------------------------------

void Client::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

bool Client::sendBytes(const void* data, size_t length) {
  const uint8_t* at = static_cast<const uint8_t*>(data);
  while (length > 0) {
    pollfd wait{fd_, POLLOUT, 0};
    if (::poll(&wait, 1, kDeadlineMilliseconds) <= 0) {
      failed(__FILE__, __LINE__, "nothing can be sent");
      return false;
    }
    const ssize_t sent = ::send(fd_, at, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      return false;
    }
    at += sent;
    length -= static_cast<size_t>(sent);
  }
  return true;
}

bool Client::receiveBytes(void* data, size_t length) {
  uint8_t* at = static_cast<uint8_t*>(data);
  while (length > 0) {
    pollfd wait{fd_, POLLIN, 0};
    if (::poll(&wait, 1, kDeadlineMilliseconds) <= 0) {
      failed(__FILE__, __LINE__, "nothing comes back");
      return false;
    }
    const ssize_t got = recv(fd_, at, length, MSG_DONTWAIT);
    if (got == 0) return false;
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      return false;
    }
    at += got;
    length -= static_cast<size_t>(got);
  }
  return true;
}

uint64_t Client::send(uint16_t command, uint64_t offset, uint64_t length, uint16_t flags,
                      const std::vector<uint8_t>& payload) {
  std::vector<uint8_t> bytes(requestSize(mode_));
  if (mode_ == Mode::Extended && command == kWrite) flags |= kFlagPayloadLength;
  uint8_t* at = put32(bytes.data(), mode_ == Mode::Extended ? kExtendedRequestMagic : kRequestMagic);
  at = put16(at, flags);
  at = put16(at, command);
  at = put64(at, cookie_);
  at = put64(at, offset);
  if (mode_ == Mode::Extended) {
    put64(at, length);
  } else {
    put32(at, static_cast<uint32_t>(length));
  }
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  sendBytes(bytes.data(), bytes.size());
  return cookie_++;
}

Reply Client::receive(uint64_t cookie, uint64_t length) {
  Reply reply;
  uint8_t header[kExtendedReplySize];
  if (mode_ == Mode::Simple) {
    if (!receiveBytes(header, kSimpleReplySize)) {
      reply.ended = true;
      return reply;
    }
    CHECK_EQUAL(load32(header), kSimpleReplyMagic);
    CHECK_EQUAL(load64(header + 8), cookie);
    reply.error = load32(header + 4);
    if (reply.error == 0 && length > 0) {
      reply.data.resize(length);
      if (!receiveBytes(reply.data.data(), length)) reply.ended = true;
    }
    return reply;
  }
  const size_t headerSize = chunkHeaderSize(mode_);
  reply.data.resize(length);
  uint64_t covered = 0;
  for (;;) {
    if (!receiveBytes(header, headerSize)) {
      reply.ended = true;
      return reply;
    }
    CHECK_EQUAL(load32(header), mode_ == Mode::Extended ? kExtendedReplyMagic : kStructuredReplyMagic);
    CHECK_EQUAL(load64(header + 8), cookie);
    const uint16_t flags = load16(header + 4);
    const uint16_t type = load16(header + 6);
    const uint64_t size = mode_ == Mode::Extended ? load64(header + 24) : load32(header + 16);
    if (size > (64 << 20)) {
      failed(__FILE__, __LINE__, "a chunk of absurd size");
      reply.ended = true;
      return reply;
    }
    std::vector<uint8_t> payload(size);
    if (!receiveBytes(payload.data(), size)) {
      reply.ended = true;
      return reply;
    }
    if (type == kReplyOffsetData || type == kReplyOffsetHole) {
      // The clients here read from an offset that they know: the first content chunk begins there.
      const uint64_t at = load64(payload.data());
      static thread_local uint64_t base = 0;
      if (covered == 0) base = at;
      const uint64_t part = type == kReplyOffsetData ? size - 8 : load32(payload.data() + 8);
      if (at - base + part <= length) {
        if (type == kReplyOffsetData) memcpy(reply.data.data() + (at - base), payload.data() + 8, part);
      } else {
        failed(__FILE__, __LINE__, "a chunk outside the request");
      }
      covered += part;
    } else if ((type & 0x8000) != 0) {
      reply.error = load32(payload.data());
    }
    if ((flags & kReplyFlagDone) != 0) break;
  }
  if (reply.error == 0) CHECK_EQUAL(covered, length);
  return reply;
}

Reply Client::read(uint64_t offset, uint64_t length) { return receive(send(kRead, offset, length), length); }

uint32_t Client::write(uint64_t offset, const std::vector<uint8_t>& payload, uint16_t flags) {
  const Reply reply = receive(send(kWrite, offset, payload.size(), flags, payload));
  return reply.ended ? ~0u : reply.error;
}

uint32_t Client::simple(uint16_t command, uint64_t offset, uint64_t length, uint16_t flags) {
  const Reply reply = receive(send(command, offset, length, flags));
  return reply.ended ? ~0u : reply.error;
}

// --- rig -----------------------------------------------------------------------------------------------------------

Rig::Rig(const RigOptions& options)
    : options_(options), stripeSize_(options.members * options.chunkSize), size_(options.stripes * stripeSize_) {
  Layout layout;
  layout.dataMembers = options.members;
  layout.chunkSize = options.chunkSize;
  layout.dataOffset = 8192;
  for (uint32_t i = 0; i < options.members; i++) {
    char name[] = "/tmp/node-nbd-test-XXXXXX";
    Member member;
    member.fd = mkostemp(name, O_CLOEXEC);
    unlink(name);
    fds_.push_back(member.fd);
    layout.members.push_back(member);
  }
  Limits limits;
  limits.payloadMax = 32 << 20;
  limits.requestsInFlight = options.requestsInFlight;
  limits.payloadPerConnection = options.payloadPerConnection;
  limits.payloadTotal = options.payloadTotal;
  limits.replyBytesQueued = 64 << 20;
  limits.statusExtentsMax = 1000;
  std::string reason;
  auto wake = [](void* context) {
    Rig* rig = static_cast<Rig*>(context);
    std::lock_guard<std::mutex> lock(rig->wakeMutex_);
    rig->woken_ = true;
    rig->wake_.notify_one();
  };
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  datapath_ = Datapath::open(std::move(layout), limits, options.threads, options.engine, wake, this, &reason);
  if (!datapath_) return;
  tables_.push_back(makeTable(options.stripes));
  datapath_->openExport(1, stripeSize_, 1, options.fill, tablesOf(*tables_.back()));
  thread_ = std::thread([this] { run(); });
}

Rig::~Rig() {
  stop();
  for (int fd : fds_) ::close(fd);
}

void Rig::stop() {
  {
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    if (datapath_) datapath_->stop();
  }
  {
    std::lock_guard<std::mutex> lock(wakeMutex_);
    ending_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  datapath_.reset();
}

void Rig::run() {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(wakeMutex_);
      wake_.wait(lock, [this] { return woken_ || ending_; });
      if (ending_) return;
      woken_ = false;
    }
    std::lock_guard<std::recursive_mutex> lock(mutex_);
    drain();
    changed_.notify_all();
  }
}

void Rig::drain() {
  double records[64 * kRecordWords];
  size_t count;
  do {
    count = datapath_->drain(records, 64);
    for (size_t i = 0; i < count; i++) {
      const double* r = records + i * kRecordWords;
      switch (static_cast<int>(r[0])) {
        case 1: {
          const Held upcall{static_cast<uint32_t>(r[1]), static_cast<int>(r[3]), static_cast<uint32_t>(r[4]),
                            static_cast<uint64_t>(r[5]), static_cast<uint64_t>(r[6])};
          CHECK_EQUAL(r[2], 1.0);
          if (holding_) {
            held_.push_back(upcall);
          } else {
            decide(upcall);
          }
          break;
        }
        case 2: {
          auto found = continuations_.find(r[1]);
          if (found == continuations_.end()) {
            failed(__FILE__, __LINE__, "an event for no command");
            break;
          }
          Continuation next = std::move(found->second);
          continuations_.erase(found);
          next(r[3] == 0);
          break;
        }
        default:
          openSessions_--;
          ends_.push_back(static_cast<int>(r[2]));
      }
    }
  } while (count == 64);
}

double Rig::tagFor(Continuation next) {
  continuations_[nextTag_] = std::move(next);
  return nextTag_++;
}

void Rig::submit(const std::vector<double>& words) { datapath_->submit(words.data(), words.size()); }

bool Rig::command(const std::function<std::vector<double>(double tag)>& words) {
  std::unique_lock<std::recursive_mutex> lock(mutex_);
  bool done = false;
  bool ok = false;
  submit(words(tagFor([&](bool result) {
    done = true;
    ok = result;
  })));
  if (!changed_.wait_for(lock, kDeadline, [&] { return done; })) {
    failed(__FILE__, __LINE__, "a command does not end");
    abort();  // `done` is about to go away
  }
  return ok;
}

void Rig::complete(const Held& upcall, uint32_t error) { submit({1, double(upcall.index), double(error)}); }

void Rig::decide(const Held& upcall) {
  auto finish = [this, upcall](bool ok) { complete(upcall, ok ? 0 : 5); };
  switch (upcall.kind) {
    case 2:
      submit({4, tagFor(finish)});
      return;
    case 5: {
      const double words[] = {0, 1, double(upcall.length), 0};
      datapath_->completeStatus(upcall.index, words, 4);
      return;
    }
    default:
      change(upcall, upcall.offset / stripeSize_);
  }
}

void Rig::change(const Held& upcall, uint64_t stripe) {
  auto waiting = busy_.find(stripe);
  if (waiting != busy_.end()) {
    waiting->second.push_back([this, upcall, stripe] { changeNow(upcall, stripe); });
    return;
  }
  busy_[stripe];
  changeNow(upcall, stripe);
}

void Rig::changeNow(const Held& upcall, uint64_t stripe) {
  Table& table = *tables_.back();
  if (bit(table.init, stripe)) {
    const double slot = __atomic_load_n(&table.slots[stripe], __ATOMIC_RELAXED);
    submit({3, tagFor([this, upcall, stripe](bool ok) {
              CHECK(ok);
              setDirect(stripe, true);
              finishChange(upcall, stripe);
            }),
            double(upcall.index), double(stripe), slot});
    return;
  }
  const uint32_t slot = nextSlot_++;
  submit({2, tagFor([this, upcall, stripe, slot](bool ok) {
            CHECK(ok);
            for (auto& each : tables_) {
              if (stripe >= each->slots.size()) continue;
              __atomic_store_n(&each->slots[stripe], slot, __ATOMIC_RELEASE);
              setBit(each->init, stripe, true);
              setBit(each->direct, stripe, true);
            }
            finishChange(upcall, stripe);
          }),
          1, double(stripe), 1, double(slot), 0, 1, double(upcall.index)});
}

void Rig::finishChange(const Held& upcall, uint64_t stripe) {
  auto found = busy_.find(stripe);
  if (found->second.empty()) {
    busy_.erase(found);
  } else {
    auto next = std::move(found->second.front());
    found->second.erase(found->second.begin());
    next();
  }
  if ((stripe + 1) * stripeSize_ < upcall.offset + upcall.length) {
    change(upcall, stripe + 1);
  } else {
    complete(upcall, 0);
  }
}

void Rig::hold() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  holding_ = true;
}

void Rig::release() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  holding_ = false;
  std::vector<Held> all;
  all.swap(held_);
  for (const Held& upcall : all) decide(upcall);
}

size_t Rig::held() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  return held_.size();
}

Client Rig::connect(Mode mode, bool tcp) {
  int pair[2] = {-1, -1};
  if (tcp) {
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    CHECK(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    CHECK(listen(listener, 1) == 0);
    CHECK(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0);
    pair[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(::connect(pair[0], reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
    pair[1] = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    ::close(listener);
  } else {
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  }
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  SessionOptions session;
  session.fd = pair[1];
  session.id = nextSession_++;
  session.rules.mode = mode;
  session.rules.payloadMax = 32 << 20;
  if (mode != Mode::Simple) {
    session.contexts = {0};
    session.rules.contexts = true;
    session.rules.contextCount = 1;
  }
  openSessions_++;
  datapath_->serve(1, std::move(session));
  return Client(pair[0], mode);
}

std::unique_ptr<Rig::Table> Rig::makeTable(uint32_t stripes) const {
  std::unique_ptr<Table> table(new Table);
  table->slots.resize(stripes);
  table->init.resize((stripes + 31) / 32);
  table->direct.resize((stripes + 31) / 32);
  return table;
}

Tables Rig::tablesOf(const Table& table) const {
  return {table.slots.size() * stripeSize_, table.slots.data(), table.init.data(), table.direct.data()};
}

void Rig::grow(uint32_t stripes) {
  std::unique_lock<std::recursive_mutex> lock(mutex_);
  std::unique_ptr<Table> next = makeTable(stripes);
  const Table& before = *tables_.back();
  std::copy(before.slots.begin(), before.slots.end(), next->slots.begin());
  std::copy(before.init.begin(), before.init.end(), next->init.begin());
  std::copy(before.direct.begin(), before.direct.end(), next->direct.begin());
  tables_.push_back(std::move(next));
  bool done = false;
  datapath_->retable(1, tagFor([&](bool) { done = true; }), tablesOf(*tables_.back()));
  size_.store(stripes * stripeSize_);
  if (!changed_.wait_for(lock, kDeadline, [&] { return done; })) abort();
  tables_.erase(tables_.begin(), tables_.end() - 1);  // freed: whoever still reads them is found by the sanitizer
}

bool Rig::waitForSessions(size_t count) {
  std::unique_lock<std::recursive_mutex> lock(mutex_);
  return changed_.wait_for(lock, kDeadline, [&] { return openSessions_ == count; });
}

size_t Rig::sessions() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  return openSessions_;
}

std::vector<int> Rig::ends() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  return ends_;
}

std::vector<double> Rig::counters() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  std::vector<double> numbers(11);
  datapath_->exportCounters(1, numbers.data());
  return numbers;
}

std::vector<double> Rig::memberTotals() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  std::vector<double> numbers(5 * options_.members), totals(5);
  datapath_->memberCounters(numbers.data());
  for (size_t i = 0; i < numbers.size(); i++) totals[i % 5] += numbers[i];
  return totals;
}

void Rig::evict() {
  for (int fd : fds_) {
    fdatasync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  }
}

void Rig::formatAll(bool direct) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  Table& table = *tables_.back();
  for (uint32_t stripe = 0; stripe < table.slots.size(); stripe++) {
    __atomic_store_n(&table.slots[stripe], nextSlot_++, __ATOMIC_RELEASE);
    setBit(table.init, stripe, true);
    setBit(table.direct, stripe, direct);
  }
  for (int fd : fds_) {
    CHECK(ftruncate(fd, static_cast<off_t>(8192 + nextSlot_ * options_.chunkSize)) == 0);
  }
}

std::vector<uint8_t> Rig::slotBytes(uint32_t slot) const {
  std::vector<uint8_t> bytes(stripeSize_);
  for (uint32_t chunk = 0; chunk < options_.members; chunk++) {
    const int fd = fds_[(slot + chunk) % options_.members];
    const ssize_t got = pread(fd, bytes.data() + chunk * options_.chunkSize, options_.chunkSize,
                              static_cast<off_t>(8192 + slot * options_.chunkSize));
    CHECK(got >= 0);
  }
  return bytes;
}

bool Rig::bit(const std::vector<uint32_t>& words, uint64_t index) const {
  return ((__atomic_load_n(&words[index / 32], __ATOMIC_RELAXED) >> (index % 32)) & 1) != 0;
}

void Rig::setBit(std::vector<uint32_t>& words, uint64_t index, bool value) {
  const uint32_t mask = uint32_t{1} << (index % 32);
  if (value) {
    __atomic_fetch_or(&words[index / 32], mask, __ATOMIC_SEQ_CST);
  } else {
    __atomic_fetch_and(&words[index / 32], ~mask, __ATOMIC_SEQ_CST);
  }
}

void Rig::setDirect(uint64_t stripe, bool value) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  for (auto& table : tables_) {
    if (stripe < table->slots.size()) setBit(table->direct, stripe, value);
  }
}

}  // namespace test

// Lanes (lane.h): writes of one datapath that are on another one as well when they are answered. The test is the policy of both
// sides, and in places the peer: it looks at what happened between two steps, which the policy of rig.h would not let it.
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "lane.h"
#include "loop.h"
#include "rig.h"

namespace nbd::test {
namespace {

constexpr uint32_t kExport = 7;
constexpr uint64_t kBlock = Claims::kBlock;
constexpr uint32_t kHalf = 1 << 16;
constexpr uint32_t kFromLane = 1 << 17;
constexpr double kCommandComplete = 1, kCommandWritePart = 3, kCommandBarrier = 6, kCommandClose = 7, kCommandDrop = 8,
                 kCommandEnd = 9;

Bytes pattern(uint64_t seed, size_t size) {
  Random random(seed);
  Bytes data(size);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(random.next());
  return data;
}

struct Pair {
  int ours, theirs;
};

Pair socketPair() {
  int pair[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
  const timeval limit{20, 0};
  setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  return {pair[0], pair[1]};
}

struct Call {
  uint32_t index, kind, flags;
  uint64_t offset, length;
};

struct SideOptions {
  uint32_t threads = 1;
  uint64_t size = 4 << 20;
  uint64_t payloadTotal = 64 << 20;
};

/// One datapath with an export whose stripes all have slots and direct bits. The thread that made it is its JavaScript thread.
class Side {
 public:
  explicit Side(const SideOptions& options = {});
  ~Side();

  Datapath& datapath() { return *datapath_; }
  /// Takes events until the condition holds.
  template <typename Condition>
  bool wait(Condition condition, int seconds = 20);
  /// Takes the events that are there.
  void drain();
  /// From another thread: the condition may hold.
  void nudge() {
    std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
    changed_.notify_one();
  }
  /// Waits for the next upcall and takes it out of the queue.
  Call next();
  void complete(const Call& call, uint32_t error = kOk) {
    send({kCommandComplete, static_cast<double>(call.index), static_cast<double>(error)});
  }
  void send(std::vector<double> words) { datapath_->submit(words.data(), words.size()); }
  /// Also of what is on lanes, or not.
  double barrier(bool lanes = true);
  bool busy(uint64_t offset, uint64_t length) { return datapath_->blocksBusy(kExport, offset, length); }
  bool await(double tag) { return wait([&] { return done.count(tag) != 0; }) && done[tag] == 0; }
  /// Writes what a call says to its slots.
  bool writeHere(uint32_t index, uint64_t offset, uint64_t length);
  Bytes read(uint64_t offset, uint64_t length);
  void setDirect(uint64_t stripe, bool value);
  int serve(bool lane, uint32_t* session = nullptr);
  std::unique_ptr<Client> connect(Mode mode = Mode::Simple);
  /// A lane of the thread `loop`; returns the peer's end.
  int openLane(uint32_t id = 1, uint32_t loop = 0, int* theirs = nullptr);
  bool held(uint64_t offset, uint64_t length) { return datapath_->holdBlocks(kExport, offset, length); }
  void release(uint64_t offset, uint64_t length) { datapath_->releaseBlocks(kExport, offset, length); }
  /// Whether a lane has any block.
  bool anyTaken() {
    const bool taken = held(0, size);
    release(0, size);
    return taken;
  }
  /// 9: in-place writes, 10: on lanes.
  double counter(size_t which);
  /// From now on that member takes no writes.
  void breakMember(size_t member);

  const uint64_t stripeSize = 32 * 1024;
  const uint64_t size;
  std::deque<Call> upcalls;
  std::map<double, int> done;
  std::map<uint32_t, int> sessionEnds;
  std::vector<uint32_t> laneEnds;
  std::vector<EventKind> order;

 private:
  std::vector<uint32_t> slots_, init_, direct_;
  std::vector<int> members_;
  std::unique_ptr<Datapath> datapath_;
  double tag_ = 0;
  uint32_t session_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool woken_ = false;
};

Side::Side(const SideOptions& options) : size(options.size) {
  const uint64_t stripes = size / stripeSize;
  slots_.resize(stripes);
  init_.assign(stripes / 32 + 1, ~uint32_t{0});
  direct_.assign(stripes / 32 + 1, ~uint32_t{0});
  for (uint64_t i = 0; i < stripes; i++) slots_[i] = static_cast<uint32_t>(i + 1);
  Layout layout;
  for (int i = 0; i < 2; i++) {
    char name[] = "/tmp/fullstripe-member-XXXXXX";
    const int fd = mkstemp(name);
    CHECK(fd >= 0);
    unlink(name);
    CHECK(ftruncate(fd, static_cast<off_t>(size)) == 0);
    members_.push_back(fd);
    Member member;
    member.fd = fd;
    layout.members.push_back(member);
  }
  layout.dataMembers = 2;
  layout.chunkSize = stripeSize / 2;
  layout.dataOffset = 64 * 1024;
  Limits limits;
  limits.payloadMax = 8 << 20;
  limits.requestsInFlight = 64;
  limits.payloadPerConnection = 16 << 20;
  limits.payloadTotal = options.payloadTotal;
  limits.replyBytesQueued = 4 << 20;
  limits.statusExtentsMax = 64;
  auto wake = [](void* context) { static_cast<Side*>(context)->nudge(); };
  std::string reason;
  datapath_ = Datapath::open(std::move(layout), limits, options.threads, EngineChoice::Threads, wake, this, &reason);
  CHECK(datapath_ != nullptr);
  Tables tables;
  tables.size = size;
  tables.slots = slots_.data();
  tables.init = init_.data();
  tables.direct = direct_.data();
  datapath_->openExport(kExport, stripeSize, 1, 0, tables);
}

Side::~Side() {
  datapath_.reset();
  for (const int fd : members_) ::close(fd);
}

void Side::drain() {
  double records[16 * kRecordWords];
  size_t count;
  do {
    count = datapath_->drain(records, 16);
    for (const double* r = records; r < records + count * kRecordWords; r += kRecordWords) {
      const EventKind kind = static_cast<EventKind>(r[0]);
      order.push_back(kind);
      switch (kind) {
        case EventKind::Upcall:
          upcalls.push_back({static_cast<uint32_t>(r[1]), static_cast<uint32_t>(r[3]), static_cast<uint32_t>(r[4]),
                             static_cast<uint64_t>(r[5]), static_cast<uint64_t>(r[6])});
          break;
        case EventKind::Done:
          done[r[1]] = static_cast<int>(r[3]);
          break;
        case EventKind::SessionEnd:
          sessionEnds[static_cast<uint32_t>(r[1])] = static_cast<int>(r[2]);
          break;
        case EventKind::LaneEnd:
          laneEnds.push_back(static_cast<uint32_t>(r[1]));
          break;
      }
    }
  } while (count == 16);
}

template <typename Condition>
bool Side::wait(Condition condition, int seconds) {
  // The time of day: see Rig::done.
  const auto deadline = std::chrono::system_clock::now() + std::chrono::seconds(seconds);
  for (;;) {
    drain();
    if (condition()) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_until(lock, deadline, [this] { return woken_; })) return false;
    woken_ = false;
  }
}

Call Side::next() {
  CHECK(wait([&] { return !upcalls.empty(); }));
  const Call call = upcalls.front();
  upcalls.pop_front();
  return call;
}

double Side::barrier(bool lanes) {
  send({kCommandBarrier, ++tag_, lanes ? double{kExport} : 0});
  return tag_;
}

bool Side::writeHere(uint32_t index, uint64_t offset, uint64_t length) {
  std::vector<double> words, tags;
  for (uint64_t stripe = offset / stripeSize; stripe * stripeSize < offset + length; stripe++) {
    tags.push_back(++tag_);
    words.insert(words.end(), {kCommandWritePart, tag_, static_cast<double>(index), static_cast<double>(stripe),
                               static_cast<double>(slots_[stripe])});
  }
  send(words);
  bool good = true;
  for (const double tag : tags) good = await(tag) && good;
  return good;
}

Bytes Side::read(uint64_t offset, uint64_t length) {
  Bytes data(length);
  const double tag = ++tag_;
  datapath_->readRange(tag, kExport, offset, data.data(), length);
  CHECK(await(tag));
  return data;
}

void Side::setDirect(uint64_t stripe, bool value) {
  const uint32_t bit = 1u << (stripe & 31);
  if (value) {
    __atomic_fetch_or(&direct_[stripe >> 5], bit, __ATOMIC_SEQ_CST);
  } else {
    __atomic_fetch_and(&direct_[stripe >> 5], ~bit, __ATOMIC_SEQ_CST);
  }
}

int Side::serve(bool lane, uint32_t* session) {
  const Pair pair = socketPair();
  SessionOptions options;
  options.fd = pair.theirs;
  options.id = ++session_;
  options.rules.payloadMax = datapath_->payloadMax();
  options.lane = lane;
  if (session != nullptr) *session = options.id;
  datapath_->serve(kExport, std::move(options));
  return pair.ours;
}

std::unique_ptr<Client> Side::connect(Mode mode) {
  const Pair pair = socketPair();
  SessionOptions options;
  options.fd = pair.theirs;
  options.id = ++session_;
  options.rules.mode = mode;
  options.rules.payloadMax = datapath_->payloadMax();
  auto client = std::make_unique<Client>(pair.ours, options.id, mode);
  datapath_->serve(kExport, std::move(options));
  return client;
}

int Side::openLane(uint32_t id, uint32_t loop, int* theirs) {
  const Pair pair = socketPair();
  if (theirs != nullptr) *theirs = pair.theirs;
  datapath_->openLane(kExport, id, loop, pair.theirs);
  return pair.ours;
}

void Side::breakMember(size_t member) {
  const std::string path = "/proc/self/fd/" + std::to_string(members_[member]);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  CHECK(fd >= 0);
  CHECK(dup3(fd, members_[member], O_CLOEXEC) >= 0);
  ::close(fd);
}

double Side::counter(size_t which) {
  double all[13];
  datapath_->exportCounters(kExport, all);
  return all[which];
}

/// A peer by hand. A call that waits for 20 seconds is a failure.
class Peer {
 public:
  explicit Peer(int fd) : fd(fd) {}
  ~Peer() { close(); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  struct Write {
    uint64_t cookie, offset;
    Bytes data;
  };
  /// The next request, which has to be what a lane may send.
  Write take() {
    uint8_t head[kRequestSize];
    CHECK(receive(head, sizeof head));
    CHECK_EQUAL(load32(head), kRequestMagic);
    CHECK_EQUAL(load16(head + 4), 0);
    CHECK_EQUAL(load16(head + 6), uint16_t{kWrite});
    Write write{load64(head + 8), load64(head + 16), Bytes(load32(head + 24))};
    CHECK(receive(write.data.data(), write.data.size()));
    CHECK_EQUAL(uint32_t(write.cookie >> 32), laneChecksum(0, static_cast<uint32_t>(write.cookie), write.offset,
                                                           write.data.size(), write.data.data()));
    return write;
  }
  void reply(uint64_t cookie, uint32_t error = kOk, uint32_t magic = kSimpleReplyMagic) {
    uint8_t bytes[kSimpleReplySize];
    putSimpleReply(bytes, error, cookie);
    put32(bytes, magic);
    CHECK(::send(fd, bytes, sizeof bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof bytes));
  }
  bool receive(void* into, size_t size) {
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
  bool silent() {
    pollfd one{fd, POLLIN, 0};
    return ::poll(&one, 1, 0) == 0;
  }
  void close() {
    if (fd >= 0) ::close(fd);
    fd = -1;
  }

  int fd;
};

/// The thread of that client has finished every turn that began before this call.
void pass(Client& client) {
  for (int i = 0; i < 2; i++) client.read(0, 512);
}

/// A primary with one client and one lane, whose peer is the test.
struct Primary {
  explicit Primary(const SideOptions& options = {}) : side(options) {
    side.datapath().setForwards(kExport, true);
    peer = std::make_unique<Peer>(side.openLane(1, 0, &laneSocket));
    client = side.connect();
  }
  /// A write that is on the lane, and stays there.
  Peer::Write begin(uint64_t offset, const Bytes& data) {
    client->send(kWrite, 0, offset, data.size(), data);
    Peer::Write write = peer->take();
    CHECK_EQUAL(write.offset, offset);
    CHECK(write.data == data);
    return write;
  }
  /// Writes with another client, which has to go on the lane.
  void writeThrough(uint64_t offset, const Bytes& data) {
    const Peer::Write write = begin(offset, data);
    peer->reply(write.cookie);
    const Client::Reply reply = client->receive();
    CHECK(!reply.ended);
    CHECK_EQUAL(reply.error, uint32_t{kOk});
  }
  /// Waits for the end of the lane and `count` upcalls that say half, which come behind it; and answers them.
  void lost(size_t count) {
    CHECK(side.wait([&] { return side.laneEnds.size() == 1 && side.upcalls.size() >= count; }));
    CHECK_EQUAL(side.upcalls.size(), count);
    const auto end = std::find(side.order.begin(), side.order.end(), EventKind::LaneEnd);
    CHECK_EQUAL(static_cast<size_t>(std::count(side.order.begin(), end, EventKind::Upcall)), size_t{0});
    CHECK(!side.anyTaken());
    while (!side.upcalls.empty()) {
      const Call call = side.next();
      CHECK_EQUAL(call.flags, kHalf);
      CHECK_EQUAL(call.kind, static_cast<uint32_t>(UpcallKind::Write));
      side.complete(call);
    }
  }

  Side side;
  int laneSocket = -1;  // the datapath's
  std::unique_ptr<Peer> peer;
  std::unique_ptr<Client> client;
};

/// Two datapaths with a lane for each thread.
struct Mirror {
  explicit Mirror(const SideOptions& options = {}) : here(options), there(options) {
    here.datapath().setForwards(kExport, true);
    there.datapath().setLanesOnly(kExport, true);
    for (uint32_t loop = 0; loop < options.threads; loop++) join(loop);
  }
  void join(uint32_t loop) {
    const Pair pair = socketPair();
    here.datapath().openLane(kExport, ++lane, loop, pair.ours);
    SessionOptions session;
    session.fd = pair.theirs;
    session.id = 1000 + lane;
    session.rules.payloadMax = there.datapath().payloadMax();
    session.lane = true;
    there.datapath().serve(kExport, std::move(session));
  }
  Side here, there;
  uint32_t lane = 0;
};

Bytes laneRequest(uint64_t offset, const Bytes& data, uint32_t low = 1, uint16_t flags = 0) {
  Bytes bytes(kRequestSize);
  uint8_t* at = put32(bytes.data(), kRequestMagic);
  at = put16(at, flags);
  at = put16(at, kWrite);
  at = put64(at, uint64_t{laneChecksum(flags, low, offset, data.size(), data.data())} << 32 | low);
  at = put64(at, offset);
  put32(at, static_cast<uint32_t>(data.size()));
  bytes.insert(bytes.end(), data.begin(), data.end());
  return bytes;
}

void sendAll(int fd, const Bytes& bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t sent = ::send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) return;  // it ended before all of it was there
    CHECK(sent > 0);
    at += static_cast<size_t>(sent);
  }
}

uint32_t replyTo(Peer& peer, uint64_t low) {
  uint8_t bytes[kSimpleReplySize];
  CHECK(peer.receive(bytes, sizeof bytes));
  CHECK_EQUAL(load32(bytes), kSimpleReplyMagic);
  CHECK_EQUAL(load32(bytes + 12), static_cast<uint32_t>(low));
  return load32(bytes + 4);
}

// --- the primary ---------------------------------------------------------------------------------------------------

const Register both("lane: a write is on both sides when it is answered", [] {
  Mirror mirror;
  auto client = mirror.here.connect();
  struct {
    uint64_t offset, length;
  } const writes[] = {{0, 4096}, {512, 512}, {32 * 1024 - 512, 1024}, {100 * 1024 + 512, 64 * 1024}, {(4 << 20) - 512, 512}, {0, 1}};
  uint64_t seed = 0;
  for (const auto& one : writes) {
    const Bytes data = pattern(++seed, one.length);
    CHECK_EQUAL(client->write(one.offset, data), uint32_t{kOk});
    CHECK(mirror.here.read(one.offset, one.length) == data);
    CHECK(mirror.there.read(one.offset, one.length) == data);
  }
  CHECK(mirror.here.read(0, mirror.here.size) == mirror.there.read(0, mirror.there.size));
  CHECK_EQUAL(mirror.here.counter(10), 6.0);
  CHECK_EQUAL(mirror.there.counter(9), 6.0);
  CHECK_EQUAL(mirror.there.counter(10), 0.0);
  CHECK(mirror.here.upcalls.empty() && mirror.there.upcalls.empty());
});

const Register withheld("lane: a write is answered after the peer's reply, a barrier of the export waits for it", [] {
  Primary primary;
  const Bytes data = pattern(1, 8192);
  const Peer::Write write = primary.begin(4096, data);
  // What was asked for later is answered first.
  CHECK(primary.client->read(4096, 8192) == data);
  const double barrier = primary.side.barrier();
  pass(*primary.client);
  primary.side.drain();
  CHECK(primary.side.done.count(barrier) == 0);
  // Whoever does not ask for lanes does not wait for the peer.
  CHECK(primary.side.await(primary.side.barrier(false)));
  CHECK(primary.side.done.count(barrier) == 0);
  CHECK(primary.side.busy(4096, 1) && primary.side.busy(0, primary.side.size));
  CHECK(primary.side.held(4096, 1));
  primary.side.release(4096, 1);
  primary.peer->reply(write.cookie);
  CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
  CHECK(primary.side.await(barrier));
  CHECK(primary.side.upcalls.empty());
  CHECK(!primary.side.anyTaken() && !primary.side.busy(0, primary.side.size));
});

const Register fences("lane: barriers wait for what was on its way before them, in their order", [] {
  Primary primary;
  const Bytes data = pattern(61, 4096);
  Peer::Write writes[6];
  double barriers[6];
  for (uint64_t i = 0; i < 6; i++) {
    writes[i] = primary.begin(i * 8192, data);
    barriers[i] = primary.side.barrier();
  }
  const auto passed = [&] {
    pass(*primary.client);
    CHECK(primary.side.await(primary.side.barrier(false)));
    size_t count = 0;
    while (count < 6 && primary.side.done.count(barriers[count]) != 0) count++;
    for (size_t i = count; i < 6; i++) CHECK(primary.side.done.count(barriers[i]) == 0);
    return count;
  };
  CHECK_EQUAL(passed(), size_t{0});
  const auto reply = [&](size_t i) {
    primary.peer->reply(writes[i].cookie);
    primary.client->receive();
    return passed();
  };
  CHECK_EQUAL(reply(1), size_t{0});
  CHECK_EQUAL(reply(4), size_t{0});
  CHECK_EQUAL(reply(0), size_t{2});
  // What begins after a barrier is nothing that it waits for.
  primary.begin(64 * 1024, data);
  CHECK_EQUAL(reply(2), size_t{3});
  CHECK(primary.side.busy(64 * 1024, 512));
  primary.peer->close();
  // What came back counts until it is answered: there is no moment in which nobody knows of it.
  CHECK(primary.side.wait([&] { return primary.side.upcalls.size() == 3; }));
  CHECK(primary.side.busy(64 * 1024, 512));
  primary.lost(3);
  CHECK(!primary.side.busy(0, primary.side.size));
  for (int i = 0; i < 3; i++) primary.client->receive();
  CHECK_EQUAL(passed(), size_t{6});
});

const Register stretches("lane: what is on its way is told by stretches, one is no matter of its neighbours", [] {
  Primary primary;
  const uint64_t stretch = 256 * 1024;
  const Bytes data = pattern(62, 8192);
  const Peer::Write across = primary.begin(2 * stretch - 4096, data);
  for (uint64_t i = 0; i < 8; i++) CHECK_EQUAL(primary.side.busy(i * stretch, stretch), i == 1 || i == 2);
  const Peer::Write more = primary.begin(2 * stretch + 64 * 1024, data);
  primary.peer->reply(across.cookie);
  primary.client->receive();
  for (uint64_t i = 0; i < 8; i++) CHECK_EQUAL(primary.side.busy(i * stretch, stretch), i == 2);
  primary.peer->reply(more.cookie);
  primary.client->receive();
  CHECK(!primary.side.busy(0, primary.side.size));
});

const Register lostOne("lane: what was on its way when it was lost is half done", [] {
  Primary primary;
  auto other = primary.side.connect();
  const Bytes data = pattern(2, 4096);
  for (uint64_t i = 0; i < 5; i++) (i % 2 == 0 ? *primary.client : *other).send(kWrite, 0, i * 8192, data.size(), data);
  for (int i = 0; i < 5; i++) primary.peer->take();
  const double barrier = primary.side.barrier();
  primary.peer->close();
  primary.lost(5);
  // An access that ended as an upcall is known before the barrier that waited for it.
  CHECK(primary.side.await(barrier));
  CHECK(primary.side.order.back() == EventKind::Done);
  for (int i = 0; i < 5; i++) CHECK_EQUAL((i % 2 == 0 ? *primary.client : *other).receive().error, uint32_t{kOk});
  // Without a lane it is the policy's.
  primary.client->send(kWrite, 0, 0, data.size(), data);
  const Call call = primary.side.next();
  CHECK_EQUAL(call.flags, 0u);
  primary.side.complete(call, kEio);
  CHECK_EQUAL(primary.client->receive().error, uint32_t{kEio});
});

const Register lostFull("lane: lost while its socket is full, and the client goes as well", [] {
  Primary primary;
  const Bytes data = pattern(3, 64 * 1024);
  for (uint64_t i = 0; i < 30; i++) primary.client->send(kWrite, 0, i * data.size(), data.size(), data);
  CHECK(eventually([&] { return primary.side.counter(10) == 30; }));
  primary.client->close();
  primary.peer->take();
  primary.peer->close();
  primary.lost(30);
  CHECK(primary.side.wait([&] { return primary.side.sessionEnds.size() == 1; }));
});

const Register lostLate("lane: replies that came before the end count", [] {
  Primary primary;
  const Bytes data = pattern(51, 4096);
  Peer::Write writes[3];
  for (uint64_t i = 0; i < 3; i++) writes[i] = primary.begin(i * 8192, data);
  for (const size_t i : {2, 0}) primary.peer->reply(writes[i].cookie);
  uint8_t part[kSimpleReplySize];
  putSimpleReply(part, kOk, writes[1].cookie);
  sendAll(primary.peer->fd, Bytes(part, part + sizeof part - 1));
  primary.peer->close();
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{3});
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{1});
  primary.lost(1);
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{2});
});

const Register gone("lane: a client that is gone has its writes answered, and its session ends", [] {
  Primary primary;
  const Peer::Write write = primary.begin(0, pattern(4, 512));
  primary.client->close();
  const double barrier = primary.side.barrier();
  primary.peer->reply(write.cookie);
  CHECK(primary.side.await(barrier));
  CHECK(primary.side.wait([&] { return primary.side.sessionEnds.size() == 1; }));
  CHECK(primary.side.upcalls.empty() && primary.side.laneEnds.empty());
  CHECK(!primary.side.anyTaken());
});

const Register refused("lane: a write that the peer refused is half done, the lane goes on", [] {
  Primary primary;
  const Bytes data = pattern(5, 4096);
  Peer::Write writes[3];
  for (uint64_t i = 0; i < 3; i++) writes[i] = primary.begin(i * 4096, data);
  primary.peer->reply(writes[1].cookie, kEio);
  const Call call = primary.side.next();
  CHECK_EQUAL(call.flags, kHalf);
  CHECK_EQUAL(call.offset, uint64_t{4096});
  CHECK_EQUAL(call.length, uint64_t{4096});
  Bytes payload(4096);
  CHECK(primary.side.datapath().readPayload(call.index, 0, payload.data(), payload.size()));
  CHECK(payload == data);
  CHECK(!primary.side.held(4096, 4096));
  primary.side.release(4096, 4096);
  primary.peer->reply(writes[2].cookie);
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{3});
  primary.peer->reply(writes[0].cookie);
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{1});
  primary.side.complete(call, kEnospc);
  CHECK_EQUAL(primary.client->receive().error, uint32_t{kEnospc});
  primary.writeThrough(4096, data);
  CHECK(primary.side.upcalls.empty() && primary.side.laneEnds.empty());
});

const Register wrong("lane: a reply that is none ends it", [] {
  const Bytes data = pattern(6, 4096);
  const std::vector<std::pair<const char*, std::function<void(Peer&, uint64_t)>>> replies = {
      {"magic", [](Peer& peer, uint64_t cookie) { peer.reply(cookie, kOk, kStructuredReplyMagic); }},
      {"checksum", [](Peer& peer, uint64_t cookie) { peer.reply(cookie ^ uint64_t{1} << 32); }},
      {"serial", [](Peer& peer, uint64_t cookie) { peer.reply(cookie ^ 1 << 16); }},
      {"place", [](Peer& peer, uint64_t cookie) { peer.reply(cookie ^ 1); }},
      {"no place", [](Peer& peer, uint64_t cookie) { peer.reply(cookie | 0xffff); }},
      {"error and cookie", [](Peer& peer, uint64_t cookie) { peer.reply(cookie ^ uint64_t{1} << 63, kEio); }},
  };
  for (const auto& [name, send] : replies) {
    Primary primary;
    primary.begin(0, data);
    const Peer::Write write = primary.begin(8192, data);
    send(*primary.peer, write.cookie);
    primary.lost(2);
    for (int i = 0; i < 2; i++) CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
    uint8_t byte;
    CHECK(!primary.peer->receive(&byte, 1));
  }
  Primary primary;
  primary.begin(0, data);
  const Peer::Write write = primary.begin(8192, data);
  primary.peer->reply(write.cookie);
  primary.peer->reply(write.cookie);
  primary.lost(1);
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{2});
  CHECK_EQUAL(primary.client->receive().cookie, uint64_t{1});
});

const Register early("lane: a reply to what was not sent yet ends it", [] {
  Primary primary;
  const Bytes data = pattern(7, 64 * 1024);
  constexpr uint32_t kCount = 30;
  for (uint64_t i = 0; i < kCount; i++) primary.client->send(kWrite, 0, i * data.size(), data.size(), data);
  CHECK(eventually([&] { return primary.side.counter(10) == kCount; }));
  // Places and serial numbers are given out in turn, and the socket does not hold all of it.
  const uint32_t low = kCount << 16 | (kCount - 1);
  primary.peer->reply(uint64_t{laneChecksum(0, low, (kCount - 1) * data.size(), data.size(), data.data())} << 32 | low);
  primary.lost(kCount);
});

const Register backlog("lane: a peer that is slow gets all, in order", [] {
  Primary primary;
  const int room = 4096;
  setsockopt(primary.laneSocket, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
  const Bytes data = pattern(8, 4096);
  constexpr uint64_t kWindow = 50, kCount = 10'000;  // always more than the socket holds, and more in all than a lane has places
  auto send = [&](uint64_t i) { primary.client->send(kWrite, 0, i % kWindow * data.size(), data.size(), data); };
  for (uint64_t i = 0; i < kWindow; i++) send(i);
  for (uint64_t i = 0; i < kCount; i++) {
    const Peer::Write write = primary.peer->take();
    CHECK_EQUAL(write.offset, i % kWindow * data.size());
    primary.peer->reply(write.cookie);
    CHECK_EQUAL(primary.client->receive().cookie, i + 1);
    if (i + kWindow < kCount) send(i + kWindow);
  }
  CHECK(primary.side.upcalls.empty());
});

const Register stalled("lane: an answer that is owed makes it stall, whatever else moves", [] {
  Shared nothing;
  Loop loop(nothing, 0);  // not started: this thread is its thread
  Export target;
  target.claims.reset(new Claims);
  const Pair pair = socketPair();
  Peer peer(pair.ours);
  Lane lane(loop, target, pair.theirs, 1);
  struct Abandon {
    Lane& lane;
    ~Abandon() { lane.abandon(); }
  } abandon{lane};
  Upcall* calls[3];
  auto begin = [&](size_t i) {
    calls[i] = loop.takeUpcall();
    calls[i]->offset = i * kBlock;
    calls[i]->length = 512;
    calls[i]->payload = Payload::create(512);
    memset(calls[i]->payload->data(), 0, 512);
    CHECK(target.claims->take(calls[i]->offset, calls[i]->length));
    lane.begin(calls[i]);
    CHECK(lane.flush());
    // The clock moves on.
    const uint64_t now = Loop::nowMicroseconds();
    while (Loop::nowMicroseconds() == now) {
    }
    return now;
  };
  auto refuse = [&] {
    peer.reply(peer.take().cookie, kEio);
    CHECK(lane.onEvent(EPOLLIN));
  };
  CHECK_EQUAL(lane.stalledSince(), uint64_t{0});
  const uint64_t first = begin(0);
  const uint64_t second = begin(1);
  CHECK(lane.stalledSince() > 0 && lane.stalledSince() <= first);
  const Peer::Write owed = peer.take();
  refuse();
  CHECK(lane.stalledSince() <= first);
  const uint64_t third = begin(2);
  CHECK(lane.stalledSince() <= first);
  peer.reply(owed.cookie, kEio);
  CHECK(lane.onEvent(EPOLLIN));
  CHECK(lane.stalledSince() > second && lane.stalledSince() <= third);
  refuse();
  CHECK_EQUAL(lane.stalledSince(), uint64_t{0});
  for (Upcall* call : calls) {
    CHECK(call->half);
    loop.giveUpcall(call);
  }
});

const Register inBytes("lane: replies that come byte by byte, and many at once", [] {
  Primary primary;
  const Bytes data = pattern(9, 512);
  const Peer::Write first = primary.begin(0, data);
  uint8_t reply[kSimpleReplySize];
  putSimpleReply(reply, kOk, first.cookie);
  auto other = primary.side.connect();
  for (const uint8_t& byte : reply) {
    CHECK(::send(primary.peer->fd, &byte, 1, MSG_NOSIGNAL) == 1);
    pass(*other);  // it has been taken
  }
  CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
  // More than one receive of the lane takes.
  std::vector<std::unique_ptr<Client>> clients;
  Bytes replies;
  for (uint64_t c = 0; c < 6; c++) {
    clients.push_back(primary.side.connect());
    for (uint64_t i = 0; i < 60; i++) {
      clients[c]->send(kWrite, 0, (c * 60 + i) * kBlock, data.size(), data);
      putSimpleReply(reply, kOk, primary.peer->take().cookie);
      replies.insert(replies.end(), reply, reply + sizeof reply);
    }
  }
  sendAll(primary.peer->fd, replies);
  for (auto& client : clients) {
    for (int i = 0; i < 60; i++) CHECK_EQUAL(client->receive().error, uint32_t{kOk});
  }
  CHECK(primary.side.upcalls.empty());
});

/// A write that has to be an upcall, and to change nothing before the policy has seen it.
void expectUpcall(Primary& primary, uint16_t command, uint16_t flags, uint64_t offset, uint64_t length, const Bytes& data = {}) {
  const Bytes before = primary.side.read(offset, length);
  const double inPlace = primary.side.counter(9);
  auto client = primary.side.connect();
  client->send(command, flags, offset, length, data);
  const Call call = primary.side.next();
  CHECK_EQUAL(call.flags, uint32_t{flags});
  CHECK_EQUAL(call.offset, offset);
  CHECK_EQUAL(call.length, length);
  CHECK(primary.side.read(offset, length) == before);
  CHECK_EQUAL(primary.side.counter(9), inPlace);
  CHECK(primary.peer->silent());
  primary.side.complete(call);
  CHECK_EQUAL(client->receive().error, uint32_t{kOk});
}

const Register overlap("lane: writes of a block that somebody has are the policy's", [] {
  Primary primary;
  const Bytes data = pattern(10, 4096);
  const Bytes small = pattern(11, 512);
  const Peer::Write write = primary.begin(8192 + 512, small);
  expectUpcall(primary, kWrite, 0, 8192 + 512, 512, small);
  expectUpcall(primary, kWrite, 0, 8192, 512, small);
  expectUpcall(primary, kWrite, 0, 12288 - 1, 1, {1});
  expectUpcall(primary, kWrite, 0, 4096 + 512, 4096, data);
  expectUpcall(primary, kWrite, 0, 0, 64 * 1024, pattern(12, 64 * 1024));
  // What a write that overlaps had taken before it met the other one is free again.
  CHECK(!primary.side.held(0, 8192));
  primary.side.release(0, 8192);
  CHECK(!primary.side.held(12288, 64 * 1024));
  primary.side.release(12288, 64 * 1024);
  primary.peer->reply(write.cookie);
  CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
  primary.writeThrough(0, pattern(12, 64 * 1024));
});

const Register holds("lane: held blocks, one or all, and given back", [] {
  SideOptions options;
  options.size = 256 << 20;
  Primary primary(options);
  const Bytes data = pattern(13, 4096);
  struct {
    uint64_t offset, length;
  } const ranges[] = {{4096, 4096},          {4096 + 100, 1},   {0, 64 << 20},       {(64 << 20) - 4096, (64 << 20) + 4096},
                      {0, options.size},     {1, (64 << 20)},   {4096, (64 << 20) - 4096}};
  for (const auto& range : ranges) {
    const uint64_t last = (range.offset + range.length - 1) / kBlock * kBlock;
    CHECK(!primary.side.held(range.offset, range.length));
    CHECK(!primary.side.held(range.offset, range.length));
    expectUpcall(primary, kWrite, 0, range.offset, 512, pattern(14, 512));
    expectUpcall(primary, kWrite, 0, last, 512, pattern(15, 512));
    primary.side.release(range.offset, range.length);
    expectUpcall(primary, kWrite, 0, range.offset, 512, pattern(16, 512));
    primary.side.release(range.offset, range.length);
    primary.writeThrough(range.offset, data);
    primary.writeThrough(last, data);
    primary.writeThrough(last >= kBlock ? last - kBlock : last, data);
    // Seen from the other side: who holds is told of a lane in any of the blocks.
    const Peer::Write write = primary.begin(last, pattern(17, 512));
    CHECK(primary.side.held(range.offset, range.length));
    primary.peer->reply(write.cookie);
    CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
    primary.side.release(range.offset, range.length);
    CHECK(!primary.side.anyTaken());
  }
});

const Register ordinary("lane: what is no case for a lane is an upcall, and nothing is written in place alone", [] {
  Primary primary;
  const uint64_t stripe = primary.side.stripeSize;
  expectUpcall(primary, kWrite, kFlagFua, 0, 4096, pattern(18, 4096));
  expectUpcall(primary, kTrim, 0, 0, 4096);
  expectUpcall(primary, kTrim, kFlagFua, 0, 4096);
  expectUpcall(primary, kWriteZeroes, 0, 0, 4096);
  expectUpcall(primary, kWrite, 0, 0, kLaneBytesMax + 1, pattern(19, kLaneBytesMax + 1));
  // Payloads that are written piece by piece where nothing forwards.
  expectUpcall(primary, kWrite, 0, 0, 300 * 1024, pattern(20, 300 * 1024));
  expectUpcall(primary, kWrite, 0, 512, 2 << 20, pattern(21, 2 << 20));
  primary.side.setDirect(1, false);
  expectUpcall(primary, kWrite, 0, stripe, 4096, pattern(22, 4096));
  expectUpcall(primary, kWrite, 0, stripe - 512, 1024, pattern(23, 1024));
  expectUpcall(primary, kWrite, 0, 2 * stripe - 512, 1024, pattern(24, 1024));
  CHECK(!primary.side.anyTaken());
  primary.writeThrough(stripe - 512, pattern(25, 512));
  primary.side.setDirect(1, true);
  primary.writeThrough(stripe - 512, pattern(26, 1024));
  primary.writeThrough(512, pattern(27, kLaneBytesMax));
  primary.peer->close();
  CHECK(primary.side.wait([&] { return primary.side.laneEnds.size() == 1; }));
  auto client = primary.side.connect();
  client->send(kWrite, 0, 0, 512, pattern(28, 512));
  const Call call = primary.side.next();
  CHECK(primary.side.read(0, 512) != pattern(28, 512));
  primary.side.complete(call);
  CHECK_EQUAL(client->receive().error, uint32_t{kOk});
  // And as ever where it no longer forwards.
  primary.side.datapath().setForwards(kExport, false);
  CHECK_EQUAL(client->write(0, pattern(29, 512)), uint32_t{kOk});
  CHECK(primary.side.upcalls.empty());
});

const Register torn("lane: a write that failed here in the middle is half done", [] {
  Primary primary;
  primary.side.breakMember(1);  // where the first chunk of this stripe is; the other one is written before
  const Bytes before = primary.side.read(0, 4096);
  const uint64_t chunk = primary.side.stripeSize / 2;
  const Bytes data = pattern(50, 8192);
  primary.client->send(kWrite, 0, chunk - 4096, 8192, data);
  const Call call = primary.side.next();
  CHECK_EQUAL(call.flags, kHalf);
  CHECK(primary.side.read(chunk - 4096, 4096) == before);
  CHECK(primary.side.read(chunk, 4096) == Bytes(data.begin() + 4096, data.end()));
  CHECK(primary.peer->silent());
  CHECK(!primary.side.anyTaken());
  primary.side.complete(call, kEio);
  CHECK_EQUAL(primary.client->receive().error, uint32_t{kEio});
  primary.writeThrough(chunk, Bytes(4096));
});

// --- who serves it -------------------------------------------------------------------------------------------------

const Register serving("lane: who serves it writes in place for it, and for nobody else", [] {
  Side side;
  side.datapath().setLanesOnly(kExport, true);
  auto client = side.connect();
  Peer lane(side.serve(true));
  const Bytes data = pattern(30, 4096);
  sendAll(lane.fd, laneRequest(4096, data, 5));
  CHECK_EQUAL(replyTo(lane, 5), uint32_t{kOk});
  CHECK(side.read(4096, 4096) == data);
  CHECK(side.upcalls.empty());

  client->send(kWrite, 0, 4096, 512, pattern(31, 512));
  Call call = side.next();
  CHECK_EQUAL(call.flags, 0u);
  CHECK(side.read(4096, 4096) == data);
  side.complete(call, kEperm);
  CHECK_EQUAL(client->receive().error, uint32_t{kEperm});
  client->send(kWrite, 0, 0, 1 << 20, pattern(32, 1 << 20));
  call = side.next();
  CHECK(side.read(4096, 4096) == data);
  side.complete(call, kEperm);
  CHECK_EQUAL(client->receive().error, uint32_t{kEperm});

  side.setDirect(0, false);
  sendAll(lane.fd, laneRequest(4096, pattern(33, 4096), 6));
  call = side.next();
  CHECK_EQUAL(call.flags, kFromLane);
  CHECK(side.read(4096, 4096) == data);
  CHECK(lane.silent());
  side.complete(call, kEio);
  CHECK_EQUAL(replyTo(lane, 6), uint32_t{kEio});
  side.setDirect(0, true);
  // In pieces, and two at once.
  Bytes both = laneRequest(4096, pattern(34, 4096), 7);
  const Bytes second = laneRequest(kBlock * 9 + 512, pattern(35, kLaneBytesMax), 8);
  both.insert(both.end(), second.begin(), second.end());
  sendAll(lane.fd, Bytes(both.begin(), both.begin() + 20));
  sendAll(lane.fd, Bytes(both.begin() + 20, both.begin() + 3000));
  sendAll(lane.fd, Bytes(both.begin() + 3000, both.end()));
  CHECK_EQUAL(replyTo(lane, 7), uint32_t{kOk});
  CHECK_EQUAL(replyTo(lane, 8), uint32_t{kOk});
  CHECK(side.read(4096, 4096) == pattern(34, 4096));
  CHECK(side.read(kBlock * 9 + 512, kLaneBytesMax) == pattern(35, kLaneBytesMax));
});

const Register flipped("lane: a bit that flipped on the way ends the session, and nothing is written", [] {
  Side side;
  side.datapath().setLanesOnly(kExport, true);
  const Bytes before = side.read(0, side.size);
  const Bytes good = laneRequest(8192, pattern(36, 4096));
  const Bytes after = laneRequest(65536, pattern(37, kLaneBytesMax));
  std::vector<size_t> bits;
  for (size_t bit = 0; bit < 8 * kRequestSize; bit++) bits.push_back(bit);
  for (const size_t bit : {size_t{0}, size_t{1}, size_t{16391}, size_t{32767}}) bits.push_back(8 * kRequestSize + bit);
  for (const size_t bit : bits) {
    uint32_t session;
    Peer lane(side.serve(true, &session));
    Bytes bytes = good;
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    // What follows makes up for bytes that a longer one waits for.
    bytes.insert(bytes.end(), after.begin(), after.end());
    sendAll(lane.fd, bytes);
    CHECK(side.wait([&] { return side.sessionEnds.count(session) != 0; }));
    // A command can become the one that ends sessions.
    const bool disconnect = bit == 8 * 7 + 1 || (bit / 8 == 7 && (bytes[7] == kDisconnect));
    if (!disconnect) CHECK_EQUAL(side.sessionEnds[session], static_cast<int>(SessionEnd::Protocol));
    uint8_t byte;
    CHECK(!lane.receive(&byte, 1));
  }
  CHECK(side.upcalls.empty());
  CHECK(side.read(0, side.size) == before);
  CHECK_EQUAL(side.counter(9), 0.0);
});

const Register foreign("lane: a session that asks for anything but a write ends", [] {
  Side side;
  const Bytes before = side.read(0, side.size);
  struct {
    uint16_t command, flags;
    uint32_t length;
    SessionEnd end;
  } const requests[] = {{kRead, 0, 4096, SessionEnd::Protocol},        {kFlush, 0, 0, SessionEnd::Protocol},
                        {kTrim, 0, 4096, SessionEnd::Protocol},        {kCache, 0, 4096, SessionEnd::Protocol},
                        {kWriteZeroes, 0, 4096, SessionEnd::Protocol}, {kBlockStatus, 0, 4096, SessionEnd::Protocol},
                        {99, 0, 0, SessionEnd::Protocol},              {kWrite, 0, 0, SessionEnd::Protocol},
                        {kWrite, kFlagFua, 4096, SessionEnd::Protocol}, {kWrite, 0, kLaneBytesMax + 1, SessionEnd::Protocol},
                        {kDisconnect, 0, 0, SessionEnd::Disconnect}};
  for (const auto& one : requests) {
    uint32_t session;
    Peer lane(side.serve(true, &session));
    const Bytes payload = one.command == kWrite ? pattern(38, one.length) : Bytes();
    Bytes bytes = laneRequest(0, payload, 1, one.flags);
    put16(bytes.data() + 6, one.command);
    put32(bytes.data() + 24, one.length);
    sendAll(lane.fd, bytes);
    CHECK(side.wait([&] { return side.sessionEnds.count(session) != 0; }));
    CHECK_EQUAL(side.sessionEnds[session], static_cast<int>(one.end));
  }
  // One that breaks off in the middle of a payload.
  uint32_t session;
  Peer lane(side.serve(true, &session));
  const Bytes bytes = laneRequest(0, pattern(39, 4096));
  sendAll(lane.fd, Bytes(bytes.begin(), bytes.end() - 1));
  lane.close();
  CHECK(side.wait([&] { return side.sessionEnds.count(session) != 0; }));
  CHECK(side.upcalls.empty());
  CHECK(side.read(0, side.size) == before);
});

const Register pieces("lane: a write for which there is no memory at once goes up in pieces", [] {
  SideOptions options;
  options.payloadTotal = 2 * kLaneBytesMax - 256;
  Side side(options);
  side.datapath().setLanesOnly(kExport, true);
  for (uint64_t stripe = 0; stripe < 8; stripe++) side.setDirect(stripe, false);
  Peer lane(side.serve(true));
  sendAll(lane.fd, laneRequest(128 * 1024, pattern(40, kLaneBytesMax), 1));
  const Call first = side.next();
  const Bytes data = pattern(41, kLaneBytesMax);
  sendAll(lane.fd, laneRequest(512, data, 2));
  Call call = side.next();
  CHECK_EQUAL(call.flags, kFromLane);
  CHECK_EQUAL(call.offset, uint64_t{512});
  CHECK(call.length < kLaneBytesMax);
  uint64_t offset = 512;
  while (offset < 512 + kLaneBytesMax) {
    CHECK_EQUAL(call.offset, offset);
    Bytes part(call.length);
    CHECK(side.datapath().readPayload(call.index, 0, part.data(), part.size()));
    CHECK(std::equal(part.begin(), part.end(), data.begin() + static_cast<long>(offset - 512)));
    offset += call.length;
    side.complete(call);
    if (offset < 512 + kLaneBytesMax) call = side.next();
  }
  CHECK_EQUAL(replyTo(lane, 2), uint32_t{kOk});
  side.complete(first);
  CHECK_EQUAL(replyTo(lane, 1), uint32_t{kOk});
});

// --- ends ----------------------------------------------------------------------------------------------------------

const Register endSession("lane: a session that is ended takes no more, and answers what it took", [] {
  Side side;
  side.datapath().setLanesOnly(kExport, true);
  side.setDirect(0, false);
  uint32_t session;
  Peer lane(side.serve(true, &session));
  sendAll(lane.fd, laneRequest(0, pattern(42, 512), 1));
  const Call call = side.next();
  side.send({kCommandEnd, static_cast<double>(session)});
  CHECK(side.await(side.barrier()));
  sendAll(lane.fd, laneRequest(64 * 1024, pattern(43, 512), 2));
  CHECK(side.sessionEnds.empty());
  side.complete(call);
  CHECK_EQUAL(replyTo(lane, 1), uint32_t{kOk});
  CHECK(side.wait([&] { return side.sessionEnds.count(session) != 0; }));
  CHECK_EQUAL(side.sessionEnds[session], static_cast<int>(SessionEnd::Closed));
  side.send({kCommandEnd, static_cast<double>(session)});
  CHECK(side.read(64 * 1024, 512) == Bytes(512));
  uint8_t byte;
  CHECK(!lane.receive(&byte, 1));
});

const Register drop("lane: dropped with writes on the way, and opened again", [] {
  Primary primary;
  const Bytes data = pattern(44, 4096);
  const size_t descriptors = openDescriptors();
  for (uint32_t round = 1; round <= 20; round++) {
    primary.begin(0, data);
    primary.begin(8192, data);
    if (round == 3) primary.side.send({kCommandDrop, 999});  // nobody's
    primary.side.send({kCommandDrop, static_cast<double>(round)});
    primary.lost(2);
    for (int i = 0; i < 2; i++) CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
    CHECK_EQUAL(primary.side.laneEnds[0], round);
    uint8_t byte;
    CHECK(!primary.peer->receive(&byte, 1));
    primary.side.send({kCommandDrop, static_cast<double>(round)});  // it has ended
    primary.side.laneEnds.clear();
    primary.side.order.clear();
    primary.peer = std::make_unique<Peer>(primary.side.openLane(round + 1));
  }
  primary.writeThrough(0, data);
  CHECK_EQUAL(openDescriptors(), descriptors);
});

const Register closing("lane: an export that is closed with writes on the way", [] {
  for (const bool full : {false, true}) {
    Primary primary;
    const size_t count = full ? 30 : 3;
    const Bytes data = pattern(45, kLaneBytesMax);
    for (uint64_t i = 0; i < count; i++) primary.client->send(kWrite, 0, i * data.size(), data.size(), data);
    CHECK(eventually([&] { return primary.side.counter(10) == static_cast<double>(count); }));
    primary.side.send({kCommandClose, 5555, kExport});
    CHECK(primary.side.wait([&] { return primary.side.upcalls.size() == count; }));
    CHECK(primary.side.done.count(5555) == 0);
    primary.lost(count);
    CHECK(primary.side.await(5555));
    for (size_t i = 0; i < count; i++) CHECK_EQUAL(primary.client->receive().error, uint32_t{kOk});
    CHECK(primary.client->receive().ended);
  }
  // One whose lane is all it has; and one that had ended before.
  for (const bool ended : {false, true}) {
    Side side;
    Peer peer(side.openLane());
    if (ended) peer.close();
    side.send({kCommandClose, 5555, kExport});
    CHECK(side.await(5555));
    CHECK_EQUAL(side.laneEnds.size(), size_t{1});
  }
});

const Register stopping("lane: a datapath that stops with writes on the way", [] {
  const Bytes data = pattern(46, kLaneBytesMax);
  for (int state = 0; state < 5; state++) {
    Primary primary;
    const size_t count = state == 1 ? 30 : 3;
    for (uint64_t i = 0; i < count; i++) primary.client->send(kWrite, 0, i * data.size(), data.size(), data);
    CHECK(eventually([&] { return primary.side.counter(10) == static_cast<double>(count); }));
    if (state == 2) primary.peer->close();
    if (state == 3) primary.side.send({kCommandDrop, 1});
    if (state == 4) {
      primary.peer->close();
      primary.side.next();
    }
    const double barrier = primary.side.barrier();
    primary.side.datapath().stop();
    CHECK(barrier > 0);
  }
  // One that has not begun, and one with writes at both ends.
  Side side;
  Peer peer(side.openLane());
  side.datapath().stop();
  Mirror mirror;
  mirror.there.setDirect(0, false);
  auto client = mirror.here.connect();
  client->send(kWrite, 0, 0, 512, pattern(47, 512));
  mirror.there.next();
});

const Register shared("lane: one that ended is not told of its socket, which somebody else still has", [] {
  Primary primary;
  const Pair pair = socketPair();
  const int kept = fcntl(pair.theirs, F_DUPFD_CLOEXEC, 3);
  Side side;
  side.datapath().openLane(kExport, 1, 0, pair.theirs);
  ::close(pair.ours);
  CHECK(side.wait([&] { return side.laneEnds.size() == 1; }));
  auto client = side.connect();
  pass(*client);
  pass(*client);
  ::close(kept);
});

// --- load ----------------------------------------------------------------------------------------------------------

/// The policy of a load: one upcall after the other.
class Both {
 public:
  explicit Both(Mirror& mirror) : mirror_(mirror) {}

  void handle(const Call& call) {
    Side& here = mirror_.here;
    Side& there = mirror_.there;
    if (call.kind == static_cast<uint32_t>(UpcallKind::Write)) {
      if (here.held(call.offset, call.length)) CHECK(here.await(here.barrier()));
      Bytes payload(call.length);
      CHECK(here.datapath().readPayload(call.index, 0, payload.data(), payload.size()));
      CHECK(here.writeHere(call.index, call.offset, call.length));
      const uint32_t index = there.datapath().adopt(kExport, UpcallKind::Write, call.offset, call.length, payload.data());
      CHECK(there.writeHere(index, call.offset, call.length));
      there.send({kCommandComplete, static_cast<double>(index), 0});
      here.release(call.offset, call.length);
    }
    here.complete(call);
    handled++;
  }
  uint64_t handled = 0;

 private:
  Mirror& mirror_;
};

/// Each client sends so many overlapping writes; then the sides are compared: what differs would be covered by later ones.
void loadRound(Mirror& mirror, Both& policy, std::vector<std::unique_ptr<Client>>& clients, uint32_t round, uint32_t dropped) {
  constexpr uint32_t kWindow = 8, kRequests = 24;
  std::atomic<uint32_t> running{static_cast<uint32_t>(clients.size())}, failures{0};
  std::vector<std::thread> threads;
  for (uint32_t c = 0; c < clients.size(); c++) {
    threads.emplace_back([&, c] {
      Random random(100 * round + c);
      try {
        for (uint32_t sent = 0, got = 0; got < kRequests;) {
          if (sent < kRequests && sent - got < kWindow) {
            const uint64_t length = random.chance(3) ? 96 * 1024 : random.chance(10) ? kLaneBytesMax : 512 * (1 + random.below(24));
            // Half of them close to each other.
            const uint64_t offset = random.below(((random.chance(50) ? mirror.here.size : 128 * 1024) - length) / 512) * 512;
            clients[c]->send(kWrite, random.chance(3) ? kFlagFua : 0, offset, length, Bytes(length, static_cast<uint8_t>(random.next())));
            sent++;
            continue;
          }
          const Client::Reply reply = clients[c]->receive();
          CHECK(!reply.ended && reply.error == kOk);
          got++;
        }
      } catch (const Failure& failure) {
        fprintf(stderr, "# client %u: %s\n", c, failure.what.c_str());
        failures++;
      }
      running--;
      mirror.here.nudge();
    });
  }
  bool good = true;
  try {
    while (running > 0) {
      mirror.here.wait([&] { return !mirror.here.upcalls.empty() || running == 0; });
      if (dropped != 0) {
        // A lane that is lost under load: nothing comes from it any more before what was on its way is made again.
        mirror.here.send({kCommandDrop, static_cast<double>(dropped)});
        CHECK(mirror.here.wait([&] { return mirror.here.laneEnds.size() == dropped; }));
        CHECK(mirror.there.wait([&] { return mirror.there.sessionEnds.count(1000 + dropped) != 0; }));
        mirror.join((dropped - 1) % 2);
        dropped = 0;
      }
      if (!mirror.here.upcalls.empty()) policy.handle(mirror.here.next());
    }
    CHECK_EQUAL(failures.load(), 0u);
    CHECK(mirror.here.upcalls.empty());
    CHECK(!mirror.here.anyTaken());
    CHECK(mirror.here.read(0, mirror.here.size) == mirror.there.read(0, mirror.there.size));
  } catch (const Failure& failure) {
    fprintf(stderr, "# round %u: %s\n", round, failure.what.c_str());
    good = false;
  }
  if (!good) {
    for (auto& client : clients) ::shutdown(client->fd, SHUT_RDWR);
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(good);
}

const Register load("lane: both sides are equal after loads of overlapping writes", [] {
  SideOptions options;
  options.threads = 2;
  options.size = 256 * 1024;
  Mirror mirror(options);
  Both policy(mirror);
  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 4; i++) clients.push_back(mirror.here.connect());
  uint32_t dropped = 0;
  for (uint32_t round = 0; round < 40; round++) loadRound(mirror, policy, clients, round, round % 10 == 5 ? ++dropped : 0);
  // It was a load of lanes, and of upcalls.
  CHECK(mirror.here.counter(10) > 200);
  CHECK(policy.handled > 100);
});

}  // namespace
}  // namespace nbd::test

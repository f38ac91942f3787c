// One NBD session in its transmission phase. All of it runs on one I/O thread.
//
//   open ──────> draining ──────> flushing ──────> closed
//   requests     no more is       nothing in       descriptor closed, the policy
//   are read     read; those in   flight; what is  has been told why
//                flight go on     queued leaves
//
// Input, by phase (a blocked phase leaves the bytes where they are; the socket is then not read either):
//
//   Header         the next request
//   InPlace        the payload of a write, piece by piece to its slot as long as all direct bits are 1
//   Gather         from the first piece with a direct bit of 0: the rest becomes one upcall
//   Discard        the payload of a request that is answered with an error
//   StatusPayload  the context filter of an extended BLOCK_STATUS
//   PieceWait      a piece of a large payload is with the policy, the rest follows when it is done
//   ReadWait       a read that waits for memory
//
// Memory for payloads and replies is counted, a connection and altogether (shared.h). Where there is none, a connection
// that holds some waits for its own requests, which never need more; one that holds none goes on with the little that is
// always there, in pieces: payloads as several upcalls, reads as streams. So nobody ever waits for another client, who
// may have stopped for good.
//
// Nothing is held while the client stalls: direct bits are looked at when the bytes of a piece are there, and a member
// access begins and ends between two looks at the command queue.
#pragma once

#include <sys/types.h>

#include "buffers.h"
#include "engine.h"
#include "parser.h"
#include "shared.h"

namespace nbd {

struct SessionOptions {
  int fd = -1;
  uint32_t id = 0;
  SessionRules rules;
  std::vector<uint32_t> contexts;
  std::vector<uint8_t> received;
  bool lane = false;  // of a peer's mirror: checksummed writes only (lane.h)
};

class Connection {
 public:
  enum class State : uint8_t { Open, Draining, Flushing, Closed };

  Connection(Loop& loop, Export& target, SessionOptions options);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// First call on the I/O thread.
  void attach();
  void onEvent(uint32_t events);
  /// Parses, executes, receives and sends until there is nothing to do, or others should have a turn.
  void turn();
  /// Waits for the next request without sleeping, after requests that came one by one. True where one came.
  bool poll();
  /// Whether the requests of late came one by one, each soon after the last reply.
  bool spinnable() const;
  /// How long the client will be busy with replies that it has not read yet, as far as its pace so far tells;
  /// microseconds. 0 where it may be waiting for us.
  uint64_t backlog(uint64_t now);
  void spinEnded(bool successful);

  void complete(Upcall* upcall, uint32_t error);
  void completeStatus(Upcall* upcall, const std::vector<uint8_t>& body);
  void readFinished(ReadJob* job);
  void adviseFinished(AdviseJob* job);

  /// No more requests are read; those in flight are answered.
  void end(SessionEnd reason);
  /// The socket is dead or is to be.
  void cut(SessionEnd reason);

  /// The loop ends: forgets what is in flight, which nobody will answer.
  void abandon();

  State state() const { return state_; }
  Mode mode() const { return mode_; }  // from any thread
  uint32_t loopIndex() const;            // from any thread
  Export& target() { return target_; }
  uint32_t id() const { return id_; }
  uint32_t inFlight() const { return inFlight_; }
  uint64_t deadline() const { return deadline_; }

  // Links of the loop's lists.
  bool touched = false;
  size_t place = 0;

 private:
  enum class Phase : uint8_t { Header, InPlace, Gather, Discard, StatusPayload, PieceWait, ReadWait };

  /// A read above kReadWholeMax, or a piece of one. `raw`: nothing may come between its bytes (simple mode, DF).
  struct Stream {
    bool active = false;
    bool raw = false;
    bool waiting = false;  // a piece is in an engine
    bool begun = false;    // the header is out
    bool failed = false;   // raw structured: zeros follow, then an error chunk
    uint64_t failedOffset = 0;
    Request request;
    uint64_t position = 0;
  };

  // connection.cc
  /// True where it stopped because something is exhausted, false where it needs more bytes.
  bool work();
  bool blocked() const;
  bool stalled() const;
  bool streamCanGoOn() const;
  bool reserve(uint64_t bytes);
  void chargeReplies();
  bool takeRequest();
  void execute();
  ssize_t receive();
  void settleInput();
  void flush();
  void wantWritable(bool wanted);
  void enter(State next);
  void settle();
  OutQueue& replies() { return stream_.active && stream_.raw ? held_ : out_; }
  void reply(const Request& request, uint32_t error);
  Upcall* upcall(const Request& request, UpcallKind kind, uint64_t offset, uint64_t length);
  void discard(uint32_t error);
  bool takeDiscard();
  bool takeStatusPayload();
  void statusUpcall(const Request& request, uint64_t length, uint64_t mask);
  void cache(const Request& request);
  size_t inputSize() const { return input_ == nullptr ? 0 : input_->size(); }
  void dropInput(size_t bytes);
  void discharge(uint64_t bytes);
  ExportCounters& counters();

  // connection_write.cc
  void startWrite();
  bool takeInPlace();
  bool takeGather();
  bool mapDirect(const Tables& tables, uint64_t offset, uint64_t length, uint8_t* data, Segments& segments) const;
  bool mayWriteAlone() const;
  bool laneIntact();
  bool writeOnLane(bool* torn);
  void writeDone();
  void gatherDone();
  void pieceDone(const Upcall* call, uint32_t error);

  // connection_read.cc
  struct Plan {
    size_t bytes = 0;
    bool broken = false;
    uint64_t brokenOffset = 0;
  };
  struct Part {
    uint64_t offset, length;  // export bytes
    bool first, last;         // of the request
  };
  void executeRead(const Request& request);
  void widen();
  bool retryRead();
  bool readLater(const Request& request, const Part& part, bool stream);
  void readWithLittle(const Request& request);
  size_t planBound(const Request& request, uint64_t length) const;
  Plan planRead(uint8_t* at, const Request& request, const Part& part, Segments& segments);
  Plan planRaw(uint8_t* at, const Request& request, const Part& part, const Tables& tables, Segments& segments);
  Plan planChunks(uint8_t* at, const Request& request, const Part& part, const Tables& tables, Segments& segments);
  void readFailed(const Request& request);
  void startStream(const Request& request);
  void pumpStream();
  void streamAdvanced(uint64_t bytes);
  void streamFailed(uint64_t offset);
  void endStream();

  Export& target_;
  Loop& loop_;
  int fd_;
  const uint32_t id_;
  RequestParser parser_;
  const Mode mode_;
  const bool lane_;
  std::vector<uint32_t> contexts_;
  std::vector<uint8_t> received_;

  State state_ = State::Open;
  SessionEnd reason_ = SessionEnd::Closed;
  Phase phase_ = Phase::Header;
  bool readable_ = true;
  bool hangupSeen_ = false;     // the socket says so; what it still holds is read first
  bool broken_ = false;         // sending is pointless
  bool full_ = false;           // the socket takes nothing
  bool writableWanted_ = false;
  bool local_ = false;  // a unix socket
  bool widenTried_ = false;
  bool wide_ = false;  // its buffer in the kernel is counted
  bool waitsForMemory_ = false;  // until a request of this connection gives some back
  uint64_t deadline_ = 0;       // microseconds; 0 = none

  Chunk* input_ = nullptr;
  OutQueue out_;
  OutQueue held_;  // replies that have to wait for the end of a raw stream

  uint32_t inFlight_ = 0;
  uint64_t inFlightBytes_ = 0;
  uint64_t replyBytesCharged_ = 0;  // memory of out_ and held_

  Request current_;          // of the phases after Header
  uint64_t writeOffset_ = 0;  // InPlace: where the next piece goes; Gather: where the payload begins
  Payload* payload_ = nullptr;
  uint64_t gathered_ = 0;
  uint32_t discardError_ = 0;
  uint8_t statusPayload_[8 + 4 * 64];
  uint32_t statusFilled_ = 0;
  Stream stream_;

  // Ping-pong detection, see spinnable().
  uint32_t requestsInTurn_ = 0;
  int32_t singles_ = 0;
  int32_t spinPenalty_ = 0;

  // The client's pace, see backlog().
  uint32_t requestsSince_ = 0;
  uint64_t replyBytesSince_ = 0;
  uint64_t backlogFrom_ = 0;
  uint64_t gap_ = 0;  // microseconds between two requests, averaged
};

}  // namespace nbd

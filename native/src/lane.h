// A lane takes writes to the other side of a mirror while they are made here, without a decision: one TCP connection of one
// I/O thread to the datapath of the peer, which serves it as a session (connection.h) that may do nothing but write.
//
//   write, all direct bits 1 ──> blocks taken (claims.h) ──> in place here ──> request on the lane ──reply──> answered
//                                                                                  │
//                                            lane lost, or the peer failed ────────┴──> upcall `write`, half done
//
// The bytes are NBD requests and simple replies (NBD specification, "Transmission"). The cookie guards them: its high half is
// the CRC-32C of the rest of the header and the payload, the low half the place of the request here and a serial number. Who
// serves the lane checks it before anything is written, and a reply has to carry all of it.
//
// What always holds:
//  - From the answer here to the answer there, or the upcall, a write belongs to an epoch of its lane: barriers of its export wait for
//    it, and no others. A peer that does not answer holds up nobody but its own volume.
//  - A lane that was lost says so (event LaneEnd) before the upcalls of what was on its way, in one batch.
//  - The payload is charged to its connection until the end, so clients bound what is on a lane.
#pragma once

#include <deque>
#include <vector>

#include "crc32c.h"
#include "shared.h"
#include "wire.h"

namespace nbd {

/// A write larger than this is the policy's.
constexpr uint64_t kLaneBytesMax = 64 * 1024;

/// What the high half of a cookie has to be. `low` is its low half.
inline uint32_t laneChecksum(uint16_t flags, uint32_t low, uint64_t offset, uint64_t length, const void* payload) {
  uint8_t head[24];
  uint8_t* at = put16(head, flags);
  at = put16(at, kWrite);
  at = put32(at, low);
  at = put64(at, offset);
  put64(at, length);
  return crc32c(crc32c(0, head, sizeof head), payload, length);
}

class Lane {
 public:
  Lane(Loop& loop, Export& target, int fd, uint32_t id);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  /// First call on the I/O thread. False: it ended at once.
  bool attach();
  bool full() const { return inFlight_ >= kOpsMax; }
  /// Sends the write, which was made here and whose blocks are taken; at the latest when the loop's turn ends.
  void begin(Upcall* call);
  /// The barrier is passed once more when nothing is on the way that is now. Nothing is on the way: no.
  void fence(Barrier* barrier);
  /// Takes replies, and sends on. False: it has ended.
  bool onEvent(uint32_t events);
  bool flush();
  /// Since when the peer has owed the oldest answer, or has taken nothing of what there is to send; microseconds, 0 where neither.
  uint64_t stalledSince() const;
  /// What is on the way becomes upcalls. The owner deletes it.
  void end();
  /// The loop ends: forgets what is on the way.
  void abandon();

  Export& target() { return target_; }
  uint32_t id() const { return id_; }
  bool queued = false;  // in the loop's list of lanes that have something to send

 private:
  static constexpr uint32_t kOpsMax = 4096;

  struct Op {
    Upcall* call = nullptr;  // null = free
    uint64_t cookie = 0;
    uint64_t epoch = 0;
    uint64_t sentAt = 0;  // microseconds; 0 = not all of it is out
    uint8_t header[kRequestSize];
  };

  bool receive();
  bool settle(uint32_t error, uint64_t cookie);
  void release(Op& op);
  void giveUp(Upcall* call);
  void settleFences();
  void wantWritable(bool wanted);

  Loop& loop_;
  Export& target_;
  int fd_;
  const uint32_t id_;
  bool writableWanted_ = false;
  std::vector<Op> ops_;
  std::vector<uint16_t> free_;
  uint16_t serial_ = 0;
  uint32_t inFlight_ = 0;
  uint64_t movedAt_ = 0;  // when bytes were last taken, or began to wait

  // Ops to send, by place; of the first, `sentBytes_` are out.
  std::vector<uint16_t> toSend_;
  size_t toSendAt_ = 0;
  uint64_t sentBytes_ = 0;

  uint8_t input_[4096];
  size_t inputSize_ = 0;

  // What is on the way, by epoch; a fence starts a new one.
  struct Fence {
    uint64_t epoch;
    Barrier* barrier;
  };
  std::deque<uint64_t> epochs_{0};
  uint64_t epochFirst_ = 0;
  std::deque<Fence> fences_;
};

}  // namespace nbd

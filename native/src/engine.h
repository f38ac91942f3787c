// Reads that would wait for a disk. An I/O thread prepares the whole reply in a chunk, with segments that point into it;
// an engine fills them and hands the read back to that thread. Two engines: io_uring (uring.h), and the waiting pool.
#pragma once

#include "buffers.h"
#include "shared.h"

namespace nbd {

/// A job that a pool or ring does for an I/O thread.
class LoopJob : public Task {
 public:
  Loop* loop = nullptr;
  LoopJob* nextDone = nullptr;
  IoError error;

  /// On the I/O thread; deletes the job.
  virtual void finished() = 0;
  void cancel() override;
};

class ReadJob final : public LoopJob {
 public:
  Connection* connection = nullptr;
  Request request;
  Chunk* chunk = nullptr;  // the reply, ready but for the bytes of the segments
  Segments segments;
  uint64_t epoch = 0;
  uint64_t charged = 0;
  uint64_t length = 0;  // export bytes
  bool stream = false;  // a piece of a streamed read

  // io_uring only.
  std::vector<uint64_t> filled;  // bytes read, a segment each
  uint32_t pending = 0;

  void run(WorkerContext& context) override;
  void finished() override;
};

/// Read-ahead for NBD_CMD_CACHE.
class AdviseJob final : public LoopJob {
 public:
  Connection* connection = nullptr;
  Request request;
  Segments segments;  // data is null
  uint64_t epoch = 0;

  void run(WorkerContext& context) override;
  void finished() override;
};

}  // namespace nbd

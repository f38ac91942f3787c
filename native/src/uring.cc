#include "uring.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "assert.h"

namespace nbd {

namespace {

constexpr unsigned kEntries = 256;

int ringSetup(unsigned entries, io_uring_params* params) {
  return static_cast<int>(syscall(__NR_io_uring_setup, entries, params));
}

int ringEnter(int fd, unsigned submit, unsigned wait, unsigned flags) {
  return static_cast<int>(syscall(__NR_io_uring_enter, fd, submit, wait, flags, nullptr, 0));
}

int ringRegister(int fd, unsigned operation, const void* argument, unsigned count) {
  return static_cast<int>(syscall(__NR_io_uring_register, fd, operation, argument, count));
}

}  // namespace

bool Uring::available() {
  io_uring_params params{};
  const int fd = ringSetup(4, &params);
  if (fd < 0) return false;
  ::close(fd);
  // Both rings in one mapping, and plain reads: kernels since 5.6.
  return (params.features & IORING_FEAT_SINGLE_MMAP) != 0 && (params.features & IORING_FEAT_RW_CUR_POS) != 0;
}

bool Uring::open(const Layout& layout, MemberCounters* counters, int eventFd) {
  layout_ = &layout;
  counters_ = counters;
  io_uring_params params{};
  fd_ = ringSetup(kEntries, &params);
  if (fd_ < 0) return false;
  const size_t sqBytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
  const size_t cqBytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  ringBytes_ = sqBytes > cqBytes ? sqBytes : cqBytes;
  ringMemory_ = mmap(nullptr, ringBytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, IORING_OFF_SQ_RING);
  entriesBytes_ = params.sq_entries * sizeof(io_uring_sqe);
  void* entries = mmap(nullptr, entriesBytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, IORING_OFF_SQES);
  if (ringMemory_ == MAP_FAILED || entries == MAP_FAILED ||
      ringRegister(fd_, IORING_REGISTER_EVENTFD, &eventFd, 1) < 0) {
    if (ringMemory_ == MAP_FAILED) ringMemory_ = nullptr;
    entries_ = entries == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(entries);
    close();
    return false;
  }
  entries_ = static_cast<io_uring_sqe*>(entries);
  uint8_t* ring = static_cast<uint8_t*>(ringMemory_);
  sqHead_ = reinterpret_cast<unsigned*>(ring + params.sq_off.head);
  sqTail_ = reinterpret_cast<unsigned*>(ring + params.sq_off.tail);
  sqArray_ = reinterpret_cast<unsigned*>(ring + params.sq_off.array);
  sqMask_ = *reinterpret_cast<unsigned*>(ring + params.sq_off.ring_mask);
  sqSize_ = params.sq_entries;
  cqHead_ = reinterpret_cast<unsigned*>(ring + params.cq_off.head);
  cqTail_ = reinterpret_cast<unsigned*>(ring + params.cq_off.tail);
  cqMask_ = *reinterpret_cast<unsigned*>(ring + params.cq_off.ring_mask);
  completions_ = reinterpret_cast<io_uring_cqe*>(ring + params.cq_off.cqes);
  // No more in flight than completions fit: the ring never overflows.
  items_.resize(params.cq_entries);
  for (uint32_t i = params.cq_entries; i-- > 0;) freeItems_.push_back(i);
  return true;
}

Uring::~Uring() {
  NBD_ASSERT(inFlight_ == 0);
  close();
}

void Uring::close() {
  if (entries_ != nullptr) munmap(entries_, entriesBytes_);
  if (ringMemory_ != nullptr) munmap(ringMemory_, ringBytes_);
  if (fd_ >= 0) ::close(fd_);
  entries_ = nullptr;
  ringMemory_ = nullptr;
  fd_ = -1;
}

void Uring::submit(ReadJob* job) {
  job->pending = static_cast<uint32_t>(job->segments.size());
  job->filled.assign(job->segments.size(), 0);
  for (uint32_t i = 0; i < job->segments.size(); i++) backlog_.push_back({job, i, false});
  pump();
}

void Uring::pump() {
  while (!backlog_.empty() && !freeItems_.empty()) {
    if (unsubmitted_ == sqSize_) {
      kick();
      if (unsubmitted_ == sqSize_) return;
    }
    prepare(backlog_.front());
    backlog_.pop_front();
  }
}

void Uring::prepare(const Item& item) {
  const uint32_t id = freeItems_.back();
  freeItems_.pop_back();
  items_[id] = item;
  const Segment& segment = item.job->segments[item.segment];
  const uint64_t filled = item.job->filled[item.segment];
  const unsigned tail = *sqTail_;
  io_uring_sqe* entry = entries_ + (tail & sqMask_);
  memset(entry, 0, sizeof *entry);
  entry->opcode = IORING_OP_READ;
  entry->flags = item.blocking ? IOSQE_ASYNC : 0;
  entry->fd = layout_->members[segment.member].fd;
  entry->addr = reinterpret_cast<uint64_t>(segment.data + filled);
  entry->len = static_cast<uint32_t>(segment.length - filled);
  entry->off = segment.offset + filled;
  entry->user_data = id;
  sqArray_[tail & sqMask_] = tail & sqMask_;
  __atomic_store_n(sqTail_, tail + 1, __ATOMIC_RELEASE);
  unsubmitted_++;
  inFlight_++;
}

void Uring::kick() {
  while (unsubmitted_ > 0) {
    const int taken = ringEnter(fd_, unsubmitted_, 0, 0);
    if (taken < 0) {
      if (errno == EINTR) continue;
      // EAGAIN, EBUSY: the kernel is out of something; completions will come and bring us back here.
      NBD_ASSERT(errno == EAGAIN || errno == EBUSY);
      return;
    }
    unsubmitted_ -= static_cast<unsigned>(taken);
  }
}

void Uring::reap(std::vector<ReadJob*>& done) {
  unsigned head = *cqHead_;
  while (head != __atomic_load_n(cqTail_, __ATOMIC_ACQUIRE)) {
    const io_uring_cqe completion = completions_[head & cqMask_];
    head++;
    __atomic_store_n(cqHead_, head, __ATOMIC_RELEASE);
    const uint32_t id = static_cast<uint32_t>(completion.user_data);
    Item item = items_[id];
    freeItems_.push_back(id);
    inFlight_--;
    ReadJob* job = item.job;
    const Segment& segment = job->segments[item.segment];
    uint64_t& filled = job->filled[item.segment];
    bool again = false;
    if (completion.res > 0) {
      filled += static_cast<uint64_t>(completion.res);
      again = filled < segment.length;
    } else if (completion.res == 0) {
      memset(segment.data + filled, 0, segment.length - filled);
    } else if (completion.res == -EINTR) {
      again = true;
    } else if (completion.res == -EAGAIN && !item.blocking) {
      // A page that the disk cannot give is not there either when the kernel looks again without waiting, and it says
      // so for ever: a worker of its own waits for the error.
      item.blocking = true;
      again = true;
    } else {
      const int error = completion.res == -EAGAIN ? EIO : -completion.res;
      job->error = {error, segment.member, segment.offset + filled};
    }
    if (again) {
      backlog_.push_back(item);
      continue;
    }
    counters_[segment.member].reads.add(1);
    counters_[segment.member].readBytes.add(segment.length);
    if (--job->pending == 0) done.push_back(job);
  }
  pump();
  kick();
}

}  // namespace nbd

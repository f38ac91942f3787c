// The kernel's nbd driver over generic netlink: what nbd_keep tells it, and what it hears from it.
//
// A netlink message is a header, a generic header (command, version), then attributes: length and type in 16 bits
// each, data, padding to 4 bytes. Attributes of type | kNested hold attributes. (Linux, include/uapi/linux/nbd-netlink.h.)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace keeper {

/// Attributes put together; take() hands the bytes out.
class Attributes {
 public:
  Attributes& u32(uint16_t type, uint32_t value);
  Attributes& u64(uint16_t type, uint64_t value);
  Attributes& text(uint16_t type, const std::string& value);  // with its final zero
  Attributes& nested(uint16_t type, const Attributes& inner);
  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  void append(uint16_t type, const void* data, size_t length);
  std::vector<uint8_t> bytes_;
};

/// Times of a device, in seconds.
struct Times {
  uint64_t request;  // a request unanswered for so long is sent again, on another connection where this one is dead
  uint64_t giveUp;   // how long requests wait for a dead connection to be replaced before they fail
};

/// Two netlink sockets of one process: one for commands and their answers, one for notifications.
/// Every method returns an empty string, or what went wrong.
class NbdNetlink {
 public:
  NbdNetlink() = default;
  ~NbdNetlink();
  NbdNetlink(const NbdNetlink&) = delete;
  NbdNetlink& operator=(const NbdNetlink&) = delete;

  std::string open();
  std::string setTimes(uint32_t device, Times times);
  /// Puts a connected, negotiated socket in the place of a dead one. Without a dead one the kernel ignores it.
  std::string replaceConnection(uint32_t device, int socket);
  /// To poll: readable when a notification waits.
  int notificationFd() const { return notifications_; }
  /// Takes all notifications that wait. True where one says that a connection of `device` died, or where some
  /// were lost.
  bool takeDeadLinks(uint32_t device);

 private:
  struct Reply {
    int error = 0;  // an errno, or 0
    std::vector<uint8_t> payload;
  };
  std::string command(uint16_t family, uint8_t command, uint8_t version, const Attributes& attributes, Reply* reply);

  int commands_ = -1;
  int notifications_ = -1;
  uint16_t family_ = 0;
  uint32_t sequence_ = 0;
};

}  // namespace keeper

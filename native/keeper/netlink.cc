#include "netlink.h"

#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <linux/netlink.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

namespace keeper {
namespace {

constexpr size_t kMessageMax = 32 * 1024;

size_t aligned(size_t length) { return (length + 3) & ~size_t{3}; }

std::string failed(const char* what, int error) { return std::string(what) + ": " + std::strerror(error); }

int openSocket(std::string* problem) {
  const int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
  sockaddr_nl address{};
  address.nl_family = AF_NETLINK;
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    *problem = failed("netlink socket", errno);
    if (fd >= 0) close(fd);
    return -1;
  }
  return fd;
}

/// Calls visit(type, data, length) for each attribute; stops at the first one that does not fit.
template <typename Visit>
void eachAttribute(const uint8_t* at, size_t length, Visit visit) {
  while (length >= NLA_HDRLEN) {
    uint16_t size = 0, type = 0;
    std::memcpy(&size, at, sizeof size);
    std::memcpy(&type, at + 2, sizeof type);
    if (size < NLA_HDRLEN || size > length) return;
    visit(static_cast<uint16_t>(type & NLA_TYPE_MASK), at + NLA_HDRLEN, size_t{size} - NLA_HDRLEN);
    const size_t step = aligned(size);
    if (step >= length) return;
    at += step;
    length -= step;
  }
}

/// The attribute of this type as a number; false where it is absent or has another size.
template <typename Number>
bool find(const uint8_t* at, size_t length, uint16_t wanted, Number* value) {
  bool found = false;
  eachAttribute(at, length, [&](uint16_t type, const uint8_t* data, size_t size) {
    if (type != wanted || size != sizeof(Number)) return;
    std::memcpy(value, data, size);
    found = true;
  });
  return found;
}

}  // namespace

void Attributes::append(uint16_t type, const void* data, size_t length) {
  const uint16_t size = static_cast<uint16_t>(NLA_HDRLEN + length);
  const size_t start = bytes_.size();
  bytes_.resize(start + aligned(size));
  std::memcpy(&bytes_[start], &size, sizeof size);
  std::memcpy(&bytes_[start + 2], &type, sizeof type);
  if (length > 0) std::memcpy(&bytes_[start + NLA_HDRLEN], data, length);
}

Attributes& Attributes::u32(uint16_t type, uint32_t value) {
  append(type, &value, sizeof value);
  return *this;
}

Attributes& Attributes::u64(uint16_t type, uint64_t value) {
  append(type, &value, sizeof value);
  return *this;
}

Attributes& Attributes::text(uint16_t type, const std::string& value) {
  append(type, value.c_str(), value.size() + 1);
  return *this;
}

Attributes& Attributes::nested(uint16_t type, const Attributes& inner) {
  append(type | NLA_F_NESTED, inner.bytes_.data(), inner.bytes_.size());
  return *this;
}

NbdNetlink::~NbdNetlink() {
  if (commands_ >= 0) close(commands_);
  if (notifications_ >= 0) close(notifications_);
}

std::string NbdNetlink::open() {
  std::string problem;
  commands_ = openSocket(&problem);
  if (commands_ < 0) return problem;
  notifications_ = openSocket(&problem);
  if (notifications_ < 0) return problem;

  Reply reply;
  problem = command(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, Attributes().text(CTRL_ATTR_FAMILY_NAME, NBD_GENL_FAMILY_NAME), &reply);
  if (!problem.empty()) return problem;
  if (reply.error != 0) return failed("the nbd driver has no netlink interface", reply.error);
  uint32_t group = 0;
  if (!find(reply.payload.data(), reply.payload.size(), CTRL_ATTR_FAMILY_ID, &family_)) return "no family id for nbd";
  eachAttribute(reply.payload.data(), reply.payload.size(), [&](uint16_t type, const uint8_t* groups, size_t length) {
    if (type != CTRL_ATTR_MCAST_GROUPS) return;
    // The driver has one group: nbd_mc_group.
    eachAttribute(groups, length, [&](uint16_t, const uint8_t* item, size_t size) { find(item, size, CTRL_ATTR_MCAST_GRP_ID, &group); });
  });
  if (group == 0) return "the nbd driver sends no notifications";
  if (setsockopt(notifications_, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group) != 0) {
    return failed("nbd notifications", errno);
  }
  return "";
}

std::string NbdNetlink::setTimes(uint32_t device, Times times) {
  Reply reply;
  const std::string problem = command(
      family_, NBD_CMD_RECONFIGURE, NBD_GENL_VERSION,
      Attributes().u32(NBD_ATTR_INDEX, device).u64(NBD_ATTR_TIMEOUT, times.request).u64(NBD_ATTR_DEAD_CONN_TIMEOUT, times.giveUp),
      &reply);
  if (!problem.empty()) return problem;
  return reply.error == 0 ? "" : failed("setting the device's time-outs", reply.error);
}

std::string NbdNetlink::replaceConnection(uint32_t device, int socket) {
  Attributes item, sockets;
  item.u32(NBD_SOCK_FD, static_cast<uint32_t>(socket));
  sockets.nested(NBD_SOCK_ITEM, item);
  Reply reply;
  const std::string problem = command(family_, NBD_CMD_RECONFIGURE, NBD_GENL_VERSION,
                                      Attributes().u32(NBD_ATTR_INDEX, device).nested(NBD_ATTR_SOCKETS, sockets), &reply);
  if (!problem.empty()) return problem;
  // ENOSPC: nothing is dead.
  return reply.error == 0 || reply.error == ENOSPC ? "" : failed("replacing a connection", reply.error);
}

bool NbdNetlink::takeDeadLinks(uint32_t device) {
  std::vector<uint8_t> buffer(kMessageMax);
  bool dead = false;
  for (;;) {
    const ssize_t length = recv(notifications_, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (length < 0 && errno == EINTR) continue;
    // ENOBUFS: the kernel had more to say than the socket could hold, so anything may have died.
    if (length < 0 && errno == ENOBUFS) {
      dead = true;
      continue;
    }
    if (length < static_cast<ssize_t>(NLMSG_HDRLEN + GENL_HDRLEN)) return dead;
    nlmsghdr header;
    genlmsghdr general;
    std::memcpy(&header, buffer.data(), sizeof header);
    std::memcpy(&general, buffer.data() + NLMSG_HDRLEN, sizeof general);
    uint32_t index = 0;
    const size_t start = NLMSG_HDRLEN + GENL_HDRLEN;
    if (header.nlmsg_type == family_ && general.cmd == NBD_CMD_LINK_DEAD &&
        find(buffer.data() + start, static_cast<size_t>(length) - start, NBD_ATTR_INDEX, &index) && index == device) {
      dead = true;
    }
  }
}

std::string NbdNetlink::command(uint16_t family, uint8_t command, uint8_t version, const Attributes& attributes, Reply* reply) {
  const std::vector<uint8_t>& body = attributes.bytes();
  nlmsghdr header{};
  genlmsghdr general{};
  header.nlmsg_len = static_cast<uint32_t>(NLMSG_HDRLEN + GENL_HDRLEN + body.size());
  header.nlmsg_type = family;
  header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
  header.nlmsg_seq = ++sequence_;
  general.cmd = command;
  general.version = version;
  std::vector<uint8_t> message(header.nlmsg_len);
  std::memcpy(message.data(), &header, sizeof header);
  std::memcpy(message.data() + NLMSG_HDRLEN, &general, sizeof general);
  if (!body.empty()) std::memcpy(message.data() + NLMSG_HDRLEN + GENL_HDRLEN, body.data(), body.size());
  if (send(commands_, message.data(), message.size(), 0) != static_cast<ssize_t>(message.size())) return failed("netlink", errno);

  // An answer where the command has one, then the acknowledgement with the error number.
  std::vector<uint8_t> buffer(kMessageMax);
  for (;;) {
    const ssize_t length = recv(commands_, buffer.data(), buffer.size(), 0);
    if (length < 0 && errno == EINTR) continue;
    if (length < static_cast<ssize_t>(NLMSG_HDRLEN)) return failed("netlink", length < 0 ? errno : EPROTO);
    std::memcpy(&header, buffer.data(), sizeof header);
    if (header.nlmsg_seq != sequence_) continue;
    if (header.nlmsg_type == NLMSG_ERROR) {
      int error = 0;
      if (length < static_cast<ssize_t>(NLMSG_HDRLEN + sizeof error)) return failed("netlink", EPROTO);
      std::memcpy(&error, buffer.data() + NLMSG_HDRLEN, sizeof error);
      reply->error = -error;
      return "";
    }
    const size_t start = NLMSG_HDRLEN + GENL_HDRLEN;
    if (static_cast<size_t>(length) >= start) reply->payload.assign(buffer.begin() + static_cast<std::ptrdiff_t>(start), buffer.begin() + length);
  }
}

}  // namespace keeper

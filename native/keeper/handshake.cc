#include "handshake.h"

#include <endian.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

namespace keeper {
namespace {

// NBD specification, "Newstyle negotiation" and "Option types".
constexpr char kGreeting[] = "NBDMAGICIHAVEOPT";
constexpr uint64_t kReplyMagic = 0x3e889045565a9;
constexpr uint16_t kFixedNewstyle = 1;
constexpr uint16_t kNoZeroes = 2;
constexpr uint32_t kOptionGo = 7;
constexpr uint32_t kReplyAck = 1;
constexpr uint32_t kReplyInfo = 3;
constexpr uint32_t kReplyIsError = 0x80000000;
constexpr uint16_t kInfoExport = 0;
constexpr uint32_t kReplyDataMax = 64 * 1024;
constexpr int kStepSecondsMax = 10;

std::string errorText(const char* what) { return std::string(what) + ": " + std::strerror(errno); }

void setTimeLimit(int fd, int seconds) {
  timeval limit{};
  limit.tv_sec = seconds;
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

bool readAll(int fd, void* target, size_t length) {
  auto* at = static_cast<uint8_t*>(target);
  while (length > 0) {
    const ssize_t count = recv(fd, at, length, 0);
    if (count < 0 && errno == EINTR) continue;
    if (count == 0) errno = ECONNRESET;
    if (count <= 0) return false;
    at += count;
    length -= static_cast<size_t>(count);
  }
  return true;
}

bool writeAll(int fd, const std::vector<uint8_t>& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t count = send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    done += static_cast<size_t>(count);
  }
  return true;
}

template <typename Number>
void put(std::vector<uint8_t>* bytes, Number bigEndian) {
  const auto* at = reinterpret_cast<const uint8_t*>(&bigEndian);
  bytes->insert(bytes->end(), at, at + sizeof bigEndian);
}

int connectUnix(const std::string& path, std::string* problem) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    *problem = "the socket's path is too long";
    return -1;
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) {
    *problem = errorText("socket");
    return -1;
  }
  setTimeLimit(fd, kStepSecondsMax);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return fd;
  *problem = errorText("connect");
  close(fd);
  return -1;
}

int connectTcp(const std::string& host, const std::string& port, std::string* problem) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  if (const int code = getaddrinfo(host.c_str(), port.c_str(), &hints, &list); code != 0) {
    *problem = gai_strerror(code);
    return -1;
  }
  int fd = -1;
  for (const addrinfo* at = list; at != nullptr && fd < 0; at = at->ai_next) {
    fd = socket(at->ai_family, at->ai_socktype | SOCK_CLOEXEC, at->ai_protocol);
    if (fd < 0) continue;
    setTimeLimit(fd, kStepSecondsMax);
    if (connect(fd, at->ai_addr, at->ai_addrlen) == 0) break;
    *problem = errorText("connect");
    close(fd);
    fd = -1;
  }
  freeaddrinfo(list);
  if (fd >= 0) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  }
  return fd;
}

/// NBD_OPT_GO; `size` from the export's information, which the server must send before it agrees.
std::string negotiate(int fd, const std::string& name, uint64_t* size) {
  uint8_t greeting[18];
  if (!readAll(fd, greeting, sizeof greeting)) return errorText("greeting");
  uint16_t serverFlags = 0;
  std::memcpy(&serverFlags, greeting + 16, sizeof serverFlags);
  serverFlags = be16toh(serverFlags);
  if (std::memcmp(greeting, kGreeting, 16) != 0 || (serverFlags & kFixedNewstyle) == 0) return "this is no NBD server that we can talk to";

  std::vector<uint8_t> out;
  put(&out, htobe32(kFixedNewstyle | (serverFlags & kNoZeroes)));
  out.insert(out.end(), kGreeting + 8, kGreeting + 16);
  put(&out, htobe32(kOptionGo));
  put(&out, htobe32(static_cast<uint32_t>(4 + name.size() + 2)));
  put(&out, htobe32(static_cast<uint32_t>(name.size())));
  out.insert(out.end(), name.begin(), name.end());
  put(&out, htobe16(0));  // no information beyond what is always sent
  if (!writeAll(fd, out)) return errorText("option");

  bool sized = false;
  for (;;) {
    uint8_t header[20];
    if (!readAll(fd, header, sizeof header)) return errorText("reply");
    uint64_t magic = 0;
    uint32_t option = 0, type = 0, length = 0;
    std::memcpy(&magic, header, 8);
    std::memcpy(&option, header + 8, 4);
    std::memcpy(&type, header + 12, 4);
    std::memcpy(&length, header + 16, 4);
    type = be32toh(type);
    length = be32toh(length);
    if (be64toh(magic) != kReplyMagic || be32toh(option) != kOptionGo || length > kReplyDataMax) return "garbled reply";
    std::vector<uint8_t> data(length);
    if (!readAll(fd, data.data(), data.size())) return errorText("reply");
    if ((type & kReplyIsError) != 0) return "refused: " + std::string(data.begin(), data.end());
    if (type == kReplyAck) return sized ? "" : "the server did not say the size";
    uint16_t info = 0;
    if (type != kReplyInfo || length < sizeof info) continue;
    std::memcpy(&info, data.data(), sizeof info);
    if (be16toh(info) != kInfoExport || length != 12) continue;
    std::memcpy(size, data.data() + 2, sizeof *size);
    *size = be64toh(*size);
    sized = true;
  }
}

}  // namespace

Connected connectAndNegotiate(const Server& server) {
  Connected result;
  result.socket = server.unixSocket ? connectUnix(server.path, &result.problem) : connectTcp(server.host, server.port, &result.problem);
  if (result.socket < 0) return result;
  result.problem = negotiate(result.socket, server.exportName, &result.size);
  if (!result.problem.empty()) {
    close(result.socket);
    result.socket = -1;
    return result;
  }
  // The kernel reads from this socket next, for as long as the device lives: no time limit.
  setTimeLimit(result.socket, 0);
  return result;
}

}  // namespace keeper

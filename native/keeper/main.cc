// nbd_keep: keeps a kernel nbd device connected while the daemon behind it is restarted, or killed and started again.
//
//   nbd_keep DEVICE-INDEX PID CONNECTIONS TIMEOUT GIVE-UP EXPORT unix PATH
//   nbd_keep DEVICE-INDEX PID CONNECTIONS TIMEOUT GIVE-UP EXPORT tcp HOST PORT
//
// PID is what /sys/block/nbdX/pid says of the device that is to be kept; when that changes, this program ends.
// TIMEOUT and GIVE-UP are seconds: see Times in netlink.h.
//
//   first        tells the kernel the times, in the foreground: exit status 1 and one line where it cannot
//   watching     sleeps until the kernel says that a connection died
//   reconnecting opens as many connections as the device has and offers them all: the kernel takes one for each
//                dead one. Retries for as long as the device exists, with growing pauses
//
// It holds no data: a request that was on a dead connection is still the kernel's, which sends it again. It locks
// its memory, because the disk that it waits for may be the one that its pages would come from.
#include <poll.h>
#include <sys/mman.h>
#include <syslog.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "handshake.h"
#include "netlink.h"

namespace keeper {
namespace {

constexpr int kLookMs = 2000;  // how often to see whether the device is still the one
constexpr int kPauseMsMin = 50;
constexpr int kPauseMsMax = 2000;
constexpr uint32_t kConnectionsMax = 64;

struct Device {
  uint32_t index = 0;
  std::string pid;
  uint32_t connections = 0;
  Times times{};
  Server server;

  std::string block() const { return "/sys/block/nbd" + std::to_string(index); }
};

std::string firstWord(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

bool isStillThere(const Device& device) { return firstWord(device.block() + "/pid") == device.pid; }

uint64_t deviceSize(const Device& device) { return std::strtoull(firstWord(device.block() + "/size").c_str(), nullptr, 10) * 512; }

/// Offers one new connection. The same size is asked for: anything else behind that name is not the disk that was there.
std::string reconnectOnce(NbdNetlink& netlink, const Device& device) {
  const Connected connected = connectAndNegotiate(device.server);
  if (connected.socket < 0) return connected.problem;
  std::string problem;
  if (connected.size < deviceSize(device)) {
    problem = "the volume is smaller than the disk";
  } else {
    problem = netlink.replaceConnection(device.index, connected.socket);
  }
  close(connected.socket);  // the kernel holds its own reference
  return problem;
}

void reconnect(NbdNetlink& netlink, const Device& device) {
  int pauseMs = kPauseMsMin;
  std::string last;
  for (uint32_t done = 0; done < device.connections && isStillThere(device);) {
    const std::string problem = reconnectOnce(netlink, device);
    if (problem.empty()) {
      done++;
      pauseMs = kPauseMsMin;
      continue;
    }
    if (problem != last) syslog(LOG_WARNING, "nbd%u: cannot reconnect, trying on: %s", device.index, problem.c_str());
    last = problem;
    // The next attempt starts over: connections made by a daemon that died meanwhile are dead too.
    done = 0;
    poll(nullptr, 0, pauseMs);
    pauseMs = pauseMs * 2 < kPauseMsMax ? pauseMs * 2 : kPauseMsMax;
  }
  syslog(LOG_NOTICE, "nbd%u: connected again", device.index);
}

void watch(NbdNetlink& netlink, const Device& device) {
  while (isStillThere(device)) {
    pollfd waiting{netlink.notificationFd(), POLLIN, 0};
    poll(&waiting, 1, kLookMs);
    if (netlink.takeDeadLinks(device.index)) {
      // Connections die together, and each says so: what has been said until now is one event.
      poll(nullptr, 0, kPauseMsMin);
      netlink.takeDeadLinks(device.index);
      reconnect(netlink, device);
    }
  }
}

bool parseNumber(const char* text, uint64_t max, uint64_t* value) {
  char* end = nullptr;
  *value = std::strtoull(text, &end, 10);
  return *text >= '0' && *text <= '9' && *end == '\0' && *value <= max;
}

bool parse(int count, char** words, Device* device) {
  if (count < 9) return false;
  uint64_t index = 0, pid = 0, connections = 0;
  if (!parseNumber(words[1], 1 << 20, &index) || !parseNumber(words[2], UINT32_MAX, &pid)) return false;
  if (!parseNumber(words[3], kConnectionsMax, &connections) || connections == 0) return false;
  if (!parseNumber(words[4], UINT32_MAX, &device->times.request) || !parseNumber(words[5], UINT32_MAX, &device->times.giveUp)) return false;
  device->index = static_cast<uint32_t>(index);
  device->pid = words[2];
  device->connections = static_cast<uint32_t>(connections);
  device->server.exportName = words[6];
  const std::string transport = words[7];
  device->server.unixSocket = transport == "unix";
  if (transport == "unix" && count == 9) {
    device->server.path = words[8];
    return true;
  }
  if (transport == "tcp" && count == 10) {
    device->server.host = words[8];
    device->server.port = words[9];
    return true;
  }
  return false;
}

int fail(const std::string& problem) {
  std::fprintf(stderr, "nbd_keep: %s\n", problem.c_str());
  return 1;
}

int run(int count, char** words) {
  Device device;
  if (!parse(count, words, &device)) {
    fail("usage: nbd_keep DEVICE-INDEX PID CONNECTIONS TIMEOUT GIVE-UP EXPORT (unix PATH | tcp HOST PORT)");
    return 2;
  }
  if (!isStillThere(device)) return fail("nbd" + std::to_string(device.index) + " is not connected by process " + device.pid);
  NbdNetlink netlink;
  std::string problem = netlink.open();
  if (problem.empty()) problem = netlink.setTimes(device.index, device.times);
  if (!problem.empty()) return fail(problem);
  // Its own session, no controlling terminal, no open files: it outlives whoever started it.
  if (daemon(0, 0) != 0) return fail(std::string("cannot go to the background: ") + std::strerror(errno));
  openlog("nbd_keep", LOG_PID, LOG_DAEMON);
  if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0) syslog(LOG_WARNING, "memory is not locked: %m");
  watch(netlink, device);
  return 0;
}

}  // namespace
}  // namespace keeper

int main(int count, char** words) { return keeper::run(count, words); }

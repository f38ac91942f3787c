// Connects to an NBD server and negotiates up to the transmission phase, as the kernel's driver wants its sockets:
// fixed newstyle, one export by NBD_OPT_GO, simple replies. Blocking, with a time limit on each step.
#pragma once

#include <cstdint>
#include <string>

namespace keeper {

struct Server {
  bool unixSocket = true;
  std::string path;  // of the unix socket
  std::string host, port;
  std::string exportName;
};

struct Connected {
  int socket = -1;      // the caller's to close; -1 where `problem` says why there is none
  uint64_t size = 0;    // bytes of the export
  std::string problem;
};

Connected connectAndNegotiate(const Server& server);

}  // namespace keeper

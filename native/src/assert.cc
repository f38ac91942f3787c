#include "assert.h"

#include <cstdio>
#include <cstdlib>

namespace nbd {

void assertionFailed(const char* condition, const char* file, int line) {
  fprintf(stderr, "node-nbd: assertion failed: %s (%s:%d)\n", condition, file, line);
  fflush(stderr);
  abort();
}

}  // namespace nbd

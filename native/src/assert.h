// What this program promises itself. A failure is our own bug: the process stops before it harms stored data.
#pragma once

namespace nbd {

[[noreturn]] void assertionFailed(const char* condition, const char* file, int line);

}  // namespace nbd

#define NBD_ASSERT(condition) \
  (__builtin_expect(!!(condition), 1) ? static_cast<void>(0) : ::nbd::assertionFailed(#condition, __FILE__, __LINE__))

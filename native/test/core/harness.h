// A small test harness. A test is a function; CHECK leaves it by an exception, so that what it holds is given back. Each
// test prints one line that native/test/run turns into TAP: "ok name", "not ok name" or "ok name # SKIP reason".
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>

namespace nbd::test {

struct Failure {
  std::string what;
};
struct Skip {
  std::string why;
};

[[noreturn]] void failed(const char* condition, const char* file, int line, const std::string& detail = "");

/// Registers a test; tests run in the order of their registration.
struct Register {
  Register(std::string name, std::function<void()> body);
};

/// Deterministic numbers (splitmix64): a seed names a run on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// 0 .. bound - 1
  uint64_t below(uint64_t bound) { return next() % bound; }
  bool chance(unsigned percent) { return below(100) < percent; }

 private:
  uint64_t state_;
};

/// Polls for a condition until a deadline.
template <typename Condition>
bool eventually(Condition condition, int seconds = 20) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

}  // namespace nbd::test

#define CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::nbd::test::failed(#condition, __FILE__, __LINE__))
#define CHECK_EQUAL(a, b)                                                                                   \
  do {                                                                                                      \
    const auto left_ = (a);                                                                                 \
    const auto right_ = (b);                                                                                \
    if (!(left_ == right_))                                                                                 \
      ::nbd::test::failed(#a " == " #b, __FILE__, __LINE__, std::to_string(left_) + " / " + std::to_string(right_)); \
  } while (false)

// The smallest test framework: tests register themselves, a failed check says where and which values, and the program
// prints one TAP line a test. A test that hangs is ended by a watchdog, so that a lost wake-up is a failure with a name.
#pragma once

#include <cstdint>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

namespace test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all() {
  static std::vector<Test> tests;
  return tests;
}

struct Register {
  Register(const char* name, void (*run)()) { all().push_back({name, run}); }
};

/// Counted by main (harness.cc).
extern int failures;
void failed(const char* file, int line, const std::string& what);
/// Seed of the random numbers of this run; printed with every failure.
extern uint64_t seed;

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << text << ": " << a << " is not " << b;
  failed(file, line, out.str());
}

/// Small, fast, and the same everywhere.
class Random {
 public:
  explicit Random(uint64_t from) : state_(from * 0x9e3779b97f4a7c15ull + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  /// 0 <= result < bound
  uint64_t below(uint64_t bound) { return next() % bound; }

 private:
  uint64_t state_;
};

}  // namespace test

#define TEST_JOIN2(a, b) a##b
#define TEST_JOIN(a, b) TEST_JOIN2(a, b)
#define TEST(name)                                                                                   \
  static void TEST_JOIN(testRun, __LINE__)();                                                        \
  static ::test::Register TEST_JOIN(testRegister, __LINE__)(name, &TEST_JOIN(testRun, __LINE__));    \
  static void TEST_JOIN(testRun, __LINE__)()

#define CHECK(condition) \
  ((condition) ? static_cast<void>(0) : ::test::failed(__FILE__, __LINE__, #condition))
#define CHECK_EQUAL(a, b) ::test::equal((a), (b), #a " == " #b, __FILE__, __LINE__)

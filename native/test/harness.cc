#include "harness.h"

#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

namespace test {

int failures = 0;
uint64_t seed = 0;

void failed(const char* file, int line, const std::string& what) {
  failures++;
  if (failures <= 20) printf("# %s:%d: %s (seed %llu)\n", file, line, what.c_str(), static_cast<unsigned long long>(seed));
  fflush(stdout);
}

}  // namespace test

namespace {

constexpr unsigned kSecondsMax = 120;
const char* running = "";

void onAlarm(int) {
  const char* parts[] = {"not ok - ", running, " # does not end\n"};
  for (const char* part : parts) {
    if (write(1, part, strlen(part)) < 0) break;
  }
  abort();  // with a core, or a sanitizer's report of all threads
}

}  // namespace

/// Usage: program [LABEL [NAME]]: the label goes into each line, NAME is part of the names of the tests to run.
int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGALRM, onAlarm);
  const char* given = getenv("TEST_SEED");
  test::seed = given != nullptr
                   ? strtoull(given, nullptr, 10)
                   : static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  const std::string label = argc > 1 && argv[1][0] != 0 ? std::string(argv[1]) + ": " : "";
  int notOk = 0;
  for (const test::Test& one : test::all()) {
    if (argc > 2 && strstr(one.name, argv[2]) == nullptr) continue;
    test::failures = 0;
    running = one.name;
    alarm(kSecondsMax);
    one.run();
    alarm(0);
    printf("%s - %s%s\n", test::failures == 0 ? "ok" : "not ok", label.c_str(), one.name);
    if (test::failures > 0) notOk++;
  }
  return notOk == 0 ? 0 : 1;
}

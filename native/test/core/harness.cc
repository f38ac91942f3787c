#include "harness.h"

#include <cstdio>
#include <cstring>
#include <vector>

namespace nbd::test {

namespace {

struct Case {
  std::string name;
  std::function<void()> body;
};

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

}  // namespace

Register::Register(std::string name, std::function<void()> body) { cases().push_back({std::move(name), std::move(body)}); }

void failed(const char* condition, const char* file, int line, const std::string& detail) {
  const char* slash = strrchr(file, '/');
  throw Failure{std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line) + ": " + condition +
                (detail.empty() ? "" : " (" + detail + ")")};
}

}  // namespace nbd::test

/// Arguments: words; only tests whose names contain one of them run.
int main(int count, char** words) {
  using namespace nbd::test;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  bool good = true;
  for (const Case& one : cases()) {
    bool wanted = count < 2;
    for (int i = 1; i < count; i++) wanted = wanted || one.name.find(words[i]) != std::string::npos;
    if (!wanted) continue;
    try {
      one.body();
      printf("ok %s\n", one.name.c_str());
    } catch (const Skip& skip) {
      printf("ok %s # SKIP %s\n", one.name.c_str(), skip.why.c_str());
    } catch (const Failure& failure) {
      good = false;
      fprintf(stderr, "# %s\n", failure.what.c_str());
      printf("not ok %s\n", one.name.c_str());
    }
  }
  // The line that a crash or a sanitizer's exit would leave out.
  printf("end\n");
  return good ? 0 : 1;
}

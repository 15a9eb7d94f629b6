// The little that these tests need of a framework: count, report, and an exit status.

#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition) && ++failures() <= 20) {                     \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

inline int finish(const char* name) {
  std::printf("%s: %d failed checks\n", name, failures());
  return failures() == 0 ? 0 : 1;
}

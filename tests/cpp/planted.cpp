// Faults for sanitizers to find (tools/sanitize.py): a build that does not report them proves nothing.

#include <climits>
#include <cstring>
#include <thread>

int main(int, char** arguments) {
  const auto wanted = [&](const char* fault) { return !std::strcmp(arguments[1], fault); };
  volatile int count = 3;
  int* volatile numbers = new int[3]{};
  int sum = 0;
  if (wanted("read")) sum = numbers[count];
  if (wanted("overflow")) sum = INT_MAX - 2 + count;
  if (wanted("race")) {
    std::thread other([&] { ++numbers[0]; });
    ++numbers[0];
    other.join();
  }
  if (wanted("leak")) {
    numbers = nullptr;
  } else {
    delete[] numbers;
  }
  return sum == 1;
}

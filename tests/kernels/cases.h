// The cases of each loss. They are the same on a device and in an emulator; how many there are depends on the level.

#pragma once

#include <functional>
#include <string>
#include <vector>

namespace check {

enum class Level {
  full,   // every size; as fast as the machine allows
  small,  // for a run in which every access to memory is checked: sizes that reach every path, and no more
};

struct Case {
  std::string name;
  std::function<void()> run;
};

// rotation: which options meet which shapes where the level does not cross them all.
struct Selection {
  Level level = Level::full;
  int rotation = 0;
};

void add_cross_entropy(std::vector<Case>& cases, const Selection& selection);
void add_nll(std::vector<Case>& cases, const Selection& selection);
void add_elementwise(std::vector<Case>& cases, const Selection& selection);
void add_rescale(std::vector<Case>& cases, const Selection& selection);

}  // namespace check

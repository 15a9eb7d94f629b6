#include "calls.h"

#include <mutex>

namespace fusedloss::ops {
namespace {

struct Table {
  std::mutex lock;
  std::map<std::string, Calls> calls;  // whose elements stay where they are
};
// Never destroyed: threads may still call operators when the process ends.
Table& table() {
  static auto& table = *new Table();
  return table;
}

}  // namespace

Calls& Calls::of_operator(const std::string& name) {
  const std::lock_guard lock(table().lock);
  return table().calls[name.substr(name.rfind(':') + 1)];
}

std::map<std::string, Calls::Counts> Calls::all() {
  const std::lock_guard lock(table().lock);
  std::map<std::string, Counts> found;
  for (const auto& [name, calls] : table().calls) {
    for (std::size_t i = 0; i < kRoutes.size(); ++i) {
      found[name][kRoutes[i]] = calls.counts_[i].load(std::memory_order_relaxed);
    }
  }
  return found;
}

}  // namespace fusedloss::ops

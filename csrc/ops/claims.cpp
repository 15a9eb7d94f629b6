#include "claims.h"

#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/variable.h>

#include <mutex>
#include <vector>

#include "overlap.h"

namespace fusedloss::ops {
namespace {

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct Claim {
  int64_t id;
  WeakTensor grad;
  c10::weak_intrusive_ptr<c10::StorageImpl> memory;
  bool hooks;
  at::Tensor place;              // over the memory, which it does not keep
  c10::VariableVersion counter;  // of the caller's tensor
  uint32_t version;              // what it shows while nobody but losses with claims of their own has written

  bool is_dead() const { return hooks ? memory.expired() : grad.expired(); }
};

struct Claims {
  std::mutex mutex;
  std::vector<Claim> live;
  int64_t last = 0;
};

Claims& claims() {
  static auto& claims = *new Claims();  // never destroyed: threads may outlive it
  return claims;
}

}  // namespace

void check_unclaimed(const char* loss, const at::Tensor& input) {
  TORCH_CHECK(!overlaps_itself(input), loss,
              ": inplace=True cannot overwrite an input of which several elements lie at one place in memory, got "
              "shape ",
              input.sizes(), " with strides ", input.strides());
  const std::lock_guard lock(claims().mutex);
  std::erase_if(claims().live, [](const Claim& claim) { return claim.is_dead(); });
  for (const Claim& claim : claims().live) {
    TORCH_CHECK(!overlap(input, claim.place), loss,
                ": inplace=True cannot overwrite an input that overlaps another which holds the gradient of a loss");
  }
}

int64_t claim(const at::Tensor& input, const at::Tensor& grad, bool hooks) {
  const at::Tensor place =
      at::from_blob(grad.data_ptr(), grad.sizes(), grad.strides(), /*deleter=*/nullptr, grad.options(), grad.device());
  const std::lock_guard lock(claims().mutex);
  auto& [mutex, live, last] = claims();
  std::vector<uint32_t> before;
  for (const Claim& claim : live) before.push_back(claim.counter.current_version());
  torch::autograd::impl::bump_version(input);
  for (size_t i = 0; i < live.size(); ++i) {
    if (live[i].counter.current_version() != before[i]) ++live[i].version;
  }
  const auto& counter = torch::autograd::impl::version_counter(input);
  live.push_back({++last, WeakTensor(grad.getIntrusivePtr()),
                  c10::weak_intrusive_ptr<c10::StorageImpl>(grad.storage().getWeakStorageImpl()), hooks, place, counter,
                  counter.current_version()});
  return last;
}

void release_claim(int64_t id) {
  const std::lock_guard lock(claims().mutex);
  std::erase_if(claims().live, [&](const Claim& claim) { return claim.id == id; });
}

void check_claim(const char* loss, int64_t id) {
  const std::lock_guard lock(claims().mutex);
  for (const Claim& claim : claims().live) {
    TORCH_CHECK(claim.id != id || claim.counter.current_version() == claim.version, loss,
                ": the input that inplace=True has overwritten with the gradient has been modified by an inplace "
                "operation before backward");
  }
}

}  // namespace fusedloss::ops

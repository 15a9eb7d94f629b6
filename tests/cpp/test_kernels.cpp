// The CPU kernels of every instruction set that this processor has, on raw pointers, against the formulas written out
// in double precision.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels/cpu/cpu.h"

using namespace fusedloss;

namespace {

struct Set {
  const char* name;
  cpu::InstructionSet set;
};

std::vector<Set> instruction_sets() {
  std::vector<Set> sets{{"baseline", cpu::InstructionSet::baseline}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    sets.push_back({"avx2", cpu::InstructionSet::avx2});
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    sets.push_back({"avx512", cpu::InstructionSet::avx512});
  }
#endif
  return sets;
}

template <class T>
constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;

// Blocks are shared among threads, as the operators share them, but not OpenMP's: ThreadSanitizer does not see those
// wait for each other.
void on_threads(std::int64_t count, const cpu::Work& work) {
  const std::int64_t shares = std::min<std::int64_t>(count, 3);
  std::vector<std::thread> threads;
  for (std::int64_t i = 0; i < shares; ++i) {
    threads.emplace_back([=] { work(count * i / shares, count * (i + 1) / shares); });
  }
  for (std::thread& thread : threads) thread.join();
}

struct Sum {
  double loss = 0;
  double divisor = 0;
  std::int64_t invalid = -1;
};

// Runs a pass, and returns what it adds up.
template <class Args>
Sum run(const cpu::Loss<Args>& loss, Args args, Pass pass) {
  Sum sum;
  if (pass != Pass::backward) args.total = {Reduction::sum, &sum.loss, Dtype::float64, &sum.divisor};
  sum.invalid = cpu::launch(loss, args, pass, on_threads);
  return sum;
}

template <class T>
std::vector<T> random_values(std::int64_t count, double scale) {
  static std::mt19937 generator(1);
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

enum class Layout { rows, columns };

// One loss and its gradient, with label smoothing and an ignored position, in one layout: by backward, and by forward,
// which writes it over the logits.
template <class T>
void test_cross_entropy(const Set& set, Layout layout, std::int64_t positions, std::int64_t classes) {
  const double smoothing = 0.1, tolerance = sizeof(T) == 8 ? 1e-13 : 2e-6;
  const std::vector<T> logits = random_values<T>(positions * classes, 3);
  std::vector<T> grad(logits.size(), T(7));
  std::vector<std::int64_t> target(positions);
  for (std::int64_t i = 0; i < positions; ++i) target[i] = i % 5 == 4 ? -100 : (i * 7919) % classes;
  std::vector<T> loss(positions), max(positions), log_sum(positions);
  const T grad_loss = 1;

  CrossEntropyArgs args;
  args.shape = {1, classes, positions};
  const bool rows = layout == Layout::rows;
  args.logits = {const_cast<T*>(logits.data()), kDtype<T>, 0, rows ? 1 : positions, rows ? classes : 1};
  args.grad_logits = args.logits;
  args.grad_logits.data = grad.data();
  args.target = {{target.data(), Dtype::int64, 1}, -100};
  args.label_smoothing = smoothing;
  args.row_max = max.data();
  args.row_log_sum = log_sum.data();
  args.loss = {loss.data(), kDtype<T>, 1};
  args.grad_loss = {const_cast<T*>(&grad_loss), kDtype<T>, 0};

  const auto& kernels = cpu::kernels(set.set).cross_entropy;
  args.grad_logits.data = nullptr;
  const Sum total = run(kernels, args, Pass::forward);
  args.grad_logits.data = grad.data();
  run(kernels, args, Pass::backward);

  std::vector<T> in_place = logits;
  args.logits.data = args.grad_logits.data = in_place.data();
  args.row_max = args.row_log_sum = args.loss.data = nullptr;
  const Sum again = run(kernels, args, Pass::forward_with_gradient);

  double sum = 0;
  for (std::int64_t i = 0; i < positions; ++i) {
    const auto at = [&](std::int64_t c) { return rows ? i * classes + c : c * positions + i; };
    double lse = 0, mean = 0;
    for (std::int64_t c = 0; c < classes; ++c) lse += std::exp(double(logits[at(c)]));
    lse = std::log(lse);
    for (std::int64_t c = 0; c < classes; ++c) mean += (lse - double(logits[at(c)])) / double(classes);
    const bool ignored = target[i] == -100;
    const double truth = ignored ? 0 : (1 - smoothing) * (lse - double(logits[at(target[i])])) + smoothing * mean;
    sum += truth;
    EXPECT(std::fabs(loss[i] - truth) <= tolerance * (1 + truth),
           "%s, %ld classes, position %ld: loss %.9g, truth %.9g", set.name, long(classes), long(i), double(loss[i]),
           truth);
    for (std::int64_t c = 0; c < classes; ++c) {
      const double mass = smoothing / double(classes) + (c == target[i] ? 1 - smoothing : 0);
      const double slope = ignored ? 0 : std::exp(double(logits[at(c)]) - lse) - mass;
      for (const T value : {grad[at(c)], in_place[at(c)]}) {
        EXPECT(std::fabs(value - slope) <= tolerance, "%s, %ld classes, entry (%ld, %ld): gradient %.9g, truth %.9g",
               set.name, long(classes), long(i), long(c), double(value), slope);
      }
    }
  }
  EXPECT(std::fabs(total.loss - sum) <= tolerance * (1 + sum), "%s: total %.9g, truth %.9g", set.name, total.loss, sum);
  EXPECT(total.divisor == double(positions - positions / 5), "%s: %g positions count", set.name, total.divisor);
  EXPECT(again.loss == total.loss, "%s: %.17g with the gradient, %.17g without", set.name, again.loss, total.loss);
  EXPECT(again.divisor == total.divisor, "%s: counted %g, not %g", set.name, again.divisor, total.divisor);
  EXPECT(total.invalid == -1, "%s: position %ld is valid", set.name, long(total.invalid));
}

template <class T>
void test_nll(const Set& set) {
  const std::vector<T> log_probs{-1, -2, -3, -4, -5, -6};  // (3, 2)
  std::vector<std::int64_t> target{1, 9, 0};
  const std::vector<T> weight{2, 3};
  NllArgs args;
  args.shape = {1, 2, 3};
  args.log_probs = {const_cast<T*>(log_probs.data()), kDtype<T>, 0, 1, 2};
  args.target = {{target.data(), Dtype::int64, 1}, -100};
  args.weight = weight.data();
  const Sum refused = run(cpu::kernels(set.set).nll, args, Pass::forward);
  EXPECT(refused.invalid == 1, "%s: position 1 has no class 9, not %ld", set.name, long(refused.invalid));
  target[1] = -100;
  const Sum total = run(cpu::kernels(set.set).nll, args, Pass::forward);
  EXPECT(total.loss == 3 * 2 + 2 * 5 && total.divisor == 5, "%s: %g / %g", set.name, total.loss, total.divisor);
}

// More rows than a block has.
template <class T>
void test_nll_backward(const Set& set, std::int64_t positions) {
  const std::int64_t classes = 3;
  const std::vector<T> log_probs(positions * classes, T(-1));
  std::vector<T> grad(log_probs.size(), T(7));
  std::vector<std::uint8_t> target(positions);
  for (std::int64_t i = 0; i < positions; ++i) target[i] = i % 4 == 3 ? 255 : i % classes;
  const T grad_loss = 2;
  NllArgs args;
  args.shape = {1, classes, positions};
  args.log_probs = {const_cast<T*>(log_probs.data()), kDtype<T>, 0, 1, classes};
  args.target = {{target.data(), Dtype::uint8, 1}, 255};
  args.grad_loss = {const_cast<T*>(&grad_loss), kDtype<T>, 0};
  const auto& kernels = cpu::kernels(set.set).nll;
  const Sum total = run(kernels, args, Pass::forward);
  EXPECT(total.loss == double(positions - positions / 4), "%s: the sum of %ld rows is %g", set.name, long(positions),
         total.loss);
  args.grad_log_probs = args.log_probs;
  args.grad_log_probs.data = grad.data();
  run(kernels, args, Pass::backward);
  for (std::int64_t i = 0; i < positions * classes; ++i) {
    const T expected = i % classes == target[i / classes] ? T(-2) : T(0);
    EXPECT(grad[i] == expected, "%s: entry %ld is %g", set.name, long(i), double(grad[i]));
  }
}

// A positive weight for each column, which broadcasts, and a stretch longer than a block.
template <class T>
void test_bce_with_logits(const Set& set, std::int64_t rows, std::int64_t columns) {
  const std::int64_t count = rows * columns;
  const std::vector<T> x = random_values<T>(count, 3);
  std::vector<std::uint8_t> t(count);
  std::vector<T> pos_weight(columns), grad(count);
  for (std::int64_t i = 0; i < count; ++i) t[i] = i % 3 == 0 ? 255 : i % 2;
  for (std::int64_t j = 0; j < columns; ++j) pos_weight[j] = static_cast<T>(1 + j % 4);
  const T grad_loss = 2;

  ElementwiseArgs args;
  args.shape = {2, count, {rows, columns}};
  args.dtype = kDtype<T>;
  args.input = {const_cast<T*>(x.data()), kDtype<T>, true, {columns, 1}};
  args.target = {t.data(), Dtype::uint8, true, {columns, 1}};
  args.pos_weight = {pos_weight.data(), kDtype<T>, false, {0, 1}};
  args.has_ignore_index = true;
  args.ignore_index = 255;
  args.grad_loss = {const_cast<T*>(&grad_loss), kDtype<T>, false, {0, 0}};
  args.grad_input = {grad.data(), kDtype<T>, true, {columns, 1}};
  const auto& kernels = cpu::kernels(set.set).bce_with_logits;
  args.grad_input.data = nullptr;
  const Sum total = run(kernels, args, Pass::forward);
  args.grad_input.data = grad.data();
  run(kernels, args, Pass::backward);

  std::vector<T> in_place = x;
  args.input.data = args.grad_input.data = in_place.data();
  const Sum again = run(kernels, args, Pass::forward_with_gradient);

  double sum = 0, counted = 0;
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 2e-6;
  for (std::int64_t i = 0; i < count; ++i) {
    const double v = x[i], p = pos_weight[i % columns], y = t[i];
    const bool ignored = t[i] == 255;
    if (!ignored) sum += (1 - y) * std::log1p(std::exp(v)) + p * y * std::log1p(std::exp(-v));
    counted += !ignored;
    const double slope = ignored ? 0 : 2 * ((1 - y) / (1 + std::exp(-v)) - p * y / (1 + std::exp(v)));
    for (const T value : {grad[i], in_place[i]}) {
      EXPECT(std::fabs(value - slope) <= tolerance * 8, "%s: element %ld: gradient %.9g, truth %.9g", set.name, long(i),
             double(value), slope);
    }
  }
  EXPECT(std::fabs(total.loss - sum) <= tolerance * (1 + sum), "%s: %.9g, truth %.9g", set.name, total.loss, sum);
  EXPECT(total.divisor == counted, "%s: %g elements count, not %g", set.name, counted, total.divisor);
  EXPECT(std::fabs(again.loss - total.loss) <= 1e-6 * total.loss, "%s: %.17g with the gradient, %.17g without",
         set.name, again.loss, total.loss);
  EXPECT(again.divisor == counted, "%s: counted %g, not %g", set.name, again.divisor, counted);
}

template <class T>
void test_everything(const Set& set) {
  // One class; fewer than a vector; prime; both sides of the switch to row order; both sides of a chunk.
  for (const std::int64_t classes : {1, 7, 33, 63, 64, 1000, 1024, 1025, 2500}) {
    // One position; both sides of a group of lanes; several blocks.
    for (const std::int64_t positions : {1, 63, 65, 200}) {
      test_cross_entropy<T>(set, Layout::rows, positions, classes);
      test_cross_entropy<T>(set, Layout::columns, positions, classes);
    }
  }
  test_nll<T>(set);
  for (const std::int64_t positions : {1, 5000}) test_nll_backward<T>(set, positions);
  for (const std::int64_t columns : {1, 3, 511, 513, 40000}) test_bce_with_logits<T>(set, 3, columns);
}

}  // namespace

int main() {
  for (const Set& set : instruction_sets()) {
    test_everything<float>(set);
    test_everything<double>(set);
    std::printf("%s: done\n", set.name);
  }
  return finish("kernels");
}

// Which plan a linear layer and its loss take, and how many rows or classes at a time. A change of these choices is a
// change of this table.

#include <cstdint>
#include <optional>

#include "check.h"
#include "ops/linear_plan.h"

using namespace fusedloss::ops;

namespace {

constexpr std::int64_t kGB = 1'000'000'000;
constexpr const char* kPlans[] = {"one chunk", "chunks", "recomputed"};

struct Row {
  const char* title;
  LinearProblem<> problem;
  LinearPlan plan;
  std::int64_t chunk = 0;  // of several
};

LinearProblem<> problem(std::int64_t rows, std::int64_t features, std::int64_t logits, std::int64_t logit_bytes,
                        std::int64_t accumulator_bytes, std::int64_t best_chunk) {
  return {.rows = rows,
          .features = features,
          .logits = logits,
          .logit_bytes = logit_bytes,
          .accumulator_bytes = accumulator_bytes,
          .best_chunk = best_chunk,
          .known_in_forward = true,
          .adds_up = true,
          .memory = std::nullopt,
          .chunk = std::nullopt};
}

LinearProblem<> on_gpu(std::int64_t rows, std::int64_t features = 4096, std::int64_t classes = 128256) {
  return problem(rows, features, classes, 2, 4, 4096);
}
LinearProblem<> on_cpu(std::int64_t rows, std::int64_t features, std::int64_t classes) {
  return problem(rows, features, classes, 4, 0, 512);
}
LinearProblem<> on_cpu_in_half(std::int64_t rows, std::int64_t features, std::int64_t classes) {
  return problem(rows, features, classes, 2, 6, 1024);
}

template <class Change>
LinearProblem<> with(LinearProblem<> problem, Change change) {
  change(problem);
  return problem;
}
LinearProblem<> within(LinearProblem<> problem, std::int64_t memory) {
  problem.memory = memory;
  return problem;
}
LinearProblem<> by(LinearProblem<> problem, std::int64_t chunk) {
  problem.chunk = chunk;
  return problem;
}

constexpr auto kFrozenWeight = [](LinearProblem<>& p) { p.accumulator_bytes = 0; };
constexpr auto kUnknown = [](LinearProblem<>& p) { p.known_in_forward = false; };
constexpr auto kFloat16 = [](LinearProblem<>& p) { p.adds_up = false; };

const Row kTable[] = {
    // One chunk takes 2NV bytes, several 2cV + 4VD: one is smaller up to c + 2D rows.
    {"a language model's step", on_gpu(4096), LinearPlan::one_chunk},
    {"twice the rows", on_gpu(8192), LinearPlan::one_chunk},
    {"as many as chunks take", on_gpu(12288), LinearPlan::one_chunk},
    {"one more", on_gpu(12289), LinearPlan::chunks, 3104},
    {"four chunks", on_gpu(16384), LinearPlan::chunks, 4096},
    {"a narrow model", on_gpu(16384, 2048, 248320), LinearPlan::chunks, 4096},
    {"a frozen weight, one chunk", with(on_gpu(4096), kFrozenWeight), LinearPlan::one_chunk},
    {"a frozen weight, which needs no sum", with(on_gpu(8192), kFrozenWeight), LinearPlan::chunks, 4096},
    {"float16, whose chunks have scales of their own", with(on_gpu(16384), kFloat16), LinearPlan::recomputed},
    {"float16 in one chunk", with(on_gpu(4096), kFloat16), LinearPlan::one_chunk},
    {"an unreduced loss", with(on_gpu(4096), kUnknown), LinearPlan::recomputed},
    {"a CPU", on_cpu(512, 512, 32000), LinearPlan::one_chunk},
    {"a CPU, where float32 sums are the gradient itself", on_cpu(2048, 768, 50257), LinearPlan::chunks, 512},
    {"a CPU in half precision", on_cpu_in_half(2048, 768, 50257), LinearPlan::one_chunk},
    {"a CPU in half precision, many rows", on_cpu_in_half(8192, 768, 50257), LinearPlan::chunks, 1024},
    {"memory for the logits", within(on_gpu(4096), 11 * kGB / 10), LinearPlan::one_chunk},
    {"less, and none for a sum", within(on_gpu(4096), kGB), LinearPlan::recomputed},
    {"memory for a sum and four chunks", within(on_gpu(16384), 32 * kGB / 10), LinearPlan::chunks, 4096},
    {"memory for a sum and smaller ones", within(on_gpu(16384), 25 * kGB / 10), LinearPlan::chunks, 1504},
    {"memory for everything", within(on_gpu(16384), 5 * kGB), LinearPlan::one_chunk},
    {"rows that are asked for", by(on_gpu(4096), 1000), LinearPlan::chunks, 1000},
    {"as many rows as there are", by(on_gpu(4096), 4096), LinearPlan::one_chunk},
    {"asked for of an unreduced loss", with(by(on_gpu(4096), 1000), kUnknown), LinearPlan::recomputed, 1000},
    {"no rows", on_gpu(0), LinearPlan::one_chunk},
    {"no classes", on_gpu(4096, 4096, 0), LinearPlan::one_chunk},
};

void test_table() {
  for (const Row& row : kTable) {
    const LinearPlan plan = linear_plan(row.problem);
    EXPECT(plan == row.plan, "%s: %s, not %s", row.title, kPlans[int(plan)], kPlans[int(row.plan)]);
    if (row.chunk == 0) continue;
    const std::int64_t chunk = linear_chunk(row.problem, row.problem.accumulator());
    EXPECT(chunk == row.chunk, "%s: %lld rows, not %lld", row.title, (long long)chunk, (long long)row.chunk);
  }
}

// A last slice that is much smaller than the others is another pass for little.
void test_slices() {
  EXPECT(linear_slice(on_gpu(64), 100, 1) == 100, "few classes");
  EXPECT(linear_slice(on_gpu(64), 32001, 1) == 32001, "classes that fit");
  EXPECT(linear_slice(within(on_gpu(1024), 20'000'000), 128256, 1) == 1536, "classes that do not");
}

// What a plan takes is within what it is allowed, wherever that is possible.
void test_memory() {
  for (std::int64_t rows : {1, 100, 5000, 100000}) {
    for (std::int64_t memory = kGB / 1000; memory < 100 * kGB; memory *= 3) {
      const LinearProblem<> p = within(on_gpu(rows), memory);
      const LinearPlan plan = linear_plan(p);
      const std::int64_t chunk = linear_chunk(p, plan == LinearPlan::chunks ? p.accumulator() : 0);
      const std::int64_t slice = linear_slice(p, 128256, 1);
      EXPECT(chunk >= kFewestRows, "%lld", (long long)chunk);
      EXPECT(slice >= kFewestClasses, "%lld", (long long)slice);
      if (plan == LinearPlan::one_chunk) {
        EXPECT(p.rows * p.row_bytes() <= memory, "%lld rows", (long long)rows);
      } else if (plan == LinearPlan::chunks) {
        EXPECT(p.accumulator() + chunk * p.row_bytes() <= memory, "%lld rows", (long long)rows);
      } else {
        EXPECT(chunk == kFewestRows || chunk * p.row_bytes() <= memory, "%lld rows", (long long)rows);
        const std::int64_t taken = rows * (slice * p.logit_bytes + p.features * 4);
        EXPECT(slice == kFewestClasses || taken <= memory, "%lld rows, %lld classes", (long long)rows,
               (long long)slice);
      }
    }
  }
}

}  // namespace

int main() {
  test_table();
  test_slices();
  test_memory();
  return finish("linear plan");
}

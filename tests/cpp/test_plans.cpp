// What the CUDA kernels would launch, on an H100 that need not be there: which traversal, how many blocks of how many
// threads, how much shared memory, how much workspace. A change of these choices is a change of this table.

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/cuda/plan.h"

using namespace fusedloss;
using namespace fusedloss::cuda;

namespace {

constexpr Device kH100{.multiprocessors = 132,
                       .dynamic_shared = (227 << 10) - kStaticSharedBytes,
                       .shared_per_multiprocessor = 228 << 10,
                       .largest_cluster = kLargestCluster};

// A multiprocessor has 65536 registers, of which a thread takes 64, or 128 where it holds much of a row. Of shared
// memory a block takes 2 KB beside what it asks for. The blocks of a cluster lie in one of eight parts.
std::int64_t on_h100(const Step& step) {
  const bool many_registers = std::holds_alternative<WarpPlan>(step.plan) ||
                              (std::holds_alternative<TilePlan>(step.plan) && step.variant == kFewLanes);
  const auto by_threads = std::int64_t(many_registers ? 512 : 1024) / step.shape.threads;
  const auto by_memory = std::int64_t(kH100.shared_per_multiprocessor / (step.shape.shared_bytes + 2048));
  const std::int64_t each = std::min(by_threads, by_memory);
  if (step.shape.cluster == 1) return each * kH100.multiprocessors;
  std::int64_t blocks = 0;
  for (const int part : {16, 16, 16, 16, 16, 16, 18, 18}) {
    blocks += part * each / step.shape.cluster * step.shape.cluster;
  }
  return blocks;
}

std::int64_t without_clusters(const Step& step) { return step.shape.cluster == 1 ? on_h100(step) : 0; }

// An address that is read by nobody.
void* somewhere(int offset = 0) { return reinterpret_cast<void*>((std::uintptr_t(1) << 20) + offset); }

struct Problem {
  Dtype dtype;
  ClassShape shape;
  bool columns = false;  // positions lie side by side
  double label_smoothing = 0;
  int offset = 0;  // bytes from where packets start
  bool unreduced = false;
  bool entropy = false;
  bool sample_weight = false;
  bool denominator = false;
};

CrossEntropyArgs arguments_of(const Problem& problem, Pass pass) {
  const ClassShape& shape = problem.shape;
  CrossEntropyArgs args;
  args.shape = shape;
  args.logits = {somewhere(problem.offset), problem.dtype, shape.classes * shape.inner};
  args.logits.class_stride = problem.columns ? shape.inner : 1;
  args.logits.inner_stride = problem.columns ? 1 : shape.classes;
  args.target = {{somewhere(), Dtype::int64}, -100};
  args.label_smoothing = problem.label_smoothing;
  if (pass != Pass::backward) args.total = {Reduction::mean, somewhere(), problem.dtype, nullptr};
  if (problem.unreduced) {
    args.total = {};
    args.loss = {somewhere(), problem.dtype};
  }
  if (problem.entropy && pass == Pass::forward) args.entropy = args.row_gap = somewhere();
  if (problem.entropy && pass == Pass::backward) args.grad_entropy = somewhere();
  if (problem.sample_weight) args.sample_weight = {somewhere(), Dtype::float32};
  if (problem.denominator) args.total.denominator = static_cast<const double*>(somewhere());
  if (pass != Pass::forward) args.grad_logits = args.logits;
  if (pass != Pass::forward_with_gradient) args.row_max = args.row_log_sum = somewhere();
  return args;
}

CrossEntropyPlan plan_of(const Problem& problem, Pass pass, ResidentBlocks resident_blocks = on_h100) {
  return plan_cross_entropy(arguments_of(problem, pass), pass, kH100, resident_blocks);
}

// As in "rows 264 x 512, 65568 bytes, 2 slices in a cluster".
std::string shown(const Step& step) {
  constexpr const char* kNames[] = {"divisor", "tiles", "warps", "rows", "columns"};
  std::string text = kNames[step.plan.index()];
  text += " " + std::to_string(step.shape.blocks) + " x " + std::to_string(step.shape.threads);
  if (step.shape.shared_bytes > 0) text += ", " + std::to_string(step.shape.shared_bytes) + " bytes";
  if (const auto* tiles = std::get_if<TilePlan>(&step.plan)) {
    text += ", " + std::to_string(tiles->rows) + " rows, " + std::to_string(tiles->lanes) + " lanes";
  }
  if (std::holds_alternative<WarpPlan>(step.plan)) text += ", " + std::to_string(step.variant) + " logits a lane";
  if (const auto* rows = std::get_if<RowPlan>(&step.plan); rows && rows->slices > 1) {
    text += ", " + std::to_string(rows->slices) + " slices" + (step.shape.cluster > 1 ? " in a cluster" : "");
  }
  if (step.answers) text += ", with answers";
  if (std::holds_alternative<ColumnPlan>(step.plan) && step.variant > 1) {
    text += ", " + std::to_string(step.variant) + " positions";
  }
  return text;
}

std::string shown(const CrossEntropyPlan& plan) {
  std::string text;
  for (const Step& step : plan.steps) text += shown(step) + "; ";
  return text + "workspace " + std::to_string(plan.workspace.bytes);
}

struct Planned {
  const char* name;
  Problem problem;
  const char* forward;
  const char* forward_with_gradient;
  const char* backward;
};

const Planned kTable[] = {
    {"8192 x 32000",
     {Dtype::bfloat16, {1, 32000, 8192}},
     "rows 264 x 512; workspace 4240",
     "divisor 1 x 1024; rows 264 x 512, 64000 bytes; workspace 4248",
     "rows 264 x 512; workspace 0"},
    {"8192 x 32000, float32",
     {Dtype::float32, {1, 32000, 8192}},
     "rows 264 x 512; workspace 4240",
     "divisor 1 x 1024; rows 264 x 512, 64000 bytes, 2 slices in a cluster; workspace 2136",
     "rows 264 x 512; workspace 0"},
    {"1 x 128256",
     {Dtype::bfloat16, {1, 128256, 1}},
     "rows 31 x 256, 31 slices; workspace 264",
     "rows 8 x 256, 32064 bytes, 8 slices in a cluster; workspace 0",
     "rows 31 x 256, 31 slices; workspace 0"},
    {"4096 x 50257",
     {Dtype::bfloat16, {1, 50257, 4096}},
     "rows 264 x 512; workspace 4240",
     "divisor 1 x 1024; rows 264 x 512, 50272 bytes, 2 slices in a cluster; workspace 2136",
     "rows 264 x 512; workspace 0"},
    {"2 x 1000003, float32",
     {Dtype::float32, {1, 1000003, 2}},
     "rows 264 x 256, 132 slices; workspace 2176",
     "rows 264 x 256, 132 slices; rows 264 x 256, 132 slices; workspace 2224",
     "rows 264 x 256, 132 slices; workspace 0"},
    {"24 x 10, float32",
     {Dtype::float32, {1, 10, 24}},
     "tiles 1 x 256, 20736 bytes, 256 rows, 1 lanes; workspace 0",
     "tiles 1 x 256, 20736 bytes, 256 rows, 1 lanes; workspace 0",
     "tiles 1 x 256, 20736 bytes, 256 rows, 1 lanes; workspace 0"},
    {"16777216 x 10",
     {Dtype::bfloat16, {1, 10, 16777216}},
     "tiles 528 x 256, 41088 bytes, 1024 rows, 1 lanes; workspace 8464",
     "divisor 132 x 1024; tiles 528 x 256, 41088 bytes, 1024 rows, 1 lanes; workspace 10608",
     "tiles 528 x 256, 41088 bytes, 1024 rows, 1 lanes; workspace 0"},
    {"65536 x 1025",
     {Dtype::bfloat16, {1, 1025, 65536}},
     "warps 528 x 128, 64 logits a lane; workspace 8464",
     "divisor 8 x 1024; warps 528 x 128, 64 logits a lane; workspace 8624",
     "warps 528 x 128, 64 logits a lane; workspace 0"},
    {"65536 x 1000",
     {Dtype::bfloat16, {1, 1000, 65536}},
     "warps 528 x 128, 32 logits a lane; workspace 8464",
     "divisor 8 x 1024; warps 528 x 128, 32 logits a lane; workspace 8624",
     "warps 528 x 128, 32 logits a lane; workspace 0"},
    {"65536 x 1000, smoothing",
     {.dtype = Dtype::bfloat16, .shape = {1, 1000, 65536}, .label_smoothing = 0.1},
     "tiles 528 x 256, 32128 bytes, 8 rows, 32 lanes; workspace 8464",
     "divisor 8 x 1024; tiles 528 x 256, 32128 bytes, 8 rows, 32 lanes; workspace 8624",
     "tiles 528 x 256, 32128 bytes, 8 rows, 32 lanes; workspace 0"},
    {"65536 x 128, float32",
     {Dtype::float32, {1, 128, 65536}},
     "tiles 264 x 256, 66304 bytes, 64 rows, 4 lanes; workspace 4240",
     "divisor 8 x 1024; tiles 264 x 256, 66304 bytes, 64 rows, 4 lanes; workspace 4400",
     "tiles 264 x 256, 66304 bytes, 64 rows, 4 lanes; workspace 0"},
    {"65536 x 128, float32, 4 bytes from a packet",
     {.dtype = Dtype::float32, .shape = {1, 128, 65536}, .offset = 4},
     "tiles 264 x 256, 65792 bytes, 64 rows, 4 lanes; workspace 4240",
     "divisor 8 x 1024; tiles 264 x 256, 65792 bytes, 64 rows, 4 lanes; workspace 4400",
     "tiles 264 x 256, 65792 bytes, 64 rows, 4 lanes; workspace 0"},
    {"1024 x 1000, float64",
     {Dtype::float64, {1, 1000, 1024}},
     "tiles 128 x 256, 128512 bytes, 8 rows, 32 lanes; workspace 2064",
     "divisor 1 x 1024; tiles 128 x 256, 128512 bytes, 8 rows, 32 lanes; workspace 2072",
     "tiles 128 x 256, 128512 bytes, 8 rows, 32 lanes; workspace 0"},
    {"8 x 19 x 512 x 512",
     {Dtype::bfloat16, {8, 19, 512 * 512}, true},
     "columns 660 x 128, 38912 bytes, 8 positions; workspace 10576",
     "divisor 132 x 1024; columns 660 x 128, 38912 bytes, 8 positions; workspace 12720",
     "columns 660 x 128, 38912 bytes, 8 positions; workspace 0"},
    {"8 x 19 x 512 x 512, float32, smoothing",
     {Dtype::float32, {8, 19, 512 * 512}, true, 0.1},
     "columns 1056 x 128; workspace 16912",
     "divisor 132 x 1024; columns 1056 x 128, 9728 bytes; workspace 19056",
     "columns 1056 x 128; workspace 0"},
    {"8 x 150 x 128 x 128",
     {Dtype::bfloat16, {8, 150, 128 * 128}, true},
     "columns 660 x 64, 38400 bytes, 2 positions; workspace 10576",
     "divisor 16 x 1024; columns 660 x 64, 38400 bytes, 2 positions; workspace 10864",
     "columns 660 x 64, 38400 bytes, 2 positions; workspace 0"},
    {"8 x 1000 x 7 x 7, float32",
     {Dtype::float32, {8, 1000, 7 * 7}, true},
     "columns 13 x 32; workspace 224",
     "divisor 1 x 1024; columns 13 x 32; workspace 232",
     "columns 13 x 32; workspace 0"},
    // Unreduced, a row's results are the same in any batch: the number of rows decides nothing, nor where they lie.
    {"1 x 128256, unreduced",
     {.dtype = Dtype::bfloat16, .shape = {1, 128256, 1}, .unreduced = true},
     "rows 1 x 512; workspace 0",
     "rows 8 x 256, 32064 bytes, 8 slices in a cluster; workspace 0",
     "rows 31 x 256, 31 slices; workspace 0"},
    {"8 x 150 x 128 x 128, unreduced",
     {.dtype = Dtype::bfloat16, .shape = {8, 150, 128 * 128}, .columns = true, .unreduced = true},
     "columns 512 x 128, 2 positions; workspace 0",
     "columns 660 x 64, 38400 bytes, 2 positions; workspace 0",
     "columns 660 x 64, 38400 bytes, 2 positions; workspace 0"},
    {"8192 x 32000, entropy",
     {.dtype = Dtype::bfloat16, .shape = {1, 32000, 8192}, .entropy = true},
     "rows 264 x 512, with answers; workspace 4240",
     "divisor 1 x 1024; rows 264 x 512, 64000 bytes; workspace 4248",
     "rows 264 x 512; workspace 0"},
    {"64 x 32000, entropy",
     {.dtype = Dtype::bfloat16, .shape = {1, 32000, 64}, .entropy = true},
     "rows 320 x 256, 5 slices, with answers; workspace 16656",
     "rows 256 x 256, 16000 bytes, 4 slices in a cluster; workspace 1040",
     "rows 320 x 256, 5 slices; workspace 0"},
    {"24 x 10, float32, weights of positions",
     {.dtype = Dtype::float32, .shape = {1, 10, 24}, .sample_weight = true},
     "tiles 1 x 256, 20736 bytes, 256 rows, 1 lanes; workspace 0",
     "divisor 1 x 1024; tiles 1 x 256, 20736 bytes, 256 rows, 1 lanes; workspace 8",
     "tiles 1 x 256, 20736 bytes, 256 rows, 1 lanes; workspace 0"},
    {"8192 x 32000, weights of positions",
     {.dtype = Dtype::bfloat16, .shape = {1, 32000, 8192}, .sample_weight = true},
     "rows 264 x 512; workspace 4240",
     "divisor 8 x 1024; rows 264 x 512, 64000 bytes; workspace 4400",
     "rows 264 x 512; workspace 0"},
    {"8192 x 32000, a denominator",
     {.dtype = Dtype::bfloat16, .shape = {1, 32000, 8192}, .denominator = true},
     "rows 264 x 512; workspace 4240",
     "rows 264 x 512, 64000 bytes; workspace 4240",
     "rows 264 x 512; workspace 0"},
    {"0 x 10, float32",
     {Dtype::float32, {1, 10, 0}},
     "columns 1 x 32, 1280 bytes; workspace 0",
     "columns 1 x 32, 1280 bytes; workspace 0",
     "workspace 0"},
    {"4 x 0, float32",
     {Dtype::float32, {1, 0, 4}},
     "columns 1 x 32; workspace 0",
     "columns 1 x 32; workspace 0",
     "columns 1 x 32; workspace 0"},
};

void check_table() {
  for (const Planned& planned : kTable) {
    const auto check = [&](Pass pass, const char* expected) {
      const std::string got = shown(plan_of(planned.problem, pass));
      EXPECT(got == expected, "%s, pass %d: %s", planned.name, int(pass), got.c_str());
    };
    check(Pass::forward, planned.forward);
    check(Pass::forward_with_gradient, planned.forward_with_gradient);
    check(Pass::backward, planned.backward);
  }
}

// Code that knows no clusters, on a device that has them.
void check_without_clusters() {
  const auto got = shown(plan_of({Dtype::bfloat16, {1, 50257, 4096}}, Pass::forward_with_gradient, without_clusters));
  EXPECT(got == "divisor 1 x 1024; rows 132 x 1024, 100528 bytes; workspace 2136", "%s", got.c_str());
  const auto long_rows = plan_of({Dtype::bfloat16, {1, 128256, 4096}}, Pass::forward_with_gradient, without_clusters);
  EXPECT(long_rows.steps.size() == 2 && long_rows.steps[1].pass == Pass::backward, "%s", shown(long_rows).c_str());
}

// What the caller brings of the statistics needs no workspace.
void check_statistics() {
  const Problem problem{Dtype::float32, {1, 1000003, 2}};
  CrossEntropyArgs args = arguments_of(problem, Pass::forward_with_gradient);
  const auto bytes = [&] {
    return plan_cross_entropy(args, Pass::forward_with_gradient, kH100, on_h100).workspace.bytes;
  };
  const std::size_t all = bytes();
  args.row_max = args.row_log_sum = somewhere();
  EXPECT(all - bytes() == 2 * 16, "%ld, then %ld", long(all), long(bytes()));
  args.total.divisor = static_cast<double*>(somewhere());
  EXPECT(all - bytes() == 3 * 16, "%ld, then %ld", long(all), long(bytes()));
}

void check_that_pieces_are_apart() {
  for (const Planned& planned : kTable) {
    for (const Pass pass : {Pass::forward, Pass::forward_with_gradient, Pass::backward}) {
      const CrossEntropyPlan plan = plan_of(planned.problem, pass);
      std::vector<Piece> pieces{plan.counted, plan.row_max, plan.row_log_sum, plan.divisor};
      for (const Step& step : plan.steps) {
        pieces.insert(pieces.end(), {step.grid.ticket, step.grid.parts, step.row_tickets, step.row_parts});
      }
      std::erase_if(pieces, [](const Piece& piece) { return piece.bytes == 0; });
      std::ranges::sort(pieces, {}, &Piece::offset);
      std::size_t end = 0;
      for (const Piece& piece : pieces) {
        EXPECT(piece.offset >= end && piece.offset % 16 == 0, "%s: a piece at %ld", planned.name, long(piece.offset));
        end = piece.offset + piece.bytes;
      }
      EXPECT(end == plan.workspace.bytes, "%s: %ld bytes of %ld", planned.name, long(end), long(plan.workspace.bytes));
    }
  }
}

void check_borders(const ClassProblem& problem, const std::vector<std::int64_t>& expected) {
  const std::vector<std::int64_t> got = class_borders(problem, 2'000'000, kH100, on_h100);
  std::string text;
  for (const std::int64_t border : got) text += std::to_string(border) + ", ";
  EXPECT(got == expected, "%s", text.c_str());
}

void check_borders() {
  const Pass with_gradient = Pass::forward_with_gradient;
  check_borders({.dtype = Dtype::bfloat16, .pass = with_gradient, .positions = 4096},
                {17,    129,   257,   513,   1025,  2049,   4097,   16385,  22529,  24577, 34817,
                 45057, 49153, 69633, 90113, 98305, 139265, 180225, 196609, 393217, 913409});
  check_borders({.dtype = Dtype::float32, .pass = with_gradient, .positions = 1},
                {17, 88, 96, 129, 257, 513, 1025, 2049, 4097, 8193, 16385, 65537, 90113, 98305, 196609, 456705});
  check_borders({.dtype = Dtype::float32, .pass = Pass::backward, .positions = 4096},
                {17, 88, 96, 129, 257, 513, 1025, 2049, 8193});
  check_borders(
      {.dtype = Dtype::bfloat16, .pass = with_gradient, .columns = true, .positions = 65536},
      {54, 62, 63, 73, 75, 88, 94, 97, 111, 123, 125, 149, 150, 175, 187, 225, 245, 249, 297, 300, 349, 374, 449});
}

// The upper half of a product with the reciprocal is the quotient.
void check_division() {
  for (unsigned divisor = 2; divisor <= kTileClasses; ++divisor) {
    const Division division = Division::by(divisor);
    bool exact = true;
    for (unsigned n = 0; n < 1 << 16; ++n) {
      exact = exact && std::uint64_t(n) * division.reciprocal >> 32 == n / divisor;
    }
    EXPECT(exact, "by %u", divisor);
  }
}

}  // namespace

int main() {
  check_table();
  check_without_clusters();
  check_statistics();
  check_that_pieces_are_apart();
  check_borders();
  check_division();
  return finish("plans");
}

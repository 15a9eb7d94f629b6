// The CUDA kernels against the CPU kernels and against the formulas written out in double precision, on raw pointers.
// Every loss, element type, traversal and pass, at sizes at which some packet, slice, tile, ticket or tail is ragged.
//
//     check_kernels [--small] [dtype...]
//
// runs the cases of these element types, or of all; --small those few and small ones that a checker of every access has
// time for. It exits with 0 where all are right, 1 where one is not, 2 where it does not understand, and 77 where there
// is no device. An emulator of CUDA calls the functions with C linkage instead, some of the cases each time.

#include <set>
#include <string_view>

#include "kernels/cuda/device.h"
#include "measure.h"

#if defined(__CUDA_EMU__)
extern "C" const char* emu_report();  // of the emulator: what it has found since the last call
inline void forget_report() { emu_report(); }
#else
inline void forget_report() {}
#endif

namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};

// --- What is varied ---

const ClassOptions kPlain[] = {
    {.name = "mean"},
    {.name = "sum, some ignored, weights", .reduction = Reduction::sum, .ignored = 3, .weight = true},
    {.name = "none, some ignored", .reduction = Reduction::none, .ignored = 4, .index = Dtype::int32},
    {.name = "mean, weights, in place, some ignored", .ignored = 2, .weight = true, .in_place = true},
    {.name = "lse of all, z loss, misaligned index", .ignored = 3, .z_loss = 1e-2, .lse = true, .index_lead = 1},
};

const ClassOptions kGeneral[] = {
    {.name = "smoothing, some ignored", .ignored = 3, .smoothing = 0.1},
    {.name = "smoothing, weights, z loss, in place, sum",
     .reduction = Reduction::sum,
     .ignored = 5,
     .weight = true,
     .smoothing = 0.3,
     .z_loss = 1e-3,
     .in_place = true},
    {.name = "softcap, in place", .ignored = 4, .softcap = 15, .in_place = true},
    {.name = "softcap, smoothing, lse, none",
     .reduction = Reduction::none,
     .smoothing = 0.1,
     .softcap = 30,
     .lse = true},
    {.name = "probabilities, gradient to them", .probabilities = true, .grad_probabilities = true},
    {.name = "bfloat16 probabilities, weights, smoothing, softcap, none",
     .reduction = Reduction::none,
     .weight = true,
     .smoothing = 0.1,
     .softcap = 20,
     .probabilities = true,
     .probability_dtype = Dtype::bfloat16,
     .grad_probabilities = true},
    {.name = "probabilities, in place, sum, z loss",
     .reduction = Reduction::sum,
     .z_loss = 1e-2,
     .probabilities = true,
     .probability_dtype = Dtype::float64,
     .in_place = true},
    {.name = "probabilities, gradient to them alone, lse",
     .probabilities = true,
     .lse = true,
     .grad_probabilities = true,
     .only_grad_probabilities = true},
};

// What any kernel does, the plain ones included.
const ClassOptions kWeighted[] = {
    {.name = "weights of positions, some ignored", .ignored = 3, .sample_weight = true},
    {.name = "float64 weights of positions and classes, in place",
     .ignored = 4,
     .weight = true,
     .in_place = true,
     .sample_weight = true,
     .sample_weight_dtype = Dtype::float64},
    {.name = "bfloat16 weights of positions, none, z loss",
     .reduction = Reduction::none,
     .ignored = 5,
     .z_loss = 1e-2,
     .sample_weight = true,
     .sample_weight_dtype = Dtype::bfloat16},
    {.name = "a denominator, some ignored", .ignored = 3, .denominator = 37.5},
    {.name = "a denominator, weights of positions, smoothing",
     .smoothing = 0.1,
     .sample_weight = true,
     .sample_weight_dtype = Dtype::float16,
     .denominator = 1e3},
    {.name = "probabilities, weights of positions",
     .probabilities = true,
     .grad_probabilities = true,
     .sample_weight = true},
};

// What is wanted beside the loss.
const ClassOptions kAnswers[] = {
    {.name = "entropy, some ignored", .ignored = 3, .entropy = true},
    {.name = "entropy, peaked rows", .entropy = true, .peaked = true},
    {.name = "argmax, in place, some ignored", .ignored = 3, .in_place = true, .argmax = true},
    {.name = "entropy and argmax, none, lse, scale",
     .reduction = Reduction::none,
     .ignored = 4,
     .lse = true,
     .scale = 0.7,
     .entropy = true,
     .argmax = true},
    {.name = "scale, some ignored", .ignored = 3, .scale = 1.3},
    {.name = "scale, softcap, entropy, smoothing, weights",
     .weight = true,
     .smoothing = 0.1,
     .softcap = 20,
     .scale = 1.5,
     .entropy = true},
    {.name = "entropy, infinities and NaN, argmax", .ignored = 6, .specials = true, .entropy = true, .argmax = true},
    {.name = "argmax of infinities and NaN, sum, in place",
     .reduction = Reduction::sum,
     .ignored = 2,
     .in_place = true,
     .specials = true,
     .argmax = true},
    {.name = "entropy of probabilities, weights of positions, none, softcap",
     .reduction = Reduction::none,
     .softcap = 15,
     .probabilities = true,
     .grad_probabilities = true,
     .sample_weight = true,
     .entropy = true},
};

// Of classes that are some of many.
const ClassOptions kParts[] = {
    {.name = "the first classes, none", .reduction = Reduction::none, .ignored = 5, .after = 40},
    {.name = "classes between others, smoothing, weights, z loss, none",
     .reduction = Reduction::none,
     .ignored = 4,
     .weight = true,
     .smoothing = 0.1,
     .z_loss = 1e-3,
     .before = 7,
     .after = 9},
    {.name = "the last classes, lse, none, in place",
     .reduction = Reduction::none,
     .ignored = 3,
     .lse = true,
     .in_place = true,
     .before = 100},
    {.name = "probabilities of some classes, smoothing, none",
     .reduction = Reduction::none,
     .smoothing = 0.2,
     .probabilities = true,
     .grad_probabilities = true,
     .before = 3,
     .after = 3},
    {.name = "entropy and argmax of some classes, none, weights, scale",
     .reduction = Reduction::none,
     .ignored = 4,
     .weight = true,
     .scale = 0.7,
     .entropy = true,
     .argmax = true,
     .before = 5},
};

const ClassOptions kRare[] = {
    {.name = "all ignored", .ignored = 1},
    {.name = "all ignored, none", .reduction = Reduction::none, .ignored = 1, .weight = true, .smoothing = 0.1},
    {.name = "infinities and NaN", .reduction = Reduction::none, .ignored = 6, .specials = true},
    {.name = "infinities and NaN, sum", .reduction = Reduction::sum, .ignored = 6, .specials = true},
    {.name = "uint8 index", .ignored = 3, .index = Dtype::uint8, .index_lead = 3},
};

// While it lives, this thread plans its launches as for such a device.
class PretendedDevice {
 public:
  explicit PretendedDevice(const fusedloss::cuda::Device& device) : device_(device) { current_ = &device_; }
  ~PretendedDevice() { current_ = before_; }
  PretendedDevice(const PretendedDevice&) = delete;

 private:
  const fusedloss::cuda::Device*& current_ = fusedloss::cuda::pretended_device;
  const fusedloss::cuda::Device device_;
  const fusedloss::cuda::Device* const before_ = current_;
};

// With one multiprocessor a block's turns are many.
const fusedloss::cuda::Device kOneMultiprocessor{.multiprocessors = 1,
                                                 .dynamic_shared = (99 << 10) - fusedloss::cuda::kStaticSharedBytes,
                                                 .shared_per_multiprocessor = 100 << 10,
                                                 .largest_cluster = 1};

// --- Cross entropy ---

void check_cross_entropy(const CpuReference& cpu, const ClassCase& c, const ClassOptions& options) {
  CrossEntropyCheck(cpu, c, options).run();
}

template <std::size_t kCount>
void check_all(const CpuReference& cpu, const ClassCase& c, const ClassOptions (&options)[kCount]) {
  for (const ClassOptions& option : options) check_cross_entropy(cpu, c, option);
}

// Few options for a large case: they take turns.
void check_some(const CpuReference& cpu, const ClassCase& c, int& turn) {
  check_cross_entropy(cpu, c, kPlain[turn % std::size(kPlain)]);
  check_cross_entropy(cpu, c, kGeneral[turn % std::size(kGeneral)]);
  ++turn;
}

// The newest options, where all of them would take long: two of each kind in turns.
void check_answers(const CpuReference& cpu, const ClassCase& c, int& turn) {
  for (int i = 0; i < 2; ++i, ++turn) {
    check_cross_entropy(cpu, c, kWeighted[turn % std::size(kWeighted)]);
    check_cross_entropy(cpu, c, kAnswers[turn % std::size(kAnswers)]);
    check_cross_entropy(cpu, c, kParts[turn % std::size(kParts)]);
  }
}

// Each traversal, and rows that begin anywhere in a packet.
void check_invariance(Dtype dtype, bool full) {
  const ClassOptions options[] = {{.name = "plain"},
                                  {.name = "smoothing, weights", .weight = true, .smoothing = 0.1},
                                  {.name = "entropy, cap", .softcap = 20, .entropy = true}};
  const std::vector<std::int64_t> classes =
      full ? std::vector<std::int64_t>{7, 16, 33, 127, 130, 257, 1001, 1999, 2051, 8195}
           : std::vector<std::int64_t>{7, 33, 257, 1999};
  for (const ClassOptions& option : options) {
    for (const std::int64_t count : classes) InvarianceCheck(Layout::rows, dtype, count, option).run(1);
    for (const std::int64_t count : {3, 19}) {
      for (const std::int64_t inner : {9, 24}) InvarianceCheck(Layout::columns, dtype, count, option).run(inner);
    }
    if (full) InvarianceCheck(Layout::columns, dtype, 19, option).run(8448);
  }
}

// Tiles of several rounds of rows, of which the last is not full; warps that finish more rows than they have lanes.
void check_turns(const CpuReference& cpu, Dtype dtype, bool full) {
  const PretendedDevice pretended(kOneMultiprocessor);
  const std::int64_t rounds = full ? 4 : 1;
  int turn = int(dtype);
  for (const ClassShape& shape : {ClassShape{1, 10, 2300 * rounds}, ClassShape{1, 16, 2100},
                                  ClassShape{1, 90, 600 * rounds}, ClassShape{1, 130, 150 * rounds * rounds}}) {
    check_some(cpu, {.shape = shape, .dtype = dtype}, turn);
    if (full) check_some(cpu, {.shape = shape, .dtype = dtype, .lead = 1}, turn);
  }
}

void small_cross_entropy(const CpuReference& cpu, Dtype dtype) {
  const bool wide = dtype == Dtype::float64;
  // Tiles, and warps: lanes of a row from 1 to 32, one tile and several, ragged and not.
  const ClassCase tiles[] = {
      {.shape = {1, 1, 3}, .dtype = dtype},
      {.shape = {1, 7, 37}, .dtype = dtype, .lead = 1},
      {.shape = {1, 16, 5}, .dtype = dtype},
      {.shape = {1, 33, 70}, .dtype = dtype, .skewed = true},
      {.shape = {1, 128, 3}, .dtype = dtype, .pad = 3},
      {.shape = {1, 300, 9}, .dtype = dtype, .lead = 1},
      {.shape = {1, 1500, 3}, .dtype = dtype, .pad = 1},
  };
  // Rows: one slice, slices that meet through memory or in a cluster; where rows begin at any place in a packet.
  const std::int64_t classes = 17000 / bytes_of(dtype) + 3;
  const ClassCase rows[] = {
      {.shape = {1, 1025, 2}, .dtype = dtype, .lead = 1},
      {.shape = {1, classes, 2}, .dtype = dtype, .skewed = true},
  };
  const ClassCase columns[] = {
      {.shape = {2, 5, 9}, .layout = Layout::columns, .dtype = dtype},
      {.shape = {1, 3, 40}, .layout = Layout::strided, .dtype = dtype},
      {.shape = {1, 2,
                 (wide                      ? 2
                  : dtype == Dtype::float32 ? 4
                                            : 8) *
                     1060},
       .layout = Layout::columns,
       .dtype = dtype},
  };
  for (const ClassCase& c : tiles) {
    check_all(cpu, c, kPlain);
    check_all(cpu, c, kGeneral);
  }
  check_all(cpu, tiles[1], kRare);
  check_all(cpu, tiles[5], kRare);
  check_turns(cpu, dtype, false);
  int turn = 0, answers = 0;
  for (const ClassCase& c : rows) {
    check_some(cpu, c, turn);
    check_some(cpu, c, turn);
  }
  for (const ClassCase& c : {tiles[1], tiles[3], tiles[5], rows[0], columns[0], columns[1]}) {
    check_all(cpu, c, kWeighted);
    check_all(cpu, c, kAnswers);
    check_all(cpu, c, kParts);
  }
  for (const ClassCase& c : {tiles[0], tiles[2], tiles[4], tiles[6], rows[1]}) check_answers(cpu, c, answers);
  for (const ClassCase& c : {columns[0], columns[1]}) {
    check_all(cpu, c, kPlain);
    check_all(cpu, c, kGeneral);
    check_all(cpu, c, kRare);
  }
  check_cross_entropy(cpu, columns[2], kPlain[3]);
  check_cross_entropy(cpu, columns[2], kWeighted[1]);
  check_invariance(dtype, false);
}

void full_cross_entropy(const CpuReference& cpu, Dtype dtype) {
  int turn = int(dtype);
  for (const std::int64_t classes : {1, 2, 7, 10, 16, 19, 32, 33, 64, 91, 128, 129, 256, 257, 1000, 1024, 2048}) {
    for (const std::int64_t positions : {1, 67, 700}) {
      if (classes * positions > 100000) continue;
      for (const ClassCase& c :
           {ClassCase{.shape = {1, classes, positions}, .dtype = dtype},
            ClassCase{.shape = {1, classes, positions}, .dtype = dtype, .lead = 1},
            ClassCase{.shape = {1, classes, positions}, .dtype = dtype, .pad = 3, .skewed = true}}) {
        check_some(cpu, c, turn);
      }
    }
    check_all(cpu, {.shape = {2, classes, 9}, .dtype = dtype, .lead = 1}, kRare);
  }
  for (const std::int64_t classes : {19, 1000, 1999}) {
    const ClassCase c{.shape = {1, classes, 67}, .dtype = dtype, .lead = 1};
    check_all(cpu, c, kPlain);
    check_all(cpu, c, kGeneral);
    check_all(cpu, c, kWeighted);
    check_all(cpu, c, kAnswers);
  }
  for (const std::int64_t classes : {1, 2, 16, 33, 128, 129, 257, 2048}) {
    check_all(cpu, {.shape = {2, classes, 9}, .dtype = dtype, .lead = 1}, kAnswers);
    check_all(cpu, {.shape = {2, classes, 9}, .dtype = dtype, .lead = 1}, kParts);
  }
  check_invariance(dtype, true);
  // Many positions: the divisor has a launch of its own.
  for (const ClassOptions& options : {kPlain[0], kPlain[3], kGeneral[0], kWeighted[1], kWeighted[3], kWeighted[5]}) {
    check_cross_entropy(cpu, {.shape = {1, 7, 9001}, .dtype = dtype, .lead = 1}, options);
    check_cross_entropy(cpu, {.shape = {3, 5, 2999}, .layout = Layout::columns, .dtype = dtype}, options);
  }
  check_turns(cpu, dtype, true);
  // More tiles than blocks.
  check_cross_entropy(cpu, {.shape = {1, 33, 40001}, .dtype = dtype}, kPlain[1]);

  for (const std::int64_t classes : {1025, 2049, 8193, 50257, 128256}) {
    for (const std::int64_t positions : {1, 5, 150}) {
      if (classes * positions > 350000) continue;
      check_some(cpu, {.shape = {1, classes, positions}, .dtype = dtype}, turn);
      check_some(cpu, {.shape = {1, classes, positions}, .dtype = dtype, .lead = 1, .skewed = turn % 2 == 0}, turn);
      check_some(cpu, {.shape = {1, classes, positions}, .dtype = dtype, .pad = 1}, turn);
    }
  }
  for (const std::int64_t classes : {1025, 20011}) {
    const ClassCase c{.shape = {1, classes, 3}, .dtype = dtype, .lead = 1};
    check_all(cpu, c, kPlain);
    check_all(cpu, c, kGeneral);
    check_all(cpu, {.shape = {2, classes, 7}, .dtype = dtype, .pad = 1}, kRare);
    check_all(cpu, c, kWeighted);
    check_all(cpu, {.shape = {2, classes, 4}, .dtype = dtype, .pad = 1}, kAnswers);
  }
  check_cross_entropy(cpu, {.shape = {1, 1000003, 2}, .dtype = dtype, .lead = 1}, kPlain[turn % 5]);
  check_cross_entropy(cpu, {.shape = {1, 1000003, 2}, .dtype = dtype}, kGeneral[0]);
  // Clusters, slices that meet through memory, rows that are read twice.
  for (const std::int64_t classes : {60001, 1000003}) {
    for (const ClassOptions& options : {kWeighted[0], kAnswers[0], kAnswers[1], kAnswers[2], kAnswers[7]}) {
      check_cross_entropy(cpu, {.shape = {1, classes, 2}, .dtype = dtype}, options);
    }
  }
  check_cross_entropy(cpu, {.shape = {1, 1000003, 2}, .dtype = dtype}, kWeighted[3]);

  // Columns: packets or not, kept or read twice.
  for (const std::int64_t classes : {1, 7, 19, 33, 150, 1000}) {
    for (const ClassShape& shape :
         {ClassShape{1, classes, 13}, ClassShape{3, classes, 32}, ClassShape{2, classes, 8320}}) {
      if (shape.positions() * classes > 200000) continue;
      check_some(cpu, {.shape = shape, .layout = Layout::columns, .dtype = dtype}, turn);
      check_some(cpu, {.shape = shape, .layout = Layout::columns, .dtype = dtype, .lead = 1, .pad = 8}, turn);
      if (shape.positions() < 1000) check_some(cpu, {.shape = shape, .layout = Layout::strided, .dtype = dtype}, turn);
    }
    check_all(cpu, {.shape = {2, classes, 7}, .layout = Layout::columns, .dtype = dtype}, kRare);
    check_all(cpu, {.shape = {2, classes, 7}, .layout = Layout::columns, .dtype = dtype}, kAnswers);
    check_all(cpu, {.shape = {2, classes, 7}, .layout = Layout::columns, .dtype = dtype}, kParts);
  }
  for (const ClassShape& shape : {ClassShape{1, 19, 20}, ClassShape{1, 7, 8400}}) {
    check_all(cpu, {.shape = shape, .layout = Layout::columns, .dtype = dtype}, kWeighted);
    check_all(cpu, {.shape = shape, .layout = Layout::columns, .dtype = dtype}, kPlain);
    check_all(cpu, {.shape = shape, .layout = Layout::columns, .dtype = dtype}, kGeneral);
  }
  // Nothing at all.
  check_all(cpu, {.shape = {1, 5, 0}, .dtype = dtype}, kPlain);
}

// --- Negative log likelihood ---

void check_nll(const CpuReference& cpu, Dtype dtype, bool full) {
  const std::int64_t many = full ? 5000 : 300;
  for (const ClassShape& shape :
       {ClassShape{1, 7, many}, ClassShape{1, 1, 3}, ClassShape{2, 33, 35}, ClassShape{1, 1000, 20}}) {
    for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
      for (const int pad : {0, 1}) {
        for (const ClassOptions& options : {kPlain[0], kPlain[1], kPlain[2], kRare[0], kRare[4]}) {
          if (!full && shape.positions() * shape.classes > 3000 && (pad == 1 || options.weight)) continue;
          NllCheck(cpu, {.shape = shape, .layout = layout, .dtype = dtype, .lead = pad, .pad = pad}, options).run();
        }
      }
    }
  }
  if (full) NllCheck(cpu, {.shape = {1, 50257, 9}, .dtype = dtype, .lead = 1}, kPlain[1]).run();
}

// --- Losses of one element ---

const ElementOptions kElementOptions[] = {
    {.name = "mean"},
    {.name = "none", .reduction = Reduction::none},
    {.name = "none, one grad_loss, some ignored", .reduction = Reduction::none, .ignored = 3, .one_grad_loss = true},
    {.name = "sum, in place", .reduction = Reduction::sum, .in_place = true},
    {.name = "mean, some ignored, in place", .ignored = 4, .in_place = true},
    {.name = "uint8 targets, some ignored", .other_target = true, .target_dtype = Dtype::uint8, .ignored = 5},
    {.name = "int64 targets, weights of columns",
     .other_target = true,
     .target_dtype = Dtype::int64,
     .weight = Weight::of_columns,
     .pos_weight = Weight::of_columns},
    {.name = "weights of rows, none, some ignored",
     .reduction = Reduction::none,
     .ignored = 7,
     .weight = Weight::of_rows,
     .pos_weight = Weight::one},
    {.name = "weights of elements, gradient to the target, sum",
     .reduction = Reduction::sum,
     .weight = Weight::of_elements,
     .pos_weight = Weight::of_rows,
     .grad_target = true},
    {.name = "gradient to the target, some ignored, none",
     .reduction = Reduction::none,
     .ignored = 4,
     .grad_target = true},
    {.name = "gaps", .ignored = 3, .weight = Weight::of_columns, .gaps_in_input = true, .gaps_in_target = true},
    {.name = "turned target, float32, in place",
     .other_target = true,
     .ignored = 9,
     .gaps_in_target = true,
     .in_place = true},
    {.name = "all ignored", .reduction = Reduction::sum, .ignored = 1},
    {.name = "uint8 targets, weights of columns, none, some ignored",
     .reduction = Reduction::none,
     .other_target = true,
     .target_dtype = Dtype::uint8,
     .ignored = 5,
     .weight = Weight::of_columns,
     .pos_weight = Weight::of_columns},
    {.name = "uint8 targets, one weight, pos_weights of columns",
     .other_target = true,
     .target_dtype = Dtype::uint8,
     .weight = Weight::one,
     .pos_weight = Weight::of_columns},
    {.name = "weights of elements, in place",
     .weight = Weight::of_elements,
     .pos_weight = Weight::of_columns,
     .in_place = true},
    {.name = "int64 targets, one weight, sum, some ignored",
     .reduction = Reduction::sum,
     .other_target = true,
     .target_dtype = Dtype::int64,
     .ignored = 3,
     .weight = Weight::one},
    {.name = "wide weights of columns",
     .weight = Weight::of_columns,
     .pos_weight = Weight::one,
     .accumulated_weights = true},
    {.name = "int32 targets, some ignored", .other_target = true, .target_dtype = Dtype::int32, .ignored = 5},
};

void check_elements(const CpuReference& cpu, Dtype dtype, bool full) {
  const std::int64_t packet = 16 / bytes_of(dtype);
  for (const bool with_logits : {true, false}) {
    const auto check = [&](const ElementCase& c) {
      for (const ElementOptions& options : kElementOptions) ElementCheck(cpu, with_logits, c, options).run();
    };
    for (const std::int64_t columns : {packet - 1, packet, packet + 1, 3 * packet}) check({1, columns, dtype});
    for (const ElementCase& c : {ElementCase{1, 1, dtype}, ElementCase{3, 7, dtype, 1, 0},
                                 ElementCase{3, 2 * packet, dtype}, ElementCase{5, 61, dtype, 1, 2},
                                 // The target's packets are aligned where the input's are, whatever its type.
                                 ElementCase{5, 61, dtype, 16, 16}, ElementCase{5, 61, dtype, 1, 1}}) {
      check(c);
    }
    if (full) {
      check({17, 64, dtype});
      check({29, 1001, dtype, 1, 1});
    }
    // More than a block counts for itself, and the divisor has a launch of its own.
    if (!full) ElementCheck(cpu, with_logits, {1, 16390, dtype, 1, 0}, kElementOptions[4]).run();
    if (full) ElementCheck(cpu, with_logits, {1000, 701, dtype, 0, 1}, kElementOptions[4]).run();
    // More packets than threads.
    const PretendedDevice pretended(kOneMultiprocessor);
    for (const ElementOptions& options : {kElementOptions[4], kElementOptions[13], kElementOptions[6]}) {
      const std::int64_t columns = 40 * packet;
      ElementCheck(cpu, with_logits, {(full ? 800000 : 4700 * packet) / columns, columns, dtype}, options).run();
    }
  }
}

void check_rescaling(Dtype dtype, bool full) {
  for (const std::int64_t count : {1, 7, 1000, full ? 100003 : 300}) {
    for (const int lead : {0, 1}) {
      check_rescale(dtype, count, lead, 1, 1);
      check_rescale(dtype, count, lead, 1, 0.3);
      check_rescale(dtype, count, lead, 0.5, 3);
      check_rescale(dtype, count, lead, 1, std::numeric_limits<double>::infinity(), true);
      check_rescale(dtype, count, lead, 1, std::numeric_limits<double>::infinity(), false);
    }
  }
}

// --- The launcher's borders ---

// With two multiprocessors a few rows are many: each takes its place in a grid that has no block for each of them.
struct Pretence {
  const char* name;
  fusedloss::cuda::Device device;
};

std::vector<Pretence> pretences() {
  const fusedloss::cuda::Device small{.multiprocessors = 2,
                                      .dynamic_shared = (227 << 10) - fusedloss::cuda::kStaticSharedBytes,
                                      .shared_per_multiprocessor = 228 << 10,
                                      .largest_cluster = fusedloss::cuda::kLargestCluster};
  fusedloss::cuda::Device narrow = small, crowded = small;
  narrow.dynamic_shared = (99 << 10) - fusedloss::cuda::kStaticSharedBytes;
  narrow.shared_per_multiprocessor = 100 << 10;
  narrow.largest_cluster = 1;
  crowded.largest_cluster = 2;
  return {{"as compute capability 9.0", small},
          {"99 KB of shared memory, no clusters", narrow},
          {"no place for more than two blocks of a cluster", crowded}};
}

// So few that columns are just read in packets (csrc/kernels/cuda/plan.cpp: kFewestPackets).
std::int64_t positions_in_packets(Dtype dtype, const fusedloss::cuda::Device& device) {
  return 16 / bytes_of(dtype) * 8 * device.multiprocessors;
}

// Each border, one class less and one more, for any of the passes.
std::set<std::int64_t> counts_at_borders(fusedloss::cuda::ClassProblem problem, std::int64_t most) {
  std::set<std::int64_t> counts;
  for (const Pass pass : {Pass::forward, Pass::forward_with_gradient, Pass::backward}) {
    problem.pass = pass;
    for (const std::int64_t border : fusedloss::cuda::class_borders(problem, most)) {
      // A border is the first of its kind: the last of the other is one below.
      counts.insert({border - 1, border, border + 1});
    }
  }
  return counts;
}

struct Traversed {
  bool columns;
  bool general;
  std::int64_t positions;
};

void check_borders(const CpuReference& cpu, Dtype dtype, const Pretence& pretence, std::int64_t most,
                   const std::vector<Traversed>& traversals) {
  // The real one's limit stands: a narrow device cannot pretend to be a wide one.
  if (pretence.device.dynamic_shared > fusedloss::cuda::current_device().dynamic_shared) return;
  const PretendedDevice pretended(pretence.device);
  int turn = 0, counted = 0;
  for (const auto& [columns, general, positions] : traversals) {
    if (dtype == Dtype::float64 && !general) continue;  // it has the general kernels alone
    const auto counts =
        counts_at_borders({.dtype = dtype, .columns = columns, .general = general, .positions = positions}, most);
    for (const std::int64_t classes : counts) {
      const ClassOptions& options = general ? kGeneral[turn++ % 4] : kPlain[turn++ % std::size(kPlain)];
      const Layout layout = columns ? Layout::columns : Layout::rows;
      check_cross_entropy(cpu, {.shape = {1, classes, positions}, .layout = layout, .dtype = dtype}, options);
    }
    counted += int(counts.size());
  }
  std::printf("%s, %s: %d numbers of classes at the launcher's borders\n", name_of(dtype), pretence.name, counted);
}

void check_borders(const CpuReference& cpu, Dtype dtype, bool full) {
  const auto devices = pretences();
  const std::int64_t packets = positions_in_packets(dtype, devices[0].device);
  const std::vector<Traversed> all{{false, false, 1}, {false, false, 2}, {false, true, 2},
                                   {true, false, 9},  {true, true, 9},   {true, false, packets}};
  // Beyond the last border of each, rows are read twice.
  const std::int64_t most = full ? 1'000'000 * 2 / bytes_of(dtype) : 150;
  check_borders(cpu, dtype, devices[0], most, {{false, false, 2}});
  check_borders(cpu, dtype, devices[0], full ? most / 8 : most, all);
  check_borders(cpu, dtype, devices[1], full ? most / 8 : most, all);
  check_borders(cpu, dtype, devices[2], full ? most / 4 : most, {{false, false, 2}});
}

// Packets of each width, as strides and alignment allow them and numbers of classes have them kept.
void check_widths(const CpuReference& cpu, Dtype dtype, bool full) {
  const PretendedDevice pretended(pretences()[0].device);
  const std::vector<std::int64_t> classes =
      full ? std::vector<std::int64_t>{1, 3, 19, 24, 48, 96, 150, 221, 226, 450} : std::vector<std::int64_t>{3, 60};
  int turn = int(dtype);
  for (const std::int64_t count : classes) {
    for (const std::int64_t inner : {136, 132, 130, 129}) {
      const ClassCase c{.shape = {2, count, inner}, .layout = Layout::columns, .dtype = dtype};
      check_some(cpu, c, turn);
      check_cross_entropy(cpu, c, kPlain[3]);
      check_cross_entropy(cpu, c, kRare[turn % std::size(kRare)]);
    }
    // Packets of four positions, of two, of one.
    for (const int lead : {4, 2, 1}) {
      if (!full && lead == 1) continue;
      check_some(cpu, {.shape = {2, count, 136}, .layout = Layout::columns, .dtype = dtype, .lead = lead}, turn);
    }
    const ClassCase skewed{
        .shape = {1, count, 264}, .layout = Layout::columns, .dtype = dtype, .pad = 8, .skewed = true};
    check_some(cpu, skewed, turn);
  }
}

// Shared memory, static and dynamic together, at 48 KB: the most without opting in.
void check_straddling(const CpuReference& cpu, Dtype dtype) {
  const fusedloss::cuda::Device device = pretences()[0].device;
  const PretendedDevice pretended(device);
  const std::int64_t packets = positions_in_packets(dtype, device);
  for (const std::int64_t classes : {24, 48, 95, 96}) {
    check_cross_entropy(cpu, {.shape = {1, classes, packets}, .layout = Layout::columns, .dtype = dtype}, kPlain[3]);
  }
  switch (dtype) {
    case Dtype::float32:
      check_cross_entropy(cpu, {.shape = {1, 12100, 3}, .dtype = dtype}, kPlain[0]);
      return check_cross_entropy(cpu, {.shape = {1, 760, 9}, .dtype = dtype}, kPlain[3]);
    case Dtype::float64: {
      const PretendedDevice narrow(pretences()[1].device);
      return check_cross_entropy(cpu, {.shape = {1, 784, 9}, .dtype = dtype}, kPlain[0]);
    }
    default:
      for (const std::int64_t classes : {24300, 49000}) {
        check_cross_entropy(cpu, {.shape = {1, classes, 3}, .dtype = dtype}, kPlain[0]);
      }
  }
}

// --- Launches that fail, or follow others ---

__global__ void do_nothing(int value) {}

void check_launches() {
  ++cases();
  // A small launch does not lower the limit of shared memory under the feet of a large one, of another thread.
  const std::size_t most = fusedloss::cuda::current_device().dynamic_shared;
  for (const std::size_t bytes : {most, std::size_t(16)}) {
    fusedloss::cuda::launch("a launch", do_nothing, {.shared_bytes = bytes}, nullptr, 0);
    cudaFuncAttributes attributes{};
    require(cudaFuncGetAttributes(&attributes, do_nothing), "cudaFuncGetAttributes");
    EXPECT(attributes.maxDynamicSharedSizeBytes >= int(most), "after one with %ld bytes a launch may ask for %d",
           long(bytes), attributes.maxDynamicSharedSizeBytes);
  }
  // What fails is said by an exception alone: an error left in the runtime would be found by the next to ask.
  const auto fails = [&](const fusedloss::cuda::Launch& shape, std::string_view reason) {
    std::string said;
    try {
      fusedloss::cuda::launch("a launch", do_nothing, shape, nullptr, 0);
    } catch (const std::runtime_error& error) {
      said = error.what();
    }
    EXPECT(said.find("a launch") != said.npos && said.find(reason) != said.npos, "it said: %s", said.c_str());
    EXPECT(cudaGetLastError() == cudaSuccess, "an error is left behind");
    forget_report();
  };
  fails({.threads = 2048}, "");
  fails({.shared_bytes = 1 << 20}, "1048576 bytes of shared memory");
}

}  // namespace

// part: which loss; returns the number of failed checks so far.
extern "C" std::int64_t fusedloss_check(const CpuReference* cpu, std::int64_t dtype, std::int64_t part,
                                        std::int64_t full) {
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);
  const Dtype type = kDtypes[dtype];
  try {
    switch (part) {
      case 0: full ? full_cross_entropy(*cpu, type) : small_cross_entropy(*cpu, type); break;
      case 1: check_nll(*cpu, type, full != 0); break;
      case 2: check_elements(*cpu, type, full != 0); break;
      case 3: check_rescaling(type, full != 0); break;
      case 4: check_launches(); break;
      case 5:
        check_widths(*cpu, type, full != 0);
        if (full != 0) check_straddling(*cpu, type);
        check_borders(*cpu, type, full != 0);
        break;
    }
  } catch (const std::exception& error) {
    // An error of a kernel stays with the device: nothing after it would tell anything.
    EXPECT(false, "%s, part %ld, after %d cases: %s", name_of(type), long(part), cases(), error.what());
  }
  std::fflush(stdout);
  return failures();
}

extern "C" std::int64_t fusedloss_cases() { return cases(); }
extern "C" std::int64_t fusedloss_failures() { return failures(); }

extern "C" void fusedloss_measure(std::int64_t what, std::int64_t pass, std::int64_t dtype, std::int64_t classes,
                                  std::int64_t positions, std::int64_t ignored) {
  measure(Measured(what), Pass(pass), kDtypes[dtype], classes, positions, ignored != 0);
}

#if !defined(__CUDA_EMU__)
int main(int count, char** words) {
  bool full = true;
  std::vector<std::int64_t> dtypes;
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    const auto found =
        std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](Dtype d) { return name_of(d) == word; });
    if (word == "--small") {
      full = false;
    } else if (found != std::end(kDtypes)) {
      dtypes.push_back(found - std::begin(kDtypes));
    } else {
      std::fprintf(stderr, "check_kernels [--small] [float32] [float64] [bfloat16] [float16], not: %s\n", words[i]);
      return 2;
    }
  }
  if (dtypes.empty()) dtypes = {0, 1, 2, 3};
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("kernels: no device\n");
    return 77;
  }
  for (const std::int64_t dtype : dtypes) {
    for (std::int64_t part = 0; part < 6; ++part) fusedloss_check(fusedloss_cpu_reference(), dtype, part, full);
    std::printf("%s: done\n", name_of(kDtypes[dtype]));
  }
  std::printf("kernels: %d cases, %d failed checks\n", cases(), failures());
  return failures() == 0 ? 0 : 1;
}
#endif

// Which instruction sets were built, which this processor runs, and which one is in use.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace rnnfast::cpu {

extern const Kernels kernels_baseline;
#if defined(RNNFAST_BUILT_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(RNNFAST_BUILT_AVX512)
extern const Kernels kernels_avx512;
#endif
#if defined(RNNFAST_BUILT_AVX512BF16)
extern const Kernels kernels_avx512bf16;
#endif

namespace {

struct Build {
  const Kernels* kernels;
  bool runs_here;
};

// Slowest first.
const std::vector<Build>& builds() {
  static const std::vector<Build> all = [] {
    std::vector<Build> list{{&kernels_baseline, true}};
#if defined(RNNFAST_BUILT_AVX2)
    list.push_back({&kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#if defined(RNNFAST_BUILT_AVX512)
    list.push_back({&kernels_avx512, __builtin_cpu_supports("avx512f") != 0});
#endif
#if defined(RNNFAST_BUILT_AVX512BF16)
    list.push_back({&kernels_avx512bf16, __builtin_cpu_supports("avx512bf16") &&
                                             __builtin_cpu_supports("avx512bw") &&
                                             __builtin_cpu_supports("avx512vl")});
#endif
    return list;
  }();
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels& named(const std::string& name, const std::string& asked_by) {
  for (const Build& build : builds())
    if (name == build.kernels->name && build.runs_here) return *build.kernels;
  throw std::invalid_argument(asked_by + " is '" + name +
                              "', which is not an instruction set rnnfast can use here; it can use: " +
                              joined(available_isas()));
}

const Kernels& chosen_at_start() {
  const char* asked = std::getenv("RNNFAST_ISA");
  if (asked && *asked) return named(asked, "the environment variable RNNFAST_ISA");
  const Kernels* best = nullptr;
  for (const Build& build : builds())
    if (build.runs_here) best = build.kernels;
  return *best;
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Build& build : builds()) names.push_back(build.kernels->name);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Build& build : builds())
    if (build.runs_here) names.push_back(build.kernels->name);
  return names;
}

const Kernels& kernels() {
  if (const Kernels* current = in_use.load(std::memory_order_acquire)) return *current;
  const Kernels& chosen = chosen_at_start();
  in_use.store(&chosen, std::memory_order_release);
  return chosen;
}

void use_isa(const std::string& name) {
  in_use.store(&named(name, "the instruction set asked for"), std::memory_order_release);
}

}  // namespace rnnfast::cpu

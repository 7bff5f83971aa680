// All that the kernels and their launches take from the machine they run on.
//
// nvcc gets the implementation below, the only code here that knows CUDA. For a test on a processor the
// emulator (csrc/emu) gives the same names and is included first. Everything else in this directory is
// plain C++17 and the same source in both.
//
//   RNNFAST_DEVICE, RNNFAST_ANYWHERE, RNNFAST_KERNEL,
//   RNNFAST_ARGUMENT, RNNFAST_UNROLL, RNNFAST_ROLL          how functions, their arguments, loops are marked
//   block_index, thread_index, shared_memory, and _once     where a thread is
//   sync_warp, sync_block, sync_cluster                     barriers; they order all memory of their threads
//   load_shared, store_shared                               shared memory, ordered by barriers
//   load_global, prefetch                                   global memory that nobody writes meanwhile
//   load_arriving, publish, publish_to_peer                 words that threads hand each other without a barrier
//   any_lane_waits, relax                                   what to do while waiting for them
//   computed_once                                           a value that a loop shall find in a register
//   fail                                                    an error that the host will see
//   exchange_lanes, from_lane, multiply                     a warp's: shuffles and matrix multiply-accumulate
//   max_halves                                              of packed 16-bit numbers
//   has_ and lacks_tensor_cores, widen, narrow, to_tf32      number formats
//   exp_of, inverse                                         what a processor computes nearly by itself
//   Stream, LaunchShape, launch, fill, DeviceScope          the host's side
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.h"
#include "real.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define RNNFAST_DEVICE __device__ __forceinline__
#define RNNFAST_ANYWHERE __host__ __device__ __forceinline__
#define RNNFAST_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define RNNFAST_ARGUMENT const __grid_constant__
#define RNNFAST_UNROLL _Pragma("unroll")
#define RNNFAST_ROLL _Pragma("unroll 1")

namespace rnnfast::cuda {

struct Place {
  int x, y, z;
};

RNNFAST_DEVICE Place block_index() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
RNNFAST_DEVICE int thread_index() { return int(threadIdx.x); }

// The compiler computes again in every step what it thinks cheap, to spare registers; where a step is a chain of
// instructions none is cheap. What comes from another lane it keeps. For all lanes of a warp.
RNNFAST_DEVICE int computed_once(int value) { return __shfl_xor_sync(0xffffffffu, value, 0); }
RNNFAST_DEVICE std::int64_t computed_once(std::int64_t value) {
  return __shfl_xor_sync(0xffffffffu, static_cast<long long>(value), 0);
}
template <class T>
RNNFAST_DEVICE T* computed_once(T* value) {
  return reinterpret_cast<T*>(computed_once(reinterpret_cast<std::int64_t>(value)));
}

RNNFAST_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The same, for kernels whose loops have few places in it: what is only known when they run costs others more.
RNNFAST_DEVICE unsigned char* shared_memory_once() {
  const int address = computed_once(int(__cvta_generic_to_shared(shared_memory())));
  return static_cast<unsigned char*>(__cvta_shared_to_generic(std::size_t(unsigned(address))));
}

RNNFAST_DEVICE void sync_warp() { __syncwarp(); }
RNNFAST_DEVICE void sync_block() { __syncthreads(); }

// Before sm_90 a cluster is one block.
RNNFAST_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <class T>
RNNFAST_DEVICE T load_shared(const T* from) {
  return *from;
}

template <class T>
RNNFAST_DEVICE void store_shared(T* to, T value) {
  *to = value;
}

// Past the first-level cache, which has no use for what is read once a step.
RNNFAST_DEVICE uint4 load_global(const uint4* from) { return __ldcg(from); }

// Asks for what will be read later, as memory takes longer than a short step.
RNNFAST_DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Words that one thread stores and others read without a barrier between. Each is written and read whole, and
// read from where all of them see it; nothing else is ordered by it. A uint4 is read as any words in it.
struct InGlobal {};
struct InShared {};

RNNFAST_DEVICE std::uint32_t shared_address(const void* shared) {
  return std::uint32_t(__cvta_generic_to_shared(shared));
}

RNNFAST_DEVICE uint4 load_arriving(InGlobal, const uint4* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
RNNFAST_DEVICE uint4 load_arriving(InShared, const uint4* from) {
  uint4 v;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(from)) : "memory");
  return v;
}
RNNFAST_DEVICE void publish(InShared, uint4* to, const uint4& v) {
  asm volatile("st.volatile.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// publish_to_peer stores to where `mine`, in this block's shared memory, lies in that of the cluster's block
// `rank`. Before sm_90 a cluster is one block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define RNNFAST_TO_PEER(word, letter, ptx) \
  RNNFAST_DEVICE void publish_to_peer(int, word* mine, word value) { publish(InShared{}, mine, value); }
#else
#define RNNFAST_TO_PEER(word, letter, ptx)                                                            \
  RNNFAST_DEVICE void publish_to_peer(int rank, word* mine, word value) {                             \
    std::uint32_t theirs;                                                                             \
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(mine)), "r"(rank)); \
    asm volatile("st.relaxed.cluster.shared::cluster." ptx " [%0], %1;" ::"r"(theirs), letter(value)  \
                 : "memory");                                                                         \
  }
#endif
#define RNNFAST_WORD(word, letter, ptx)                                                                      \
  RNNFAST_DEVICE void publish(InGlobal, word* to, word value) {                                              \
    asm volatile("st.relaxed.gpu.global." ptx " [%0], %1;" ::"l"(to), letter(value) : "memory");             \
  }                                                                                                          \
  RNNFAST_DEVICE void publish(InShared, word* to, word value) {                                              \
    asm volatile("st.volatile.shared." ptx " [%0], %1;" ::"r"(shared_address(to)), letter(value) : "memory"); \
  }                                                                                                          \
  RNNFAST_TO_PEER(word, letter, ptx)

RNNFAST_WORD(std::uint16_t, "h", "u16")
RNNFAST_WORD(std::uint32_t, "r", "u32")
RNNFAST_WORD(std::uint64_t, "l", "u64")
#undef RNNFAST_WORD
#undef RNNFAST_TO_PEER

// Of 16 bytes each word arrives whole.
RNNFAST_DEVICE void publish_to_peer(int rank, uint4* mine, const uint4& v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  publish(InShared{}, mine, v);
#else
  std::uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("st.relaxed.cluster.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(theirs), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

// Whether a lane of the warp still waits: so that all go on together.
RNNFAST_DEVICE bool any_lane_waits(bool waits) { return __any_sync(0xffffffffu, waits); }
RNNFAST_DEVICE void relax() {}

// Where the device is not one that this code was compiled for.
RNNFAST_DEVICE void fail() { __trap(); }

template <class T>
RNNFAST_DEVICE T exchange_lanes(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
RNNFAST_DEVICE T* from_lane(T* value, int lane) {
  return reinterpret_cast<T*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(value), lane));
}

// The larger of two unsigned numbers, in each half of a word.
RNNFAST_DEVICE std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) { return __vmaxu2(a, b); }

// sums (16 x 8) += a (16 x 16) b (16 x 8), in the lanes' order that PTX calls mma.m16n8k16.
#define RNNFAST_MMA(shape, type)                                                             \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 "                        \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                           \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RNNFAST_HAS_MMA 0
#else
#define RNNFAST_HAS_MMA 1
#endif
// What this compilation is for; the emulator is for both.
constexpr bool has_tensor_cores = RNNFAST_HAS_MMA, lacks_tensor_cores = !has_tensor_cores;

template <class Format>
RNNFAST_DEVICE void multiply(float (&sums)[4], const uint4& a, std::uint32_t b0, std::uint32_t b1);

template <>
RNNFAST_DEVICE void multiply<Float16>(float (&sums)[4], const uint4& a, std::uint32_t b0,
                                      std::uint32_t b1) {
#if RNNFAST_HAS_MMA
  RNNFAST_MMA("m16n8k16", "f16");
#else
  fail();
#endif
}

template <>
RNNFAST_DEVICE void multiply<BFloat16>(float (&sums)[4], const uint4& a, std::uint32_t b0,
                                       std::uint32_t b1) {
#if RNNFAST_HAS_MMA
  RNNFAST_MMA("m16n8k16", "bf16");
#else
  fail();
#endif
}

// TF32, (16 x 8) += (16 x 8) (8 x 8): mma.m16n8k8.
template <>
RNNFAST_DEVICE void multiply<float>(float (&sums)[4], const uint4& a, std::uint32_t b0,
                                    std::uint32_t b1) {
#if RNNFAST_HAS_MMA
  RNNFAST_MMA("m16n8k8", "tf32");
#else
  fail();
#endif
}

#undef RNNFAST_MMA

// e^x and 1 / x to a few units in the last place; the processor has an instruction for each, nearly.
RNNFAST_DEVICE float exp_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}
RNNFAST_DEVICE double exp_of(double x) { return exp(x); }
RNNFAST_DEVICE float inverse(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
RNNFAST_DEVICE double inverse(double x) { return 1 / x; }

RNNFAST_DEVICE float widen(float value) { return value; }
RNNFAST_DEVICE double widen(double value) { return value; }
RNNFAST_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
RNNFAST_DEVICE float widen(BFloat16 value) { return __uint_as_float(std::uint32_t(value.bits) << 16); }

template <class Real>
RNNFAST_DEVICE Real narrow(StateOf<Real> value) {
  return value;
}
template <>
RNNFAST_DEVICE Float16 narrow<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
RNNFAST_DEVICE BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// The bits of the TF32 number nearest to value.
RNNFAST_DEVICE std::uint32_t to_tf32(float value) {
#if RNNFAST_HAS_MMA
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return __float_as_uint(value);
#endif
}

// The host's side

using Stream = cudaStream_t;

inline void require(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// The device that calls go to, for as long as this lives.
class DeviceScope {
 public:
  explicit DeviceScope(int device) : device_(device) {
    require(cudaGetDevice(&before_), "cudaGetDevice");
    if (device_ != before_) require(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~DeviceScope() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;

 private:
  int device_, before_ = 0;
};

struct LaunchShape {
  Place grid;
  int threads;
  int cluster;         // blocks, along x
  std::size_t shared;  // bytes
  bool resident;       // all blocks must be on the device at once
};

inline int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  require(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

constexpr int portable_cluster = 8;  // larger ones must be allowed

// As much as a block can have, whatever a launch needs: a limit of this launch's own would be another
// thread's too, which may launch the same kernel at the same time and need more.
inline void allow_shared_memory(const void* kernel, const std::string& what) {
  int device = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin)),
          what + ": shared memory");
}

// `what` names kernel and problem, for the message of an error.
template <class... Parameters, class... Arguments>
void launch(const std::string& what, void (*kernel)(Parameters...), const LaunchShape& shape,
            Stream stream, const Arguments&... arguments) {
  constexpr std::size_t always_allowed = 48 << 10;
  if (shape.shared > always_allowed) allow_shared_memory(reinterpret_cast<const void*>(kernel), what);
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.resident) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.cluster > portable_cluster)
    require(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what + ": cluster size");
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = unsigned(shape.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.grid.x), unsigned(shape.grid.y), unsigned(shape.grid.z));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  require(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
}

// `bytes` of each of `rows` rows that begin `pitch` bytes apart.
inline void fill(void* memory, int byte, std::size_t bytes, std::size_t rows, std::size_t pitch, Stream stream) {
  if (bytes == pitch) return require(cudaMemsetAsync(memory, byte, bytes * rows, stream), "cudaMemsetAsync");
  require(cudaMemset2DAsync(memory, pitch, byte, bytes, rows, stream), "cudaMemset2DAsync");
}

// The largest cluster that fits: 8 blocks are what every whole GPU with clusters promises, some take 16, and a
// slice of one may have fewer multiprocessors side by side. `kernel` is any; a block with all shared memory has a
// multiprocessor to itself.
inline int query_cluster(int device, void (*kernel)()) {
  if (!attribute_of(device, cudaDevAttrClusterLaunch)) return 1;
  const DeviceScope scope(device);
  const auto probe = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(probe, "cluster size");
  require(cudaFuncSetAttribute(probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = std::size_t(attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin));
  int largest = 1;
  require(cudaOccupancyMaxPotentialClusterSize(&largest, probe, &config), "cluster size");
  return largest;
}

inline Device query_device(int device, void (*kernel)()) {
  const int major = attribute_of(device, cudaDevAttrComputeCapabilityMajor);
  const int minor = attribute_of(device, cudaDevAttrComputeCapabilityMinor);
  return {10 * major + minor, attribute_of(device, cudaDevAttrMultiProcessorCount),
          attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin), query_cluster(device, kernel),
          attribute_of(device, cudaDevAttrCooperativeLaunch) != 0};
}

}  // namespace rnnfast::cuda

#elif !defined(RNNFAST_EMULATOR)
#error "compile with nvcc, or include the emulator's platform first"
#endif

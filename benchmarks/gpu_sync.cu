// What a step's synchronisation costs on this GPU, in microseconds: the figures the planner's estimates stand
// on. Prints one JSON object. Needs sm_90; built and run by gpu_check.sh.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace {

constexpr int rounds = 2000, threads = 256;

__device__ void wait_for(const int* flag, int value) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
}

// All blocks meet: cooperative groups' own barrier.
__global__ void grid_barrier() {
  for (int round = 0; round < rounds; ++round) cooperative_groups::this_grid().sync();
}

// All blocks meet as the recurrence's do: each raises its flag and reads everybody's.
__global__ void flag_exchange(int* flags, int first) {
  for (int round = 1; round <= rounds; ++round) {
    __syncthreads();
    if (threadIdx.x == 0)
      asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flags + blockIdx.x), "r"(first + round)
                   : "memory");
    if (threadIdx.x < 32)
      for (int peer = int(threadIdx.x); peer < int(gridDim.x); peer += 32)
        wait_for(flags + peer, first + round);
    __syncthreads();
  }
}

__global__ void cluster_barrier() {
  for (int round = 0; round < rounds; ++round)
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Every block sends four bytes to all others' shared memory, where an mbarrier counts them in. There are two
// mbarriers in turn: nobody can be two rounds ahead of a block that has not sent.
__global__ void mbarrier_push() {
  __shared__ alignas(8) std::uint64_t arrived[2];
  __shared__ std::uint32_t inbox[2][16];
  const auto address = [](const void* p) { return std::uint32_t(__cvta_generic_to_shared(p)); };
  if (threadIdx.x == 0) {
    for (const std::uint64_t& barrier : arrived)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(&barrier)));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
  if (threadIdx.x < 32) {
    std::uint32_t rank, size;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    for (int round = 0; round < rounds; ++round) {
      const std::uint32_t mine = address(arrived + round % 2);
      if (threadIdx.x == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mine),
                     "r"(4 * (size - 1)) : "memory");
      __syncwarp();
      if (threadIdx.x < size && threadIdx.x != rank) {
        std::uint32_t their_inbox, their_barrier;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                     : "=r"(their_inbox) : "r"(address(inbox[round % 2] + rank)), "r"(threadIdx.x));
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                     : "=r"(their_barrier) : "r"(mine), "r"(threadIdx.x));
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                         their_inbox), "r"(round), "r"(their_barrier) : "memory");
      }
      std::uint32_t done = 0;
      while (!done)
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done) : "r"(mine), "r"(round / 2 % 2) : "memory");
      __syncwarp();
    }
  }
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

void report(const char* name, cudaError_t error, double microseconds) {
  static bool first = true;
  std::printf(first ? "{" : ", ");
  first = false;
  if (error == cudaSuccess) {
    std::printf("\"%s\": %.4f", name, microseconds);
  } else {
    std::printf("\"%s\": \"%s\"", name, cudaGetErrorString(error));
    cudaGetLastError();
  }
}

// Microseconds a round, best of five; `launch` gives the error of one launch.
template <class Launch>
void measure(const char* name, Launch&& launch) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float best = 1e30f;
  cudaError_t error = cudaSuccess;
  for (int n = 0; n < 6 && error == cudaSuccess; ++n) {
    cudaEventRecord(begin);
    error = launch();
    cudaEventRecord(end);
    const cudaError_t ran = cudaEventSynchronize(end);
    if (error == cudaSuccess) error = ran;
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (n > 0 && milliseconds < best) best = milliseconds;
  }
  report(name, error, best * 1e3 / rounds);
}

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), int blocks, int cluster, bool cooperative,
                   Arguments... arguments) {
  if (cluster > 8)
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                         cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(threads);
  config.attrs = cluster > 1 ? attributes : attributes + 1;
  config.numAttrs = unsigned(cluster > 1) + unsigned(cooperative);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

int main() {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 1;
  const int blocks = device.multiProcessorCount;
  measure("grid barrier", [&] { return launch(grid_barrier, blocks, 1, true); });
  int* flags;
  cudaMalloc(&flags, sizeof(int) * std::size_t(blocks));
  cudaMemset(flags, 0, sizeof(int) * std::size_t(blocks));
  int first = 0;
  measure("flag exchange", [&] {
    const cudaError_t error = launch(flag_exchange, blocks, 1, true, flags, first);
    first += rounds;
    return error;
  });
  for (int size = 2; size <= 16; size *= 2) {
    char name[40];
    std::snprintf(name, sizeof(name), "cluster barrier %d", size);
    measure(name, [&] { return launch(cluster_barrier, size, size, false); });
    std::snprintf(name, sizeof(name), "mbarrier push %d", size);
    measure(name, [&] { return launch(mbarrier_push, size, size, false); });
  }
  std::printf("}\n");
  return 0;
}

// Lists of kept pairs in three launches: pairs counted, offsets planned, tokens written. Each is a few microseconds of
// latency and no work to speak of. What is counted and written is in pair_lists.h.
#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_scan.cuh>

#include "pair_lists.h"

namespace fastdpo {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kListTokens / kWarp;  // of a thread block that counts or writes
constexpr int kPlanThreads = 512;
constexpr int kPlanBlocks = kPlanThreads / kWarp;  // of the vocabulary that a thread block plans

// Lane k's bits become bit k of every lane's: which of the warp's 32 tokens keep block `lane` of the word.
__device__ uint32_t transposed(uint32_t bits, int lane) {
  uint32_t mine = 0;
  for (int k = 0; k < kWarp; ++k) {
    const uint32_t tokens = __ballot_sync(0xffffffffu, bits >> k & 1);
    if (k == lane) mine = tokens;
  }
  return mine;
}

// Grid (rows of `running`, words).
__global__ void __launch_bounds__(kListTokens) list_count_kernel(const PairListArgs a) {
  __shared__ int32_t pairs_of_warp[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x, block = static_cast<int64_t>(blockIdx.y) * kWordBlocks + lane;
  const uint32_t bits = kept_word(a, row * kListTokens + threadIdx.x, blockIdx.y);
  pairs_of_warp[warp][lane] = __popc(transposed(bits, lane));
  __syncthreads();
  if (warp == 0 && block < a.num_blocks) {
    int32_t pairs = 0;
    for (int w = 0; w < kWarps; ++w) pairs += pairs_of_warp[w][lane];
    a.running[row * a.num_blocks + block] = pairs;
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.finished = 0;  // for the plan
}

// A warp sums one block of the vocabulary over the tokens.
__device__ void sum_over_tokens(const PairListArgs& a, int64_t block) {
  using Scan = cub::WarpScan<int32_t>;
  __shared__ typename Scan::TempStorage scratch[kPlanBlocks];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int32_t total = 0;
  for (int64_t first = 0; first < list_rows(a); first += kWarp) {
    int32_t* place = a.running + (first + lane) * a.num_blocks + block;
    const bool exists = first + lane < list_rows(a);
    int32_t sum = exists ? *place : 0, warps_sum;
    Scan(scratch[warp]).InclusiveSum(sum, sum, warps_sum);
    if (exists) *place = total + sum;
    total += warps_sum;
    __syncwarp();
  }
  if (lane == 0) a.lengths[block] = total;
}

// Tiles of every block, the rounds, and whether lists pay: of the whole thread block, when all lengths are known.
__device__ void plan_tiles(const PairListArgs& a) {
  using Scan = cub::BlockScan<int32_t, kPlanThreads>;
  using Reduce = cub::BlockReduce<int64_t, kPlanThreads>;
  __shared__ typename Scan::TempStorage scan_scratch;
  __shared__ typename Reduce::TempStorage reduce_scratch;
  int32_t total = 0;
  int64_t pairs = 0;
  for (int64_t first = 0; first < a.num_blocks; first += kPlanThreads) {
    const int64_t block = first + threadIdx.x;
    const int32_t length = block < a.num_blocks ? __ldcg(a.lengths + block) : 0;  // other thread blocks' writes
    int32_t begin, tiles;
    Scan(scan_scratch).ExclusiveSum(tiles_of(a, length), begin, tiles);
    if (block < a.num_blocks) a.first_tile[block] = total + begin;
    total += tiles;
    pairs += length;
    __syncthreads();
  }
  if (threadIdx.x == 0) a.first_tile[a.num_blocks] = total;
  pairs = Reduce(reduce_scratch).Sum(pairs);
  if (threadIdx.x == 0) *a.is_routed = lists_pay(a, pairs);
  __syncthreads();
  for (int64_t round = threadIdx.x; round <= a.rounds; round += kPlanThreads) {
    const bool is_end = round == a.rounds;
    a.round_block[round] = is_end ? a.num_blocks : block_from_tile(a, round * a.tiles_per_round);
  }
}

__global__ void __launch_bounds__(kPlanThreads) list_plan_kernel(const PairListArgs a) {
  __shared__ bool is_last;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kPlanBlocks + threadIdx.x / kWarp;
  if (block < a.num_blocks) sum_over_tokens(a, block);
  __threadfence();  // lengths are seen before this thread block counts as done
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(a.finished, 1) == static_cast<int32_t>(gridDim.x) - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  plan_tiles(a);
}

__global__ void __launch_bounds__(kListTokens) list_fill_kernel(const PairListArgs a) {
  if (*a.is_routed == 0) return;
  __shared__ int32_t pairs_of_warp[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = blockIdx.x, block = static_cast<int64_t>(blockIdx.y) * kWordBlocks + lane;
  const uint32_t bits = kept_word(a, row * kListTokens + threadIdx.x, blockIdx.y);
  const uint32_t mask = transposed(bits, lane);
  pairs_of_warp[warp][lane] = __popc(mask);
  __syncthreads();
  if (block >= a.num_blocks) return;
  int32_t before = a.running[row * a.num_blocks + block];
  for (int w = warp; w < kWarps; ++w) before -= pairs_of_warp[w][lane];
  list_tokens(a, block, mask, row * kListTokens + warp * kWarp, before);
}

}  // namespace

int launch_pair_lists(const PairListArgs& a, int device, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const dim3 words(static_cast<unsigned>(list_rows(a)), static_cast<unsigned>(list_words(a)));
  const auto planners = static_cast<unsigned>((a.num_blocks + kPlanBlocks - 1) / kPlanBlocks);
  const auto on = static_cast<cudaStream_t>(stream);
  list_count_kernel<<<words, kListTokens, 0, on>>>(a);
  list_plan_kernel<<<planners, kPlanThreads, 0, on>>>(a);
  list_fill_kernel<<<words, kListTokens, 0, on>>>(a);
  return cudaGetLastError();
}

}  // namespace fastdpo

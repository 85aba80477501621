// How fast CUTLASS's grouped GEMM for Hopper (pointer arrays, TMA, warp specialised) makes the two
// products of the experts' feed-forward, to be held beside `epserve-microbench ffn`:
//
//     cmake --preset release -DEPSERVE_CUTLASS=DIR && cmake --build --preset release --target
//         cutlass_grouped_gemm
//     build/release/bin/cutlass_grouped_gemm ROWS EXPERTS HIDDEN INTERMEDIATE
//
// Rows and weights are bf16, sums fp32. The gate's and the up projection's product are one, of
// twice the intermediate size; SwiGLU between the products is not counted, which favours CUTLASS.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/kernel_hardware_info.h>
#include <cutlass/util/packed_stride.hpp>

#define CHECK(call)                                                                          \
  if (const auto e = (call); static_cast<int>(e) != 0) {                                     \
    std::fprintf(stderr, "%s:%d: %s: %d\n", __FILE__, __LINE__, #call, static_cast<int>(e)); \
    std::exit(1);                                                                            \
  }

namespace grouped_bench {

using namespace cute;

using Element = cutlass::bfloat16_t;
using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
constexpr int kAlignment = 8;
constexpr int kIterations = 30;
constexpr int kWarmup = 5;

struct Cooperative {
  using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
struct Pingpong {
  using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

// kSwapped: weights take the role of the rows, for products of few rows.
template <typename Tile, typename Cluster, typename Schedule, bool kSwapped>
struct Grouped {
  static constexpr bool kSwaps = kSwapped;
  using LayoutD =
      std::conditional_t<kSwapped, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutD*, kAlignment,
      Element, LayoutD*, kAlignment, typename Schedule::Epilogue,
      cutlass::epilogue::fusion::LinearCombination<Element, float, void>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor*,
      kAlignment, Element, cutlass::layout::ColumnMajor*, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Kernel>::CollectiveOp;
  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;
};

template <typename T>
T* Device(const std::vector<T>& host) {
  T* device = nullptr;
  CHECK(cudaMalloc(&device, host.size() * sizeof(T)));
  CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

__global__ void Fill(Element* data, std::size_t size, unsigned seed) {
  for (std::size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < size;
       i += std::size_t{gridDim.x} * blockDim.x) {
    unsigned x = static_cast<unsigned>(i * 2654435761u) ^ seed;
    float sum = 0;  // of four: near enough to a normal one
    for (int k = 0; k < 4; ++k) {
      x = x * 1664525u + 1013904223u;
      sum += static_cast<float>(x >> 8) / 16777216.0f - 0.5f;
    }
    data[i] = Element(sum * 0.1f);
  }
}

// out[groups] = rows [m, k] x weights [n, k]^T
struct RowsTimesWeights {
  int groups, m, n, k;
  const Element* rows;
  const Element* weights;
  Element* out;
};

template <typename G>
struct Prepared {
  using Gemm = typename G::Gemm;
  using StrideA = typename G::GemmKernel::InternalStrideA;
  using StrideB = typename G::GemmKernel::InternalStrideB;
  using StrideD = typename G::GemmKernel::InternalStrideD;

  explicit Prepared(const RowsTimesWeights& p) {
    const int m = G::kSwaps ? p.n : p.m, n = G::kSwaps ? p.m : p.n;
    shapes.assign(p.groups, make_shape(m, n, p.k));
    std::vector<const Element*> a, b;
    std::vector<Element*> d;
    std::vector<StrideA> stride_a(p.groups,
                                  cutlass::make_cute_packed_stride(StrideA{}, {m, p.k, 1}));
    std::vector<StrideB> stride_b(p.groups,
                                  cutlass::make_cute_packed_stride(StrideB{}, {n, p.k, 1}));
    std::vector<StrideD> stride_d(p.groups, cutlass::make_cute_packed_stride(StrideD{}, {m, n, 1}));
    for (int g = 0; g < p.groups; ++g) {
      a.push_back(p.rows + std::size_t(g) * p.m * p.k);
      b.push_back(p.weights + std::size_t(g) * p.n * p.k);
      if (G::kSwaps) std::swap(a.back(), b.back());
      d.push_back(p.out + std::size_t(g) * p.m * p.n);
    }
    cutlass::KernelHardwareInfo hardware;
    hardware.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);
    typename Gemm::Arguments args{cutlass::gemm::GemmUniversalMode::kGrouped,
                                  {p.groups, Device(shapes), shapes.data()},
                                  {Device(a), Device(stride_a), Device(b), Device(stride_b)},
                                  {{}, nullptr, nullptr, Device(d), Device(stride_d)},
                                  hardware};
    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = 0.0f;
    void* workspace = nullptr;
    CHECK(cudaMalloc(&workspace, Gemm::get_workspace_size(args)));
    CHECK(gemm.can_implement(args));
    CHECK(gemm.initialize(args, workspace));
  }

  std::vector<Shape<int, int, int>> shapes;  // read by every run
  Gemm gemm;
};

// The first product's first element, on the host.
float Expected(const RowsTimesWeights& p) {
  std::vector<Element> row(p.k), weight(p.k);
  CHECK(cudaMemcpy(row.data(), p.rows, p.k * sizeof(Element), cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(weight.data(), p.weights, p.k * sizeof(Element), cudaMemcpyDeviceToHost));
  double sum = 0;
  for (int i = 0; i < p.k; ++i) sum += double(float(row[i])) * float(weight[i]);
  return static_cast<float>(sum);
}

template <typename G>
void Measure(const char* name, const RowsTimesWeights& first, const RowsTimesWeights& second) {
  Prepared<G> up(first), down(second);
  const auto run = [&] {
    CHECK(up.gemm.run());
    CHECK(down.gemm.run());
  };
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> us;
  for (int i = 0; i < kWarmup + kIterations; ++i) {
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaDeviceSynchronize());
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmup) us.push_back(ms * 1000);
  }
  std::sort(us.begin(), us.end());
  Element got;
  CHECK(cudaMemcpy(&got, first.out, sizeof(got), cudaMemcpyDeviceToHost));
  const double flop =
      2.0 * first.groups * first.m * (double(first.n) * first.k + double(second.n) * second.k);
  const double bytes =
      2.0 * first.groups * (double(first.n) * first.k + double(second.n) * second.k);
  const double median = us[us.size() / 2];
  std::printf("%-34s %9.1f us %7.1f TFLOP/s %7.1f GB/s of weights   (%g, expected %g)\n", name,
              median, flop / median * 1e-6, bytes / median * 1e-3, float(got), Expected(first));
}

int Main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s ROWS EXPERTS HIDDEN INTERMEDIATE\n", argv[0]);
    return 2;
  }
  const int experts = std::atoi(argv[2]), rows = std::atoi(argv[1]) / experts;
  const int hidden = std::atoi(argv[3]), intermediate = std::atoi(argv[4]);
  const auto allocate = [](std::size_t size, unsigned seed) {
    Element* data = nullptr;
    CHECK(cudaMalloc(&data, size * sizeof(Element)));
    Fill<<<1024, 256>>>(data, size, seed);
    return data;
  };
  const std::size_t all = std::size_t(experts) * rows;
  Element* x = allocate(all * hidden, 1);
  Element* gate_up = allocate(std::size_t(experts) * 2 * intermediate * hidden, 2);
  Element* down = allocate(std::size_t(experts) * hidden * intermediate, 3);
  const RowsTimesWeights first{
      experts, rows, 2 * intermediate, hidden, x, gate_up, allocate(all * 2 * intermediate, 4)};
  const RowsTimesWeights second{experts,
                                rows,
                                hidden,
                                intermediate,
                                allocate(all * intermediate, 5),
                                down,
                                allocate(all * hidden, 6)};
  Measure<Grouped<Shape<_128, _256, _64>, Shape<_2, _1, _1>, Cooperative, false>>(
      "128x256x64 cooperative 2x1", first, second);
  Measure<Grouped<Shape<_128, _128, _64>, Shape<_2, _1, _1>, Pingpong, false>>(
      "128x128x64 ping-pong 2x1", first, second);
  Measure<Grouped<Shape<_256, _128, _64>, Shape<_1, _2, _1>, Cooperative, false>>(
      "256x128x64 cooperative 1x2", first, second);
  Measure<Grouped<Shape<_128, _16, _128>, Shape<_1, _1, _1>, Pingpong, true>>(
      "128x16x128 ping-pong, weights first", first, second);
  Measure<Grouped<Shape<_64, _16, _256>, Shape<_1, _1, _1>, Pingpong, true>>(
      "64x16x256 ping-pong, weights first", first, second);
  return 0;
}

}  // namespace grouped_bench

int main(int argc, char** argv) { return grouped_bench::Main(argc, argv); }

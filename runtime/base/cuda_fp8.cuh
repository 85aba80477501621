// Scales of e4m3 values on the device, the same wherever rows are cast.
#ifndef EPSERVE_RUNTIME_BASE_CUDA_FP8_CUH_
#define EPSERVE_RUNTIME_BASE_CUDA_FP8_CUH_

namespace epserve::runtime {

// Magnitudes below this bound round to 0: the reciprocal of their scale would overflow.
inline constexpr float kLeastFp8Bound = 1e-30f;
inline constexpr float kLargestFp8 = 448.0f;

// The scale of values of which `largest` is the largest magnitude: it becomes e4m3's largest. An
// infinite scale, where a value is infinite, has the reciprocal 0: every value that is read back is
// NaN, none is finite and wrong.
__device__ inline float Fp8Scale(float largest) {
  return fmaxf(largest, kLeastFp8Bound) / kLargestFp8;
}

// Its reciprocal to within 2 ulp, without waiting for it.
__device__ inline float Fp8InverseScale(float largest) {
  return __fdividef(kLargestFp8, fmaxf(largest, kLeastFp8Bound));
}

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_CUDA_FP8_CUH_

// Scales of e4m3 values on the device, the same wherever rows are cast.
#ifndef EPSERVE_RUNTIME_BASE_CUDA_FP8_CUH_
#define EPSERVE_RUNTIME_BASE_CUDA_FP8_CUH_

namespace epserve::runtime {

// The scale of values of which `largest` is the largest magnitude: it becomes e4m3's largest. Below
// the bound the scale's reciprocal would overflow; such values round to 0. An infinite scale, where
// a value is infinite, has the reciprocal 0: every value that is read back is NaN, none is finite
// and wrong.
__device__ inline float Fp8Scale(float largest) { return fmaxf(largest, 1e-30f) / 448.0f; }

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_BASE_CUDA_FP8_CUH_

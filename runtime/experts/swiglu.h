// silu(gate) * up, element by element. Pure, safe from any thread.
#ifndef EPSERVE_RUNTIME_EXPERTS_SWIGLU_H_
#define EPSERVE_RUNTIME_EXPERTS_SWIGLU_H_

#include <cstddef>

namespace epserve::runtime {

// gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. Relative error of silu below 4e-7; NaN stays
// NaN, and each element depends on its own place alone.
void SwiGlu(float* gate, const float* up, std::size_t count);

}  // namespace epserve::runtime

#endif  // EPSERVE_RUNTIME_EXPERTS_SWIGLU_H_

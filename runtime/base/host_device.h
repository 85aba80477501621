// For functions that host and device code share, in headers that a plain C++ compiler reads, too.
#ifndef EPSERVE_RUNTIME_BASE_HOST_DEVICE_H_
#define EPSERVE_RUNTIME_BASE_HOST_DEVICE_H_

#ifdef __CUDACC__
#define EPS_HOST_DEVICE __host__ __device__
#else
#define EPS_HOST_DEVICE
#endif

#endif  // EPSERVE_RUNTIME_BASE_HOST_DEVICE_H_

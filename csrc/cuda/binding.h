// What the binding of every CUDA operator includes: the stable ABI, the current stream, launches.
#pragma once
#include <initializer_list>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common/stable.h"
#include "plan.h"

// Defined by a CUDA build of torch. Weak: beside a torch without CUDA the extension still loads.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

#define SA_CUDA_CHECK(call) ::sparse_attn::check_cuda((call), #call)
#define SA_LAUNCH_CHECK() SA_CUDA_CHECK(cudaGetLastError())

namespace sparse_attn {

using torch::stable::accelerator::DeviceGuard;

inline void check_cuda(cudaError_t error, const char* call) {
  const char* advice = error == cudaErrorNoKernelImageForDevice
                           ? "; no code for this GPU: rebuild with SPARSE_ATTN_CUDA_ARCHS"
                           : "";
  SA_CHECK(error == cudaSuccess, call, ": ", cudaGetErrorString(error), advice);
}

struct NamedTensor {
  const char* name;
  const Tensor& tensor;
};

// An overload is called where any one of its tensors is on a GPU; kernels take all on that of the
// first.
inline void check_same_device(std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  for (const NamedTensor& t : tensors) {
    SA_CHECK(t.tensor.is_cuda(), t.name, ": expected a CUDA tensor");
    SA_CHECK(t.tensor.get_device_index() == first.tensor.get_device_index(), t.name,
             ": device is cuda:", t.tensor.get_device_index(), ", expected cuda:",
             first.tensor.get_device_index(), " as ", first.name);
  }
}

inline cudaStream_t current_stream(const Tensor& t) {
  SA_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline DeviceLimits limits_of(const Tensor& t) {
  int processors = 0, shared = 0;
  const int device = t.get_device_index();
  SA_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  SA_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {processors, shared};
}

// Launches on the current device, which a DeviceGuard has made that of the tensors.
template <class P>
void launch(void (*kernel)(P), const LaunchPlan& plan, cudaStream_t stream, const P& params) {
  const auto shape = [](const int64_t (&n)[3]) {
    return dim3(static_cast<unsigned>(n[0]), static_cast<unsigned>(n[1]),
                static_cast<unsigned>(n[2]));
  };
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (plan.shared_bytes > kWithoutAsking)
    SA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(plan.shared_bytes)));
  kernel<<<shape(plan.grid), shape(plan.block), static_cast<size_t>(plan.shared_bytes), stream>>>(
      params);
  SA_LAUNCH_CHECK();
}

}  // namespace sparse_attn

// A CUDA device for torch's CPU build: the autograd engine gets a thread for it and host memory can
// be pinned, but nothing is stored on it and nothing computes.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <c10/core/impl/alloc_cpu.h>

#include <mutex>
#include <unordered_set>

namespace {

// Ordinary memory, of which is known that it was asked for as pinned.
struct PinnedMemory final : c10::Allocator {
  std::mutex mutex;
  std::unordered_set<const void*> blocks;

  c10::DataPtr allocate(size_t bytes) override {
    void* block = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    blocks.insert(block);
    return {block, block, &release, c10::Device(c10::kCPU)};
  }

  bool holds(const void* block) {
    std::lock_guard<std::mutex> lock(mutex);
    return block == nullptr || blocks.count(block) > 0;  // no bytes need no copy
  }

  static void release(void* block);
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

PinnedMemory& pinned_memory() {
  static auto* memory = new PinnedMemory;  // outlives every tensor
  return *memory;
}

void PinnedMemory::release(void* block) {
  {
    std::lock_guard<std::mutex> lock(pinned_memory().mutex);
    pinned_memory().blocks.erase(block);
  }
  c10::free_cpu(block);
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  bool isPinnedPtr(const void* block) const override { return pinned_memory().holds(block); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  Device getDeviceFromPtr(void*) const override { return {kCUDA, 0}; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return detail::getDefaultCPUGenerator();
  }
  Generator getNewGenerator(DeviceIndex) const override { return detail::createCPUGenerator(); }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

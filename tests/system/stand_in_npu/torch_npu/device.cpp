// A device called npu for tests: its memory is the machine's, its kernels are the CPU's, everything else is its own.
//
// torch sees a device of the kind PrivateUse1, which is what Huawei's torch_npu registers, too. Tensors on it are not
// CPU tensors: no CPU kernel takes them, and none is made from them unless a copy is asked for. So code that asks for
// CUDA, or that mixes devices, fails here as it fails on a card.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include <chrono>

namespace {

const c10::Device npu(c10::DeviceType::PrivateUse1, 0);
constexpr size_t card_bytes = size_t(16) << 30;

// Memory, counted as cards count it.
struct Block {
  void* memory;
  size_t bytes;
};

struct Memory final : c10::DeviceAllocator {
  c10::CachingDeviceAllocator::DeviceStats stats;

  static Memory& get() {
    static Memory memory;
    return memory;
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    get().stats.allocated_bytes[0].decrease(block->bytes);
    c10::free_cpu(block->memory);
    delete block;
  }
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK_WITH(
        OutOfMemoryError, stats.allocated_bytes[0].current + bytes <= card_bytes, "NPU out of memory: ", bytes, " bytes");
    auto* block = new Block{c10::alloc_cpu(bytes), bytes};
    stats.allocated_bytes[0].increase(bytes);
    return {block->memory, block, &release, npu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return stats; }
  void resetAccumulatedStats(c10::DeviceIndex) override { stats.allocated_bytes[0].reset_accumulated(); }
  void resetPeakStats(c10::DeviceIndex) override { stats.allocated_bytes[0].reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {card_bytes - stats.allocated_bytes[0].current, card_bytes};
  }
};

// Streams and events: all work is done when a call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return npu.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return npu; }
  c10::Device getDevice() const override { return npu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, npu); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, npu); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new std::chrono::steady_clock::time_point;
    *static_cast<std::chrono::steady_clock::time_point*>(*event) = std::chrono::steady_clock::now();
  }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    using Time = std::chrono::steady_clock::time_point;
    return std::chrono::duration<double, std::milli>(*static_cast<Time*>(to) - *static_cast<Time*>(from)).count();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<std::chrono::steady_clock::time_point*>(event);
  }
  bool queryEvent(void*) const override { return true; }
  void block(void*, const c10::Stream&) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Random numbers: the device has a state of its own.
at::Generator& generator() {
  static at::Generator one = at::detail::createCPUGenerator(0);
  return one;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  at::Device getDeviceFromPtr(void*) const override { return npu; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

// Kernels.
at::Tensor on_cpu(const at::Tensor& tensor) {  // the same memory
  if (tensor.device().is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<at::Device>;
using Flag = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;
const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(at::IntArrayRef size, Type type, Layout, Place, Flag, Format format) {
  return at::detail::empty_generic(size, &Memory::get(), keys, c10::dtype_or_default(type), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Type type, Layout, Place, Flag) {
  return at::detail::empty_strided_generic(size, stride, &Memory::get(), keys, c10::dtype_or_default(type));
}
at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}
at::Scalar local_scalar_dense(const at::Tensor& self) { return on_cpu(self).item(); }
at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}
at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const int64_t numbers = source.nbytes() / self.dtype().itemsize();
  return at::native::set_storage_cpu_(self, source, 0, {numbers}, {});
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return at::native::set_tensor_(self, source); }

using Random = std::optional<at::Generator>;
at::Generator drawn_from(Random given) { return given.has_value() && given->defined() ? *given : generator(); }
at::Tensor& uniform_(at::Tensor& self, double from, double to, Random given) {
  on_cpu(self).uniform_(from, to, drawn_from(given));
  return self;
}
at::Tensor& normal_(at::Tensor& self, double mean, double deviation, Random given) {
  on_cpu(self).normal_(mean, deviation, drawn_from(given));
  return self;
}
at::Tensor& bernoulli_(at::Tensor& self, double share, Random given) {
  on_cpu(self).bernoulli_(share, drawn_from(given));
  return self;
}
at::Tensor& random_(at::Tensor& self, Random given) {
  on_cpu(self).random_(drawn_from(given));
  return self;
}
at::Tensor& random_from(at::Tensor& self, int64_t from, std::optional<int64_t> to, Random given) {
  on_cpu(self).random_(from, to, drawn_from(given));
  return self;
}
at::Tensor& random_to(at::Tensor& self, int64_t to, Random given) {
  on_cpu(self).random_(to, drawn_from(given));
  return self;
}
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& input, double share, Flag) {
  auto kept = at::empty_like(input).bernoulli_(1 - share);
  return {input * kept / (1 - share), kept.to(at::kBool)};
}
void all_others(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&all_others>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("uniform_", uniform_);
  m.impl("normal_", normal_);
  m.impl("bernoulli_.float", bernoulli_);
  m.impl("random_", random_);
  m.impl("random_.from", random_from);
  m.impl("random_.to", random_to);
  m.impl("native_dropout", native_dropout);
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(npu.type(), &Memory::get());
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("get_rng_state", [] { return generator().get_state(); });
  m.def("set_rng_state", [](const at::Tensor& state) { generator().set_state(state); });
  m.def("manual_seed", [](uint64_t seed) { generator().set_current_seed(seed); });
}

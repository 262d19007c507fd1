// The only file with inline PTX. MMK_SIMT emulates each function, with the lane layout of the PTX ISA.
#pragma once

#include "cuda/common/platform.cuh"

namespace mmk {

// ---- cp.async: copies from global to shared memory, complete after the wait ------------------------------

// Copies Bytes (4, 8 or 16) from global to shared memory, both aligned to Bytes. Copies of 16 bytes bypass L1
// (.cg); smaller ones cannot (.ca). This thread may read the data after cp_async_wait_group, other threads
// after a barrier that follows it.
template <int Bytes>
MMK_DEVICE void cp_async(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef MMK_SIMT
  simt::cp_async(shared, global, Bytes, Bytes);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(address), "l"(global), "n"(Bytes)
                 : "memory");
  }
#endif
}

// As cp_async, but if !valid it writes zeros and does not read `global` (which must still be aligned).
template <int Bytes>
MMK_DEVICE void cp_async_zfill(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int source_bytes = valid ? Bytes : 0;
#ifdef MMK_SIMT
  simt::cp_async(shared, global, Bytes, source_bytes);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(address), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

// Closes this thread's current group of copies (it may be empty).
MMK_DEVICE void cp_async_commit_group() {
#ifdef MMK_SIMT
  simt::cp_async_commit_group();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most the latest Pending groups of this thread are in flight.
template <int Pending>
MMK_DEVICE void cp_async_wait_group() {
#ifdef MMK_SIMT
  simt::cp_async_wait_group(Pending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

// Waits for all copies of this thread, committed or not.
MMK_DEVICE void cp_async_wait_all() {
#ifdef MMK_SIMT
  simt::cp_async_wait_all();
#else
  asm volatile("cp.async.wait_all;\n" ::: "memory");
#endif
}

// ---- ldmatrix: 8x8 tiles of 16-bit elements from shared memory to mma fragments --------------------------

// Loads Tiles (1, 2 or 4) 8x8 tiles. Lane 8 * i + r gives the address of row r of tile i (16 bytes, 16-byte
// aligned); the addresses of lanes >= 8 * Tiles are not read, but must be valid. fragment[i] of lane l gets
// the elements (row l / 4, columns 2 * (l % 4) and + 1) of tile i, or of its transpose. All 32 lanes must
// call it.
template <int Tiles, bool Transposed = false>
MMK_DEVICE void ldmatrix(uint32_t (&fragment)[Tiles], const void* row) {
  static_assert(Tiles == 1 || Tiles == 2 || Tiles == 4, "ldmatrix loads 1, 2 or 4 tiles");
#ifdef MMK_SIMT
  simt::ldmatrix(fragment, Tiles, Transposed, row);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Tiles == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
                 : "=r"(fragment[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (Tiles == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
                 : "=r"(fragment[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (Tiles == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (Tiles == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// ---- mma.sync m16n8k16: d = a * b + d, fp32 accumulators -------------------------------------------------

// T is __half or __nv_bfloat16. With g = lane / 4 and t = lane % 4 a lane holds, two elements to a register,
//   a[0] = A(g, 2t..2t+1)    a[2] = A(g, 2t+8..2t+9)      b[0] = B(2t..2t+1, g)
//   a[1] = A(g+8, 2t..2t+1)  a[3] = A(g+8, 2t+8..2t+9)    b[1] = B(2t+8..2t+9, g)
//   d[0..1] = D(g, 2t..2t+1) d[2..3] = D(g+8, 2t..2t+1)
// for A 16x16 (row, k), B 16x8 (k, column), D 16x8. All 32 lanes must call it.
template <class T>
MMK_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
MMK_DEVICE void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef MMK_SIMT
  simt::mma_m16n8k16<__half>(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

template <>
MMK_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef MMK_SIMT
  simt::mma_m16n8k16<__nv_bfloat16>(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- programmatic dependent launch: a kernel starts while the previous one still runs ---------------------

// Lets the next kernel of the stream start early, if launch_overlapping launches it; it starts when all
// blocks have called this or ended. No effect before sm_90.
MMK_DEVICE void grid_dependency_launch() {
#if !defined(MMK_SIMT) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until the previous kernel has ended and its writes are visible.
MMK_DEVICE void grid_dependency_wait() {
#if defined(MMK_SIMT)
  simt::wait_for_previous_grid();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// ---- streaming access: data used once should not evict reused data from the caches -----------------------

// Loads 16 bytes that no thread writes during the kernel, without allocating them in L1.
MMK_DEVICE uint4 load_streaming_16(const void* global) {
#ifdef MMK_SIMT
  return *static_cast<const uint4*>(simt::aligned_access(global, 16));
#else
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(global));
  return value;
#endif
}

// The same for memory that the thread overwrites afterwards.
MMK_DEVICE uint4 load_once_16(const void* global) {
#ifdef MMK_SIMT
  return *static_cast<const uint4*>(simt::aligned_access(global, 16));
#else
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
#endif
}

// Stores 16 bytes in one access; the compiler may split a plain store of a vector assembled in registers.
MMK_DEVICE void store_global_16(void* global, uint4 value) {
#ifdef MMK_SIMT
  *static_cast<uint4*>(simt::aligned_access(global, 16)) = value;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

// Stores 16 bytes, marked to be evicted first (.cs).
MMK_DEVICE void store_streaming_16(void* global, uint4 value) {
#ifdef MMK_SIMT
  *static_cast<uint4*>(simt::aligned_access(global, 16)) = value;
#else
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(global), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#endif
}

}  // namespace mmk

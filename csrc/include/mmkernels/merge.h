// merge: out_k = target_k + lam[group_k] * (source_k - target_k) for many tensors at once.
//
// All tensors are cut into chunks of kMergeChunk elements. The sum over a tensor's chunks, and over the tensors
// of a group, has one order, whatever the number of threads or multiprocessors.
#pragma once

#include <cstdint>

#include "mmkernels/dtype.h"
#include "mmkernels/stream.h"

namespace mmk {

constexpr int64_t kMergeChunk = 16384;  // elements

}  // namespace mmk

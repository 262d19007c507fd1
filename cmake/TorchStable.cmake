# torch_stable: headers and libraries of the libtorch stable ABI.
#
# find_package(Torch) is avoided on purpose: on a CUDA build of torch it insists on a full CUDA toolkit and edits global flags,
# and the stable ABI needs one include folder and two libraries only. torch is located without importing it.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '', end='')"
  OUTPUT_VARIABLE MMKERNELS_TORCH_ROOT COMMAND_ERROR_IS_FATAL ANY)
if(NOT MMKERNELS_TORCH_ROOT)
  message(FATAL_ERROR "mmkernels needs PyTorch >= 2.11 in the building Python (${Python_EXECUTABLE}): install torch first, "
                      "then build with `pip install --no-build-isolation`")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${MMKERNELS_TORCH_ROOT}/include")
# The target decides which torch loads the binary: built with any headers from 2.11 on, it runs on torch 2.11 and later.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_link_directories(torch_stable INTERFACE "${MMKERNELS_TORCH_ROOT}/lib")
target_link_libraries(torch_stable INTERFACE torch torch_cpu)

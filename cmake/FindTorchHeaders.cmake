# Defines the interface target dca_torch_headers from DCA_TORCH_DIR (the folder of the installed package `torch`).
#
# Only the headers of LibTorch's stable ABI are used, and torch is neither imported nor asked for its CMake files, which
# would bring its compiler flags along and want CUDA where torch was built with it.
if(NOT DCA_TORCH_DIR)
  message(FATAL_ERROR "DCA_BUILD_PYTHON=ON needs DCA_TORCH_DIR, the folder of the installed package torch.")
endif()
if(NOT EXISTS "${DCA_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "DCA_TORCH_DIR must hold torch 2.10 or newer; found no stable ABI headers in ${DCA_TORCH_DIR}.")
endif()

find_library(DCA_TORCH_CPU_LIBRARY torch_cpu PATHS "${DCA_TORCH_DIR}/lib" NO_DEFAULT_PATH REQUIRED)

add_library(dca_torch_headers INTERFACE)
target_include_directories(dca_torch_headers SYSTEM INTERFACE "${DCA_TORCH_DIR}/include")
# The oldest torch that the binary runs with: only symbols that 2.10 has are used.
target_compile_definitions(dca_torch_headers INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# A DT_NEEDED entry makes the symbols of the already loaded libtorch_cpu visible; no path to it is recorded.
target_link_libraries(dca_torch_headers INTERFACE "${DCA_TORCH_CPU_LIBRARY}")

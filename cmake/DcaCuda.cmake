# The CUDA part of the build: nvcc, its flags, and the object libraries of the kernels, the only ones that see CuTe.
# 90 stands for all kernels on Hopper; 90a alone, for Hopper's own, which quicker builds for tests add to 80.
set(DCA_CUDA_ARCHITECTURES "80;90" CACHE STRING "Compute capabilities to compile machine code for; the first also as PTX")
option(DCA_CUDA_STATIC_RUNTIME "Link the CUDA runtime into what is built (OFF: libcudart as a shared library)" ON)

# Flags are given in full below. CMake's own check of the compiler would build for a default architecture.
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
  message(FATAL_ERROR "DCA_CUDA=ON needs nvcc 12.4 or newer; found ${CMAKE_CUDA_COMPILER_VERSION}.")
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)  # what a kernel remembers of its module must not be shared with another library

get_filename_component(_nvcc_bin "${CMAKE_CUDA_COMPILER}" REALPATH)
find_package(CUDAToolkit QUIET)
if(DCA_CUDA_STATIC_RUNTIME)
  set(DCA_CUDART CUDA::cudart_static)
else()
  set(DCA_CUDART CUDA::cudart)
endif()
if(NOT TARGET ${DCA_CUDART})
  message(FATAL_ERROR "DCA_CUDA=ON found nvcc (${_nvcc_bin}) but no CUDA runtime library beside it.")
endif()

include(FindCutlass)
list(TRANSFORM DCA_CUDA_ARCHITECTURES PREPEND "sm_" OUTPUT_VARIABLE _names)
string(REPLACE ";" "," DCA_CUDA_ARCHITECTURES_TEXT "${_names}")
include(KernelInstances)
message(STATUS "Compiling ${DCA_INSTANCE_COUNT} CUDA attention kernels for ${DCA_CUDA_ARCHITECTURES_TEXT}, "
               "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

set(DCA_CUDA_GENCODE "")
list(GET DCA_CUDA_ARCHITECTURES 0 _first)
foreach(architecture IN LISTS DCA_CUDA_ARCHITECTURES)
  if(architecture STREQUAL "90a")
    continue()
  endif()
  if(architecture STREQUAL _first)
    list(APPEND DCA_CUDA_GENCODE "SHELL:-gencode arch=compute_${architecture},code=[sm_${architecture},compute_${architecture}]")
  else()
    list(APPEND DCA_CUDA_GENCODE "SHELL:-gencode arch=compute_${architecture},code=sm_${architecture}")
  endif()
endforeach()

# A spill to local memory is an error of ours, so it fails the build for the architectures that we look at; -v leaves
# registers and shared memory of every kernel in the log.
set(_others ${DCA_CUDA_ARCHITECTURES})
list(REMOVE_ITEM _others 80 90 90a)
if(_others)
  set(_allow_spills ON)
else()
  set(_allow_spills OFF)
endif()
option(DCA_CUDA_ALLOW_SPILLS "Only warn if ptxas spills registers" ${_allow_spills})
set(_strict "")
if(NOT DCA_CUDA_ALLOW_SPILLS)
  set(_strict "-Werror=all-warnings")
endif()
add_library(dca_kernel_flags INTERFACE)
target_include_directories(dca_kernel_flags INTERFACE csrc/dispatch csrc/kernels csrc/kernels/common
                                                      ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(dca_kernel_flags INTERFACE dca_headers dca_cutlass)
target_compile_options(dca_kernel_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage
  ${_strict} -lineinfo>)

add_library(dca_kernels OBJECT
  csrc/kernels/common/combine.cu
  csrc/kernels/common/device.cu
  csrc/kernels/common/merge.cu
  csrc/kernels/common/rotate.cu
  ${DCA_INSTANCE_SOURCES})
target_link_libraries(dca_kernels PRIVATE dca_kernel_flags)
target_compile_options(dca_kernels PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${DCA_CUDA_GENCODE}>)
set(DCA_KERNEL_OBJECTS $<TARGET_OBJECTS:dca_kernels>)

# wgmma and setmaxnreg exist in the feature set 90a alone. The PTX is for simulators and debuggers.
if(DCA_INSTANCE_SOURCES_SM90)
  add_library(dca_kernels_sm90 OBJECT ${DCA_INSTANCE_SOURCES_SM90})
  target_link_libraries(dca_kernels_sm90 PRIVATE dca_kernel_flags)
  target_compile_options(dca_kernels_sm90 PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:SHELL:-gencode arch=compute_90a,code=[sm_90a,compute_90a]>)
  list(APPEND DCA_KERNEL_OBJECTS $<TARGET_OBJECTS:dca_kernels_sm90>)
endif()

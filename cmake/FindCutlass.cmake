# Defines the interface target dca_cutlass from CUTLASS_DIR: the folder that holds cute/ and cutlass/, or a checkout that
# has them under include/, or the installed Python package nvidia-cutlass (found without importing it).
if(NOT CUTLASS_DIR AND DEFINED ENV{CUTLASS_DIR})
  set(CUTLASS_DIR "$ENV{CUTLASS_DIR}")
endif()
if(NOT CUTLASS_DIR)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE _package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_package)
      set(CUTLASS_DIR "${_package}/source/include")
    endif()
  endif()
endif()
find_path(DCA_CUTLASS_INCLUDE cute/tensor.hpp PATHS "${CUTLASS_DIR}" "${CUTLASS_DIR}/include" NO_DEFAULT_PATH)
if(NOT DCA_CUTLASS_INCLUDE)
  message(FATAL_ERROR "DCA_CUDA=ON needs CUTLASS 4: pip install nvidia-cutlass==4.2.0.0, or give CUTLASS_DIR, the folder "
                      "that holds cute/ and cutlass/.")
endif()

add_library(dca_cutlass INTERFACE)
target_include_directories(dca_cutlass SYSTEM INTERFACE "${DCA_CUTLASS_INCLUDE}")

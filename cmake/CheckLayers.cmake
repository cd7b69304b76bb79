# Fails the configuration if a file includes what its layer must not see. The include paths of the targets say the same,
# but a relative path could go around them.
#
#   layer        may include from the project              may include from outside
#   include/dca  include/dca                               the C++ standard library
#   reference    include/dca, reference                    "
#   cpu          include/dca, dispatch (backends), cpu     ", the system's calls
#   dispatch     include/dca, dispatch                     "
#   kernels      include/dca, dispatch (kernels.h), kernels  ", CuTe and CUTLASS, the CUDA runtime
#   torch        include/dca, torch                        ", torch's stable ABI
#   python       include/dca, python                       ", pybind11

set(_dca_headers "^dca/")
set(DCA_LAYER_include "${_dca_headers}")
set(DCA_LAYER_reference "${_dca_headers}|^[a-z_0-9]+\\.h$")
set(DCA_LAYER_cpu "${_dca_headers}|^[a-z_0-9]+\\.(h|inc)$|^sys/syscall\\.h$")
set(DCA_LAYER_dispatch "${_dca_headers}|^[a-z_0-9]+\\.h$")
set(DCA_LAYER_kernels "${_dca_headers}|^(sm80/)?[a-z_0-9]+\\.h$|^(cute|cutlass)/")
set(DCA_LAYER_torch "${_dca_headers}|^[a-z_0-9]+\\.h$|^torch/(csrc/stable|headeronly)/")
set(DCA_LAYER_python "${_dca_headers}|^[a-z_0-9]+\\.h$|^pybind11/")
set(_dca_standard "^[a-z_0-9]+$")

foreach(layer include reference cpu dispatch kernels torch python)
  file(GLOB_RECURSE files CONFIGURE_DEPENDS
    "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${layer}/*.h" "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${layer}/*.cpp"
    "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${layer}/*.inc" "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${layer}/*.cu")
  foreach(file IN LISTS files)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
    file(STRINGS "${file}" lines REGEX "^[ \t]*#[ \t]*include")
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^[ \t]*#[ \t]*include[ \t]*[<\"]([^>\"]*)[>\"].*" "\\1" header "${line}")
      if(NOT header MATCHES "${_dca_standard}" AND NOT header MATCHES "${DCA_LAYER_${layer}}")
        file(RELATIVE_PATH name "${CMAKE_CURRENT_SOURCE_DIR}" "${file}")
        message(FATAL_ERROR "${name} includes ${header}, which the layer csrc/${layer} must not see.")
      endif()
    endforeach()
  endforeach()
endforeach()
